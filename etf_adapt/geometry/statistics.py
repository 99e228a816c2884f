"""Class counts, class sums and the second moment of features: all that the closed forms need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassStatistics:
    """Sums over the features of a set of rows, float64 on the CPU.

    Statistics of disjoint sets add up (``+``), so that they can be gathered over batches and processes.
    """

    counts: Tensor  # (num_classes,): rows of each class
    sums: Tensor  # (num_classes, in_features): sum of the features of each class
    moment: Tensor  # (in_features, in_features): sum of the outer products of the features

    @classmethod
    def empty(cls, num_classes: int, in_features: int) -> ClassStatistics:
        """Return the statistics of no rows."""
        return cls(
            torch.zeros(num_classes, dtype=torch.float64),
            torch.zeros(num_classes, in_features, dtype=torch.float64),
            torch.zeros(in_features, in_features, dtype=torch.float64),
        )

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> ClassStatistics:
        """Return the statistics of features (batch, in_features) with labels (batch,)."""
        found = cls.empty(num_classes, features.shape[1])
        found.add_(features, labels)
        return found

    def add_(self, features: Tensor, labels: Tensor) -> None:
        """Add features (batch, in_features) with labels (batch,) in place, at a cost that does not grow with the classes."""
        labels = labels.to("cpu")
        self.counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        for rows, classes in zip(features.detach().split(2**13), labels.split(2**13), strict=True):
            rows = rows.to("cpu", torch.float64)  # not of all rows at once
            self.sums.index_add_(0, classes, rows)
            self.moment.addmm_(rows.T, rows)

    def replace_(self, old: Tensor, new: Tensor, labels: Tensor) -> None:
        """Put features (batch, in_features) in the place of ``old``, which are among the rows, of the same classes (batch,)."""
        old, new = (part.detach().to("cpu", torch.float64) for part in (old, new))
        self.sums.index_add_(0, labels.to("cpu"), new - old)
        self.moment.addmm_(new.T, new).addmm_(old.T, old, alpha=-1.0)

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """Return the statistics of both sets of rows."""
        return ClassStatistics(self.counts + other.counts, self.sums + other.sums, self.moment + other.moment)

    def __sub__(self, other: ClassStatistics) -> ClassStatistics:
        """Return the statistics without the rows of ``other``, which must be among them."""
        return ClassStatistics(self.counts - other.counts, self.sums - other.sums, self.moment - other.moment)

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
