"""The closed form without one example at a time.

``left_out_changes`` is for training: how the class vector of an example's class changes, the rest as it is; it goes with
features that move on. ``leave_one_out_scores`` is exact, for the features that the head was set from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from etf_adapt.errors import check_choice
from etf_adapt.geometry.closed_form import MEAN_FRAMES, TINY, check_frame, penalized_covariance, unit_vectors
from etf_adapt.geometry.statistics import ClassStatistics


def left_out_changes(
    statistics: ClassStatistics,
    features: Tensor,
    labels: Tensor,
    frame: str,
    *,
    penalty: float | None = None,
    intercept: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Compute how the class vector (batch, in_features) and bias (batch,) of an example's class change without it.

    Its class mean becomes :math:`x_c - (x_i - x_c) / (n_c - 1)`. The covariance, the mean of the class means and the other
    class vectors stay. ``leave_one_out_scores`` is exact where this is not, but holds only for the features that the head
    was set from; these changes go with features that move on in training.

    ``frame`` is one of ``MEAN_FRAMES``. Each class of ``labels`` has two rows or more in ``statistics``.
    """
    check_choice("frame", frame, MEAN_FRAMES)
    check_frame(statistics, frame, penalty)
    center = statistics.center if intercept else torch.zeros_like(statistics.center)
    covariance = penalized_covariance(statistics, penalty) if frame == "whitened" else None
    offsets = (statistics.means - center)[labels]
    deviations = features.to(torch.float64) - statistics.means[labels]
    offsets_without = offsets - deviations / (statistics.counts[labels] - 1.0).unsqueeze(1)
    change = unit_vectors(offsets_without, covariance) - unit_vectors(offsets, covariance)
    return change, -(change @ center)


def leave_one_out_scores(
    statistics: ClassStatistics, features: Tensor, labels: Tensor, *, penalty: float, intercept: bool = True
) -> Tensor:
    r"""Score examples by the whitened frame that would have been fitted without them, exactly and without refitting.

    Without example i of class c, :math:`e = x_i - x_c`, the covariance becomes :math:`S' = S + \gamma e e^\top` and the mean
    of class c moves by :math:`\mu e`, the centre by :math:`\delta e`: all in one direction, so that one solve with S serves
    (Sherman, Morrison). The divisor of the covariance and the absolute penalty stay. The scores (batch, num_classes),

    .. math:: (x_i - x')^\top S'^{-1} o'_k \,/\, \sqrt{o'^\top_k S'^{-1} o'_k},

    are the logits of the refitted head up to one number for each example, of a class of two rows or more.
    """
    check_frame(statistics, "whitened", penalty)
    counts, own = statistics.counts[labels], (torch.arange(len(labels)), labels)
    center = statistics.center if intercept else torch.zeros_like(statistics.center)
    offsets = statistics.means - center  # o: (num_classes, in_features)
    deviations = features.to(torch.float64) - statistics.means[labels]  # e: (batch, in_features)
    mean_move = -1.0 / (counts - 1.0)  # mu
    center_move = mean_move / len(offsets) if intercept else torch.zeros_like(mean_move)  # delta
    gamma = -counts / (counts - 1.0) / statistics.counts.sum()

    factor = torch.linalg.cholesky(penalized_covariance(statistics, penalty))
    solved_deviations = torch.cholesky_solve(deviations.T, factor).T  # S⁻¹ e
    solved_offsets = torch.cholesky_solve(offsets.T, factor).T  # S⁻¹ o
    e_e = (deviations * solved_deviations).sum(dim=1)  # eᵀ S⁻¹ e
    e_o = solved_deviations @ offsets.T  # eᵀ S⁻¹ o: (batch, num_classes)
    gain = (-gamma / (1.0 + gamma * e_e)).unsqueeze(1)  # S'⁻¹ = S⁻¹ + gain (S⁻¹ e)(S⁻¹ e)ᵀ

    # The example less the new centre is (1 - delta) e + o_c.
    e_example = (1.0 - center_move) * e_e + e_o[own]
    direction = (1.0 - center_move).unsqueeze(1) * solved_deviations + solved_offsets[labels]
    direction = direction + gain * e_example.unsqueeze(1) * solved_deviations  # S'⁻¹ of it

    # The new offset of class k is o_k - shift_k e.
    shift = center_move.unsqueeze(1).repeat(1, len(offsets))
    shift[own] -= mean_move
    products = direction @ offsets.T - shift * (direction * deviations).sum(dim=1, keepdim=True)
    squared_norms = (offsets * solved_offsets).sum(dim=1) - 2.0 * shift * e_o + shift**2 * e_e.unsqueeze(1)
    squared_norms = squared_norms + gain * (e_o - shift * e_e.unsqueeze(1)) ** 2
    return products / squared_norms.sqrt().clamp_min(TINY)


def nearest_mean_accuracy(statistics: ClassStatistics, features: Tensor, labels: Tensor) -> float:
    r"""Return the leave-one-out balanced accuracy of the nearest class mean on a sample; NaN where it cannot be known.

    Over the sampled classes with two rows or more. Without example i, the mean of its class of n rows lies
    :math:`n / (n - 1)` times as far from it.
    """
    usable = statistics.counts[labels] >= 2
    features, labels = features[usable].to(torch.float64), labels[usable]
    if len(labels) == 0:
        return math.nan
    distances = torch.cdist(features, statistics.means)
    own, counts = labels.unsqueeze(1), statistics.counts[labels].unsqueeze(1)
    distances.scatter_(1, own, distances.gather(1, own) * counts / (counts - 1.0))
    return mean_recall(distances.argmin(dim=1), labels)


def mean_recall(predicted: Tensor, labels: Tensor) -> float:
    """Return the balanced accuracy over the classes that occur."""
    rows = torch.bincount(labels)
    correct = torch.bincount(labels, weights=(predicted == labels).to(torch.float64))
    return float((correct[rows > 0] / rows[rows > 0]).mean())
