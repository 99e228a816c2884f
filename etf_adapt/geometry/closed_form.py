r"""The class vectors of a head in closed form, from the statistics of each class's features.

Any centred weight factors as :math:`W = M^\top A`: the simplex vertices M are fixed, A maps features to them. The functions
here choose A (and the bias) from class counts, class means and the second moment of the features, in float64 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etf_adapt.errors import check_choice
from etf_adapt.geometry.simplex import simplex_etf
from etf_adapt.geometry.statistics import ClassStatistics

FRAMES = ("random", "means", "whitened")
MEAN_FRAMES = ("means", "whitened")
"""Frames that are made from features."""

TINY = 1e-12


def closed_form_vectors(
    statistics: ClassStatistics,
    frame: str,
    *,
    penalty: float | None = None,
    intercept: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compute class vectors (num_classes, in_features) and biases (num_classes,), up to one positive factor.

    With :math:`o_c = x_c - x` the class means less their plain mean x, and S_w the pooled within-class covariance:

    - ``"random"``: the simplex in a random rotation.
    - ``"means"``: unit vectors along the :math:`o_c`.
    - ``"whitened"``: unit vectors along the :math:`o_c` where the within-class covariance is white,
      :math:`w_c = S^{-1} o_c / \sqrt{o_c^\top S^{-1} o_c}` with :math:`S = S_w + \lambda I`. For a great penalty
      :math:`\lambda` these are the vectors of ``"means"``.

    The bias is :math:`b = -W x`: the frame is centred on the data. Without an intercept x is zero, and so are the biases. Class
    vectors and biases are then centred over the classes, which changes no argmax and no centred logit.

    ``penalty`` is :math:`\lambda` in mean eigenvalues of S_w, 1 where None; ``generator`` is the source of ``"random"``.

    References:
        Hatch, Kajarekar, Stolcke (2006), Within-Class Covariance Normalization for SVM-based Speaker Recognition.
    """
    check_frame(statistics, frame, penalty)
    offsets = statistics.means - statistics.center if intercept else statistics.means
    if frame == "random":
        weight = simplex_etf(*offsets.shape, generator=generator, dtype=torch.float64)
    elif frame == "means":
        weight = unit_vectors(offsets, offsets)
    else:
        weight = unit_vectors(offsets, torch.linalg.solve(penalized_covariance(statistics, penalty), offsets.T).T)
    bias = -(weight @ statistics.center) if intercept else torch.zeros(len(weight), dtype=torch.float64)
    return weight - weight.mean(dim=0), bias - bias.mean()


def penalized_covariance(statistics: ClassStatistics, penalty: float | None) -> Tensor:
    r"""Return :math:`S_w + \lambda I`, the matrix of the whitened frame."""
    within = statistics.within
    ridge = (1.0 if penalty is None else penalty) * float(within.diagonal().mean())
    # Of classes of one row each the covariance is zero but for rounding, which many updates may make indefinite.
    least = 1e-10 * float(statistics.moment.diagonal().mean() / statistics.counts.sum())
    return within + max(ridge + TINY, least) * torch.eye(within.shape[0], dtype=torch.float64)


def unit_vectors(offsets: Tensor, solved: Tensor) -> Tensor:
    r"""Return :math:`w = S^{-1} o / \sqrt{o^\top S^{-1} o}` of offsets o and :math:`S^{-1} o`, both (batch, in_features)."""
    return solved / (solved * offsets).sum(dim=1, keepdim=True).clamp_min(0.0).sqrt().clamp_min(TINY)


def check_frame(statistics: ClassStatistics, frame: str, penalty: float | None) -> None:
    """Refuse an unknown frame, a negative penalty, or a class without rows."""
    check_choice("frame", frame, FRAMES)
    if penalty is not None and not penalty >= 0.0:
        raise ValueError(f"`penalty` (={penalty}) must be at least 0: it is added to the eigenvalues of a covariance.")
    if bool((statistics.counts < 1).any()):
        empty = int((statistics.counts < 1).nonzero()[0])
        raise ValueError(f"Class {empty} has no row: its mean is unknown. Drop the class or give it a training row.")
