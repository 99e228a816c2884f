"""The penalty of a head, its logit scale and its prior adjustment, chosen by rows that its features never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etf_adapt.geometry.closed_form import closed_form_vectors
from etf_adapt.geometry.leave_one_out import PENALTIES, LeaveOneOut
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.inference.head_statistics import HeadStatistics, logit_norm
from etf_adapt.losses.terms import log_prior
from etf_adapt.metrics.calibration import fit_balanced

GREATEST_PENALTY = 1e4  # the grid goes on to it while its last one is the best
_LOGITS = 2**22  # by which a penalty is chosen: a fit of the scale reads them some thirty times

Score = Callable[[float, Tensor], Tensor]  # from a penalty and the indices of rows to their logits by the head


@dataclass(frozen=True)
class Choice:
    """What held-out rows chose, and their logits with the scale and the adjustment."""

    penalty: float
    logit_scale: float
    prior_strength: float
    log_loss: float  # class-balanced
    logits: Tensor  # (rows, num_classes)

    def head(self, rows: ClassStatistics, intercept: bool, unread: Tensor | None = None) -> HeadStatistics:
        """Return the head of these rows."""
        chosen = self.penalty, intercept, self.logit_scale, self.prior_strength
        return HeadStatistics(rows, "whitened", *chosen, unread)


def choose_by_log_loss(
    score: Score, labels: Tensor, counts: Tensor, *, penalties: Sequence[float] = PENALTIES, adjusts: bool = True
) -> Choice:
    """Choose a penalty by the class-balanced log loss of held-out rows, scale and prior adjustment fitted to them too."""
    # A proper score tells more than an accuracy where rows are few; classes of few rows share their weight.
    prior = counts if adjusts else None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    some = order[: max(1, _LOGITS // len(counts))]
    grid = list(penalties)
    losses: dict[float, float] = {}
    for penalty in grid:
        losses[penalty] = fit_balanced(score(penalty, some), labels[some], prior)[2]
        is_edge = len(grid) > 1 and penalty == grid[-1] == min(losses, key=lambda key: losses[key])
        if is_edge and penalty * 10 <= GREATEST_PENALTY:
            grid.append(penalty * 10)
    best = min(losses, key=lambda penalty: (losses[penalty], -penalty))
    logits = score(best, torch.arange(len(labels)))
    scale, strength, loss = fit_balanced(logits, labels, prior)
    return Choice(best, scale, strength, loss, scale * logits - strength * log_prior(counts, logits))


def choose_nothing(score: Score, penalty: float, labels: Tensor, before: Tensor | None) -> Choice:
    """Return the head with a given penalty, its logits as long as those of the head before; all of it without held-out rows."""
    logits = score(penalty, torch.arange(len(labels)))
    scale = 1.0 if before is None else float(vertex_products(before)[1].mean() / vertex_products(logits)[1].mean())
    return Choice(penalty, scale, 0.0, math.nan, scale * logits)


def mean_logits(features: Sequence[Tensor], vectors: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the logits of features, float64; of several heads their mean, as most models take it."""
    parts = zip(features, vectors, strict=True)
    logits = [kept.double() @ weight.T + (0 if bias is None else bias) for kept, (weight, bias) in parts]
    return torch.stack(logits).mean(0)


def score_features(
    statistics: Sequence[ClassStatistics], features: Sequence[Tensor], intercepts: Sequence[bool]
) -> Score:
    """Return ``score`` for rows that are not among the statistics, of each head."""

    def score(penalty: float, rows: Tensor) -> Tensor:
        heads = zip(statistics, intercepts, strict=True)
        vectors = [HeadStatistics(each, "whitened", penalty, own).class_vectors() for each, own in heads]
        return mean_logits([kept[rows] for kept in features], vectors)

    return score


def score_left_out(
    statistics: Sequence[ClassStatistics], features: Sequence[Tensor], labels: Tensor, intercepts: Sequence[bool]
) -> Score:
    """Return ``score`` for rows of the statistics, each by the heads that would have been set without it."""
    left_out = [LeaveOneOut(each, intercept=own) for each, own in zip(statistics, intercepts, strict=True)]

    def score(penalty: float, rows: Tensor) -> Tensor:
        found = []
        for each, kept, own, without in zip(statistics, features, intercepts, left_out, strict=True):
            vectors = closed_form_vectors(each, "whitened", penalty=penalty, intercept=own)
            logits = without.scores(kept[rows], labels[rows], penalty=penalty)
            found.append(logits / logit_norm(each, *vectors))
        return torch.stack(found).mean(dim=0)

    return score
