r"""The rows of a head in closed form, from the statistics of each class's features.

Any centred weight factors as :math:`W = M^\top A`: the simplex vertices M are fixed, A maps features to them. The functions
here choose A (and the bias) from class counts :math:`n_c`, class means :math:`x_c` and the second moment of the features.
All is float64 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etf_adapt.simplex import rotated_simplex_etf, simplex_etf

FRAMES = ("random", "rotated", "means", "nearest_mean", "ridge", "discriminant", "whitened")
PENALIZED = ("ridge", "discriminant", "whitened")
LEAVABLE = ("means", "nearest_mean", *PENALIZED)
UNIT = ("means", "whitened")
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NEED_INTERCEPT = ("discriminant", "nearest_mean")
_SINGULAR = 1e-12
_CHUNK = 2048


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
        return within / max(between - noise, 0.05 * between, _SINGULAR)


def closed_form_rows(
    statistics: ClassStatistics,
    frame: str,
    *,
    penalty: float | None = None,
    intercept: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compute the rows and biases of a frame from class statistics, up to one positive factor.

    With x the plain mean of the class means :math:`x_c`, S_w the pooled within-class and S_b the balanced between-class
    covariance:

    - ``"random"``: a random simplex, centred on the data: :math:`b = -W x`.
    - ``"rotated"``: the simplex rotated onto the centred class means (orthogonal Procrustes), :math:`b = -W x`: an exact
      ETF in feature space where it fits (in_features >= num_classes - 1).
    - ``"means"``: unit vectors along the centred class means, :math:`b = -W x`.
    - ``"nearest_mean"``: the class mean nearest to the feature, :math:`w_c = x_c - x`, :math:`b_c = -\tfrac12 |x_c - x|^2 -
      w_c^\top x`.
    - ``"ridge"``: class-balanced ridge regression of each row's vertex on its centred feature,
      :math:`w_c \propto (S_w + S_b + \lambda I)^{-1} (x_c - x)`, :math:`b = -W x`.
    - ``"discriminant"``: :math:`w_c = (S_w + \lambda I)^{-1} (m_c - x)` and
      :math:`b_c = -\tfrac12 w_c^\top (m_c - x) - w_c^\top x`, where :math:`m_c - x = \frac{n_c}{n_c + \kappa} (x_c - x)` is the
      class mean shrunk by ``ClassStatistics.shrinkage``.
    - ``"whitened"``: unit vectors along the centred class means where the within-class covariance is white,
      :math:`w_c = (S_w + \lambda I)^{-1} o_c / \sqrt{o_c^\top (S_w + \lambda I)^{-1} o_c}` with :math:`o_c = x_c - x`, and
      :math:`b = -W x`. For a great penalty these are the rows of ``"means"``.

    Rows and biases are then centred over the classes, which changes no argmax and no centred logit.

    Args:
        statistics: Statistics of the training rows; every class has one at least.
        frame: One of ``FRAMES``.
        penalty: :math:`\lambda` in units of the mean eigenvalue of the matrix that it is added to, for ``"ridge"``,
            ``"discriminant"`` and ``"whitened"``. From 0 on; 1 by default.
        intercept: Whether the layer has a bias. Without one, ``"ridge"`` regresses uncentred features
            (:math:`w_c \propto (S_w + S_m + \lambda I)^{-1} x_c`, S_m the moment of the class means about zero) and the other
            frames leave the centring out; ``"discriminant"`` and ``"nearest_mean"`` need an intercept.
        generator: Source of the rotation of ``"random"``.

    Returns:
        Rows (num_classes, in_features) and biases (num_classes,), float64; the biases are zero without an intercept.

    Raises:
        ValueError: The frame is unknown or not offered without an intercept, a class has no row, or the penalty is negative.

    References:
        Ioffe (2006), Probabilistic Linear Discriminant Analysis, for the shrunken class means.
        Hatch, Kajarekar, Stolcke (2006), Within-Class Covariance Normalization for SVM-based Speaker Recognition.

    Example:
        >>> labels = torch.arange(60) % 3
        >>> features = torch.nn.functional.one_hot(labels, 5).double() + 0.1 * torch.randn(60, 5)
        >>> weight, bias = closed_form_rows(ClassStatistics.of(features, labels, 3), "ridge", penalty=0.1)
        >>> bool(((features @ weight.T + bias).argmax(dim=1) == labels).all())
        True
    """
    _check(statistics, frame, penalty, intercept)
    offsets = statistics.means - statistics.center if intercept else statistics.means
    if frame in ("random", "rotated"):
        weight = (
            rotated_simplex_etf(offsets)
            if frame == "rotated"
            else simplex_etf(*offsets.shape, generator=generator, dtype=torch.float64)
        )
        bias = torch.zeros(offsets.shape[0], dtype=torch.float64)
    else:
        weight, bias = _class_rows(statistics, frame, offsets, statistics.counts, penalty, intercept)
    if intercept:
        bias = bias - weight @ statistics.center
    return weight - weight.mean(dim=0), bias - bias.mean()


