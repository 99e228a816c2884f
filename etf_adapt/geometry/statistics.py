"""Class counts, class sums and the second moment of features: all that a closed form needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINGULAR = 1e-12


@dataclass(frozen=True)
class ClassStatistics:
    """Class counts, class sums and the second moment of features: all that the closed forms need.

    Statistics of disjoint sets of rows add up (``+``), so they can be gathered in batches and over processes.

    Attributes:
        counts: Rows of each class (num_classes,).
        sums: Sum of the features of each class (num_classes, in_features).
        moment: Sum of the outer products of the features (in_features, in_features).

    Example:
        >>> a = ClassStatistics.of(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), 3)
        >>> (a + a).counts.tolist()
        [4.0, 4.0, 4.0]
    """

    counts: Tensor
    sums: Tensor
    moment: Tensor

    @classmethod
    def empty(cls, num_classes: int, in_features: int) -> ClassStatistics:
        """Return the statistics of no rows."""
        zeros = torch.zeros
        return cls(
            zeros(num_classes, dtype=torch.float64),
            zeros(num_classes, in_features, dtype=torch.float64),
            zeros(in_features, in_features, dtype=torch.float64),
        )

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> ClassStatistics:
        """Return the statistics of features (batch, in_features) with labels (batch,)."""
        rows = features.detach().to("cpu", torch.float64)
        labels = labels.to("cpu")
        counts = torch.bincount(labels, minlength=num_classes).to(torch.float64)
        sums = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows)
        return cls(counts, sums, rows.T @ rows)

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """Return the statistics of both sets of rows."""
        return ClassStatistics(self.counts + other.counts, self.sums + other.sums, self.moment + other.moment)

    @property
    def means(self) -> Tensor:
        """Class means (num_classes, in_features)."""
        return self.sums / self.counts.unsqueeze(1)

    @property
    def center(self) -> Tensor:
        """Plain mean of the class means (in_features,): each class counts once."""
        return self.means.mean(dim=0)

    @property
    def within(self) -> Tensor:
        """Pooled within-class covariance (in_features, in_features): each row counts once."""
        means = self.means
        return (self.moment - (self.counts.unsqueeze(1) * means).T @ means) / self.counts.sum()

    def between(self, *, centered: bool = True) -> Tensor:
        """Second moment of the class means (in_features, in_features), about ``center`` or about zero."""
        offsets = self.means - self.center if centered else self.means
        return offsets.T @ offsets / offsets.shape[0]

    @property
    def shrinkage(self) -> float:
        """Ratio of within- to between-class variance, the latter freed of the class means' own sampling noise.

        A class mean of n rows is worth ``n / (n + shrinkage)`` of itself: empirical Bayes with a Gaussian prior.
        """
        within = float(self.within.trace())
        between = float(self.between().trace())
        noise = within * float((1.0 / self.counts).mean())
        return within / max(between - noise, 0.05 * between, SINGULAR)


def require_two(statistics: ClassStatistics, labels: Tensor) -> None:
    """Refuse labels whose class has one row alone: nothing of it is left without that row."""
    alone = labels[statistics.counts[labels] < 2]
    if len(alone):
        raise ValueError(
            f"Class {int(alone[0])} has one row: it cannot be left out. Give rows of classes with two or more."
        )
