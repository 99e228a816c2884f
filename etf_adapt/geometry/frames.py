r"""The rows of a head in closed form, from the statistics of each class's features.

Any centred weight factors as :math:`W = M^\top A`: the simplex vertices M are fixed, A maps features to them. The functions
here choose A (and the bias) from class counts :math:`n_c`, class means :math:`x_c` and the second moment of the features.
All is float64 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etf_adapt.geometry.simplex import rotated_simplex_etf, simplex_etf
from etf_adapt.geometry.statistics import SINGULAR, ClassStatistics

FRAMES = ("random", "rotated", "means", "nearest_mean", "ridge", "discriminant", "whitened")
PENALIZED = ("ridge", "discriminant", "whitened")
LEAVABLE = ("means", "nearest_mean", *PENALIZED)
UNIT = ("means", "whitened")
NEED_INTERCEPT = ("discriminant", "nearest_mean")


def closed_form_vectors(
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
        >>> weight, bias = closed_form_vectors(ClassStatistics.of(features, labels, 3), "ridge", penalty=0.1)
        >>> bool(((features @ weight.T + bias).argmax(dim=1) == labels).all())
        True
    """
    check_frame(statistics, frame, penalty, intercept)
    offsets = statistics.means - statistics.center if intercept else statistics.means
    if frame in ("random", "rotated"):
        weight = (
            rotated_simplex_etf(offsets)
            if frame == "rotated"
            else simplex_etf(*offsets.shape, generator=generator, dtype=torch.float64)
        )
        bias = torch.zeros(offsets.shape[0], dtype=torch.float64)
    else:
        weight, bias = class_rows(statistics, frame, offsets, statistics.counts, penalty, intercept)
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
        penalty: As in ``closed_form_vectors``.
        intercept: As in ``closed_form_vectors``.

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
    factor = torch.linalg.cholesky(penalized_covariance(statistics, frame, penalty, intercept))
    identity = torch.eye(len(factor), dtype=torch.float64)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def class_rows(
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
    weight = torch.linalg.solve(penalized_covariance(statistics, frame, penalty, intercept), offsets.T).T
    if frame == "discriminant":
        bias = -0.5 * (weight * offsets).sum(dim=1)
    elif frame == "whitened":
        weight = weight / (weight * offsets).sum(dim=1, keepdim=True).sqrt().clamp_min(SINGULAR)
    return weight, bias


def penalized_covariance(statistics: ClassStatistics, frame: str, penalty: float | None, intercept: bool) -> Tensor:
    """Return the matrix that the closed form inverts."""
    matrix = statistics.within
    if frame == "ridge":
        matrix = matrix + statistics.between(centered=intercept)
    ridge = (1.0 if penalty is None else penalty) * float(matrix.diagonal().mean())
    return matrix + (ridge + SINGULAR) * torch.eye(matrix.shape[0], dtype=torch.float64)


def check_frame(statistics: ClassStatistics, frame: str, penalty: float | None, intercept: bool) -> None:
    """Refuse an unknown frame, a class without rows, or a penalty that does not fit."""
    if frame not in FRAMES:
        raise ValueError(f"`frame` (={frame!r}) must be one of {', '.join(map(repr, FRAMES))}.")
    if frame in NEED_INTERCEPT and not intercept:
        raise ValueError(f"`frame` (={frame!r}) needs a layer with a bias; use 'whitened' or 'ridge' for this model.")
    if penalty is not None and not penalty >= 0.0:
        raise ValueError(f"`penalty` (={penalty}) must be at least 0: it is added to the eigenvalues of a covariance.")
    if bool((statistics.counts < 1).any()):
        empty = int((statistics.counts < 1).nonzero()[0])
        raise ValueError(f"Class {empty} has no row: its mean is unknown. Drop the class or give it a training row.")