def metric_root(
    statistics: ClassStatistics, frame: str, *, penalty: float | None = None, intercept: bool = True
) -> Tensor | None:
    r"""Return a root of the metric in which the rows of a frame are unit vectors.

    Args:
        statistics: Statistics of the training rows.
        frame: ``"whitened"`` or ``"means"``.
        penalty: As in ``closed_form_rows``.
        intercept: As in ``closed_form_rows``.

    Returns:
        R (in_features, in_features), float64, with :math:`R^\top R = (S_w + \lambda I)^{-1}`; None for ``"means"``, whose
        metric is the identity.

    Raises:
        ValueError: The rows of the frame have no common length.
    """
    if frame not in UNIT:
        raise ValueError(f"`frame` (={frame!r}) must be one of {UNIT}: the rows of the others differ in length.")
    if frame == "means":
        return None
    factor = torch.linalg.cholesky(_penalized(statistics, frame, penalty, intercept))
    identity = torch.eye(len(factor), dtype=torch.float64)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def left_out_rows(
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
        penalty: As in ``closed_form_rows``.
        intercept: As in ``closed_form_rows``.

    Returns:
        Changes of the rows (batch, in_features) and biases (batch,), float64, in units of ``closed_form_rows``.

    Raises:
        ValueError: The frame has no such rows, or a row is the last of its class.

    Example:
        >>> features, labels = torch.tensor([[0.0, 2.0], [2.0, 2.0], [1.0, -2.0], [1.0, -2.0]]), torch.tensor([0, 0, 1, 1])
        >>> statistics = ClassStatistics.of(features, labels, 2)
        >>> weight, bias = left_out_rows(statistics, features, labels, "nearest_mean")
        >>> weight.tolist()  # without one of the first two rows, their class mean is the other
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    _check(statistics, frame, penalty, intercept)
    if frame not in LEAVABLE:
        raise ValueError(f"`frame` (={frame!r}) must be one of {LEAVABLE}: the others have no row of a class's own.")
    _require_two(statistics, labels)
    center = statistics.center if intercept else torch.zeros_like(statistics.center)
    offsets, counts = (statistics.means - center)[labels], statistics.counts[labels]
    deviation = features.to(torch.float64) - statistics.means[labels]
    without = offsets - deviation / (counts - 1.0).unsqueeze(1)
    weight, bias = _class_rows(statistics, frame, offsets, counts, penalty, intercept)
    left_weight, left_bias = _class_rows(statistics, frame, without, counts - 1.0, penalty, intercept)
    change = left_weight - weight
    return change, left_bias - bias - (change @ center if intercept else 0.0)


def _class_rows(
    statistics: ClassStatistics,
    frame: str,
    offsets: Tensor,
    counts: Tensor,
    penalty: float | None,
    intercept: bool,
) -> tuple[Tensor, Tensor]:
    """Return rows and biases of classes at these offsets from the centre and of so many rows, about the centre."""
    bias = torch.zeros(len(offsets), dtype=torch.float64)
    if frame == "means":
        return torch.nn.functional.normalize(offsets, dim=1), bias
    if frame == "nearest_mean":
        return offsets, -0.5 * (offsets**2).sum(dim=1)
    if frame == "discriminant":
        offsets = (counts / (counts + statistics.shrinkage)).unsqueeze(1) * offsets
    weight = torch.linalg.solve(_penalized(statistics, frame, penalty, intercept), offsets.T).T
    if frame == "discriminant":
        bias = -0.5 * (weight * offsets).sum(dim=1)
    elif frame == "whitened":
        weight = weight / (weight * offsets).sum(dim=1, keepdim=True).sqrt().clamp_min(_SINGULAR)
    return weight, bias


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
        penalty: As in ``closed_form_rows``.
        intercept: As in ``closed_form_rows``.

    Returns:
        Scores (batch, num_classes), float64, equal to the logits of the refitted rows up to one number a row.

    Raises:
        ValueError: The frame has no penalty, or a row is the last of its class.
    """
    _check(statistics, frame, penalty, intercept)
    if frame not in PENALIZED:
        raise ValueError(f"`frame` (={frame!r}) must be one of {PENALIZED}: the others have no penalty to choose.")
    counts, means = statistics.counts[labels], statistics.means
    _require_two(statistics, labels)
    center = statistics.center if intercept else torch.zeros_like(statistics.center)
    offsets = means - center  # (num_classes, in_features)
    deviation = features.to(torch.float64) - means[labels]  # e
    move = -1.0 / (counts - 1.0)  # the class mean moves by move * e, the centre by move * e / num_classes
    drift = move / means.shape[0] if intercept else torch.zeros_like(move)
    change = -counts / (counts - 1.0) / statistics.counts.sum()  # factor of e eᵀ in the change of S_w
    factor = torch.linalg.cholesky(_penalized(statistics, frame, penalty, intercept))
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
        return linear / squares.sqrt().clamp_min(_SINGULAR)
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


def _require_two(statistics: ClassStatistics, labels: Tensor) -> None:
    alone = labels[statistics.counts[labels] < 2]
    if len(alone):
        raise ValueError(
            f"Class {int(alone[0])} has one row: it cannot be left out. Give rows of classes with two or more."
        )


def _penalized(statistics: ClassStatistics, frame: str, penalty: float | None, intercept: bool) -> Tensor:
    """Return the matrix that the closed form inverts."""
    matrix = statistics.within
    if frame == "ridge":
        matrix = matrix + statistics.between(centered=intercept)
    ridge = (1.0 if penalty is None else penalty) * float(matrix.diagonal().mean())
    return matrix + (ridge + _SINGULAR) * torch.eye(matrix.shape[0], dtype=torch.float64)


def _check(statistics: ClassStatistics, frame: str, penalty: float | None, intercept: bool) -> None:
    if frame not in FRAMES:
        raise ValueError(f"`frame` (={frame!r}) must be one of {', '.join(map(repr, FRAMES))}.")
    if frame in NEED_INTERCEPT and not intercept:
        raise ValueError(f"`frame` (={frame!r}) needs a layer with a bias; use 'whitened' or 'ridge' for this model.")
    if penalty is not None and not penalty >= 0.0:
        raise ValueError(f"`penalty` (={penalty}) must be at least 0: it is added to the eigenvalues of a covariance.")
    if bool((statistics.counts < 1).any()):
        empty = int((statistics.counts < 1).nonzero()[0])
        raise ValueError(f"Class {empty} has no row: its mean is unknown. Drop the class or give it a training row.")
