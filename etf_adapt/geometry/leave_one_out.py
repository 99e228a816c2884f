"""The closed form without one example at a time, exactly, and the penalty that is chosen by it.

In training, where features move on, ``heads.seen_rows`` leaves an example out of the mean of its class alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from etf_adapt.geometry.closed_form import TINY, check_frame
from etf_adapt.geometry.statistics import ClassStatistics

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # multiples of the covariance's mean eigenvalue
_SCORES, _CHUNK = 2**24, 2**21  # numbers of scores: of a sample, and at a time


class LeaveOneOut:
    r"""Scores examples by the whitened frame that would have been fitted without them, exactly and without refitting.

    Without example i of class c, :math:`e = x_i - x_c`, the covariance becomes :math:`S' = S + \gamma e e^\top` and the mean
    of class c moves by :math:`\mu e`, the centre by :math:`\delta e`: all in one direction, so that one solve with S serves
    (Sherman, Morrison). The divisor of the covariance and the absolute penalty stay. All is computed in the eigenvectors of
    S_w, found once, where a solve with any penalty is a division.
    """

    def __init__(self, statistics: ClassStatistics, *, intercept: bool = True) -> None:
        check_frame(statistics, "whitened", None)
        self.counts, self.intercept = statistics.counts, intercept
        self.values, self.basis = torch.linalg.eigh(statistics.within)
        self.means = statistics.means @ self.basis  # x_c: (num_classes, in_features)
        self.offsets = self.means - statistics.center @ self.basis if intercept else self.means  # o

    def scores(self, features: Tensor, labels: Tensor, *, penalty: float) -> Tensor:
        r"""Return :math:`(x_i - x')^\top S'^{-1} o'_k / \sqrt{o'^\top_k S'^{-1} o'_k}`: (batch, num_classes).

        These are the refitted head's logits up to one number for each example, of a class of two rows or more.
        """
        rows = max(1, _CHUNK // len(self.counts))
        chunks = zip(features.split(rows), labels.split(rows), strict=True)
        return torch.cat([self._scores(*chunk, penalty) for chunk in chunks])

    def _scores(self, features: Tensor, labels: Tensor, penalty: float) -> Tensor:
        counts, own = self.counts[labels], (torch.arange(len(labels)), labels)
        spectrum = self.values.clamp_min(0.0) + penalty * float(self.values.mean()) + TINY
        deviations = features.to(torch.float64) @ self.basis - self.means[labels]  # e: (batch, in_features)
        mean_move = -1.0 / (counts - 1.0)  # mu
        center_move = mean_move / len(self.offsets) if self.intercept else torch.zeros_like(mean_move)  # delta
        gamma = -counts / (counts - 1.0) / self.counts.sum()

        solved_deviations, solved_offsets = deviations / spectrum, self.offsets / spectrum  # S⁻¹ e, S⁻¹ o
        e_e = (deviations * solved_deviations).sum(dim=1)  # eᵀ S⁻¹ e
        e_o = solved_deviations @ self.offsets.T  # eᵀ S⁻¹ o: (batch, num_classes)
        gain = (-gamma / (1.0 + gamma * e_e)).unsqueeze(1)  # S'⁻¹ = S⁻¹ + gain (S⁻¹ e)(S⁻¹ e)ᵀ

        # The example less the new centre is (1 - delta) e + o_c.
        e_example = (1.0 - center_move) * e_e + e_o[own]
        direction = (1.0 - center_move).unsqueeze(1) * solved_deviations + solved_offsets[labels]
        direction = direction + gain * e_example.unsqueeze(1) * solved_deviations  # S'⁻¹ of it

        # The new offset of class k is o_k - shift_k e.
        shift = center_move.unsqueeze(1).repeat(1, len(self.offsets))
        shift[own] -= mean_move
        products = direction @ self.offsets.T - shift * (direction * deviations).sum(dim=1, keepdim=True)
        squared_norms = (self.offsets * solved_offsets).sum(dim=1) - 2.0 * shift * e_o + shift**2 * e_e.unsqueeze(1)
        squared_norms = squared_norms + gain * (e_o - shift * e_e.unsqueeze(1)) ** 2
        return products / squared_norms.sqrt().clamp_min(TINY)


def usable_sample(statistics: ClassStatistics, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the examples that can be left out, of classes of two rows or more; where classes are many every n-th of them."""
    usable = torch.nonzero(statistics.counts[labels] >= 2)[:, 0]
    usable = usable[:: max(1, -(-len(usable) * len(statistics.counts) // _SCORES))]
    return features[usable], labels[usable]


def choose_penalty(
    statistics: ClassStatistics,
    features: Tensor,
    labels: Tensor,
    *,
    intercept: bool = True,
    penalties: Iterable[float] = PENALTIES,
) -> tuple[float, float]:
    """Choose the penalty of the whitened frame, of ``penalties``: the best leave-one-out balanced accuracy on a sample.

    Returns the penalty (of equally good ones the largest) and its accuracy, over the sampled classes with two rows or more;
    1 and NaN where there is no such class.
    """
    features, labels = usable_sample(statistics, features, labels)
    if len(labels) == 0:
        return 1.0, math.nan
    left_out, accuracies = LeaveOneOut(statistics, intercept=intercept), {}
    rows = torch.bincount(labels)
    for penalty in penalties:
        is_right = left_out.scores(features, labels, penalty=penalty).argmax(dim=1) == labels
        correct = torch.bincount(labels, weights=is_right.to(torch.float64))
        accuracies[penalty] = float((correct / rows)[rows > 0].mean())
    best = max(accuracies, key=lambda penalty: (accuracies[penalty], penalty))
    return best, accuracies[best]
