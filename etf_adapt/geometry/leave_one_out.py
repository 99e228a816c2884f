"""Each row scored by the closed form that would have been fitted without it, and the penalty chosen by that."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from etf_adapt.geometry.frames import (
    LEAVABLE,
    PENALIZED,
    check_frame,
    class_rows,
    penalized_covariance,
)
from etf_adapt.geometry.statistics import SINGULAR, ClassStatistics, require_two

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_CHUNK = 2048


def left_out_changes(
    statistics: ClassStatistics,
    features: Tensor,
    labels: Tensor,
    frame: str,
    *,
    penalty: float | None = None,
    intercept: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Compute by how much the row and bias of each feature's own class change where the feature is left out.

    Its class mean is then :math:`x_c - (x_i - x_c) / (n_c - 1)`, and its class has one row less. The rest stays as it is: the
    covariances, the mean of the class means, the shrinkage, and the rows of other classes. ``leave_one_out_scores`` is
    exact where this is not, but holds only for the features that the head was set from; these changes go with features
    that move on.

    Args:
        statistics: Statistics of all rows, these among them.
        features: Rows to leave out, one at a time (batch, in_features).
        labels: Their classes (batch,), each with two rows or more in ``statistics``.
        frame: One of ``FRAMES`` but ``"random"`` and ``"rotated"``, which have no row of a class's own.
        penalty: As in ``closed_form_vectors``.
        intercept: As in ``closed_form_vectors``.

    Returns:
        Changes of the rows (batch, in_features) and biases (batch,), float64, in units of ``closed_form_vectors``.

    Raises:
        ValueError: The frame has no such rows, or a row is the last of its class.

    Example:
        >>> features, labels = torch.tensor([[0.0, 2.0], [2.0, 2.0], [1.0, -2.0], [1.0, -2.0]]), torch.tensor([0, 0, 1, 1])
        >>> statistics = ClassStatistics.of(features, labels, 2)
        >>> weight, bias = left_out_changes(statistics, features, labels, "nearest_mean")
        >>> weight.tolist()  # without one of the first two rows, their class mean is the other
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    check_frame(statistics, frame, penalty, intercept)
    if frame not in LEAVABLE:
        raise ValueError(f"`frame` (={frame!r}) must be one of {LEAVABLE}: the others have no row of a class's own.")
    require_two(statistics, labels)
    center = statistics.center if intercept else torch.zeros_like(statistics.center)
    offsets, counts = (statistics.means - center)[labels], statistics.counts[labels]
    deviation = features.to(torch.float64) - statistics.means[labels]
    without = offsets - deviation / (counts - 1.0).unsqueeze(1)
    weight, bias = class_rows(statistics, frame, offsets, counts, penalty, intercept)
    left_weight, left_bias = class_rows(statistics, frame, without, counts - 1.0, penalty, intercept)
    change = left_weight - weight
    return change, left_bias - bias - (change @ center if intercept else 0.0)


def leave_one_out_scores(
    statistics: ClassStatistics,
    features: Tensor,
    labels: Tensor,
    frame: str,
    *,
    penalty: float,
    intercept: bool = True,
) -> Tensor:
    r"""Score rows by the closed form that would have been fitted without them, exactly and without refitting.

    Taking row i of class c away changes S_w by a multiple of :math:`e e^\top` with :math:`e = x_i - x_c`, and the mean of
    class c by :math:`-e / (n_c - 1)`: an update of rank two at most, solved by Woodbury's identity. Kept as they are: the
    divisor of the covariance, the penalty in absolute units, and the shrinkage.

    Args:
        statistics: Statistics of all rows, the scored ones among them.
        features: Rows to score (batch, in_features).
        labels: Their classes (batch,), each with two rows or more in ``statistics``.
        frame: One of ``PENALIZED``.
        penalty: As in ``closed_form_vectors``.
        intercept: As in ``closed_form_vectors``.

    Returns:
        Scores (batch, num_classes), float64, equal to the logits of the refitted rows up to one number a row.

    Raises:
        ValueError: The frame has no penalty, or a row is the last of its class.
    """
    check_frame(statistics, frame, penalty, intercept)
    if frame not in PENALIZED:
        raise ValueError(f"`frame` (={frame!r}) must be one of {PENALIZED}: the others have no penalty to choose.")
    counts, means = statistics.counts[labels], statistics.means
    require_two(statistics, labels)
    center = statistics.center if intercept else torch.zeros_like(statistics.center)
    offsets = means - center  # (num_classes, in_features)
    deviation = features.to(torch.float64) - means[labels]  # e
    move = -1.0 / (counts - 1.0)  # the class mean moves by move * e, the centre by move * e / num_classes
    drift = move / means.shape[0] if intercept else torch.zeros_like(move)
    change = -counts / (counts - 1.0) / statistics.counts.sum()  # factor of e eᵀ in the change of S_w
    factor = torch.linalg.cholesky(penalized_covariance(statistics, frame, penalty, intercept))
    solved = torch.cholesky_solve(deviation.T, factor).T  # S⁻¹ e
    solved_offsets = torch.cholesky_solve(offsets.T, factor).T
    e_e = (deviation * solved).sum(dim=1)
    if frame == "ridge":
        g_e = (offsets[labels] * solved).sum(dim=1)
        g_g = (offsets * solved_offsets).sum(dim=1)[labels]
        # S' = S + U C Uᵀ with U = [e, g]; the row itself is U t; S'⁻¹ U t = S⁻¹ U (I + C UᵀS⁻¹U)⁻¹ t
        c_ee, c_eg = change + move * (move - drift) / means.shape[0], move / means.shape[0]
        a, b = 1.0 + c_ee * e_e + c_eg * g_e, c_ee * g_e + c_eg * g_g
        c, d = c_eg * e_e, 1.0 + c_eg * g_e
        t = 1.0 - drift
        determinant = a * d - b * c
        r_e, r_g = (d * t - b) / determinant, (a - c * t) / determinant
        direction = r_e.unsqueeze(1) * solved + r_g.unsqueeze(1) * solved_offsets[labels]  # S'⁻¹ of the row
        scores = direction @ offsets.T
        own = move * (direction * deviation).sum(dim=1)
        return scores.index_put((torch.arange(len(labels)), labels), own, accumulate=True)
    linear, squares = _products_without_row(
        statistics, labels, offsets, solved_offsets, deviation, solved, e_e, move, drift, change
    )
    if frame == "whitened":
        return linear / squares.sqrt().clamp_min(SINGULAR)
    remaining = statistics.counts.repeat(len(labels), 1)
    remaining[torch.arange(len(labels)), labels] -= 1.0
    shrink = remaining / (remaining + statistics.shrinkage)
    return shrink * linear - 0.5 * shrink**2 * squares


def choose_penalty(
    statistics: ClassStatistics, features: Tensor, labels: Tensor, frame: str, *, intercept: bool = True
) -> tuple[float, float]:
    """Choose the penalty of a frame by the leave-one-out balanced accuracy of sampled training rows.

    Args:
        statistics: Statistics of all training rows.
        features: Sampled training rows (batch, in_features).
        labels: Their classes (batch,).
        frame: One of ``PENALIZED``.
        intercept: Whether the layer has a bias.

    Returns:
        The penalty, of ``PENALTIES``, and its leave-one-out balanced accuracy over the sampled classes with two rows or
        more; the middle penalty and NaN where there is no such class. Of equally good penalties the larger is taken.
    """
    usable = statistics.counts[labels] >= 2
    features, labels = features[usable], labels[usable]
    if len(labels) == 0:
        return 1.0, math.nan
    best = (-1.0, 0.0)
    for penalty in PENALTIES:
        options: dict[str, Any] = {"penalty": penalty, "intercept": intercept}
        parts = zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True)  # several arrays of rows by classes
        predicted = [leave_one_out_scores(statistics, *part, frame, **options).argmax(dim=1) for part in parts]
        best = max(best, (_mean_recall(torch.cat(predicted), labels), penalty))
    return best[1], best[0]


def nearest_mean_accuracy(statistics: ClassStatistics, features: Tensor, labels: Tensor) -> float:
    r"""Measure how well the nearest class mean tells sampled training rows, each left out of its own.

    Without row i, the mean of its class of n rows lies :math:`n / (n - 1)` times as far from it.

    Args:
        statistics: Statistics of all training rows.
        features: Sampled training rows (batch, in_features).
        labels: Their classes (batch,).

    Returns:
        Leave-one-out balanced accuracy over the sampled classes with two rows or more; NaN where there is none.

    Example:
        >>> features, labels = torch.tensor([[0.0], [1.0], [2.0], [5.0]]), torch.tensor([0, 0, 0, 1])
        >>> nearest_mean_accuracy(ClassStatistics.of(features, labels, 2), features, labels)
        1.0
    """
    usable = statistics.counts[labels] >= 2
    features, labels = features[usable].to(torch.float64), labels[usable]
    if len(labels) == 0:
        return math.nan
    distances = torch.cdist(features, statistics.means)
    own, counts = labels.unsqueeze(1), statistics.counts[labels].unsqueeze(1)
    distances.scatter_(1, own, distances.gather(1, own) * counts / (counts - 1.0))
    return _mean_recall(distances.argmin(dim=1), labels)


def _mean_recall(predicted: Tensor, labels: Tensor) -> float:
    """Return the balanced accuracy over the classes that occur."""
    rows = torch.bincount(labels)
    correct = torch.bincount(labels, weights=(predicted == labels).to(torch.float64))
    return float((correct[rows > 0] / rows[rows > 0]).mean())


def _products_without_row(
    statistics: ClassStatistics,
    labels: Tensor,
    offsets: Tensor,
    solved_offsets: Tensor,
    deviation: Tensor,
    solved: Tensor,
    e_e: Tensor,
    move: Tensor,
    drift: Tensor,
    change: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the products of the centred row, and of each class offset itself, with the offsets in the penalized metric.

    Both (batch, num_classes) and without the row; names as in ``leave_one_out_scores``.
    """
    rows = torch.arange(len(labels))
    gain = (-change / (1.0 + change * e_e)).unsqueeze(1)  # S'⁻¹ = S⁻¹ + gain (S⁻¹e)(S⁻¹e)ᵀ
    cross = solved @ offsets.T  # (batch, num_classes)
    row_on_solved = (1.0 - drift) * e_e + cross[rows, labels]
    direction = (1.0 - drift).unsqueeze(1) * solved + solved_offsets[labels]
    direction = direction + gain * row_on_solved.unsqueeze(1) * solved
    # the offset of class k without the row is offsets[k] - shift[:, k] e
    shift = drift.unsqueeze(1).repeat(1, offsets.shape[0])
    shift[rows, labels] -= move
    e_e = e_e.unsqueeze(1)
    linear = direction @ offsets.T - shift * (direction * deviation).sum(dim=1, keepdim=True)
    norms = (offsets * solved_offsets).sum(dim=1)
    squares = norms - 2.0 * shift * cross + shift**2 * e_e + gain * (cross - shift * e_e) ** 2
    return linear, squares
