"""What is fitted on held-out rows after training: a factor that makes confidences fair, and an adjustment by the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.losses.terms import log_prior

_EXPONENTS = torch.arange(-6.0, 10.01, 0.25, dtype=torch.float64)  # factors from 1/64 to 1024
_CHUNK = 4096
_NEWTON_STEPS, _SHORTENINGS = 50, 25
_TINY = 1e-10


class TemperatureFit:
    r"""Fit the factor s of the logits that minimises the negative log-likelihood of held-out rows.

    .. math:: \min_{s > 0} \; -\sum_{i=1}^n \log \mathrm{softmax}(s\,u_i)_{y_i}
        - \frac{1}{nK} \sum_{i,k} \log \mathrm{softmax}(s\,u_i)_k

    the temperature scaling of Guo et al. with s = 1/T, and one row more whose label is any class alike: n rows that are all
    right say that errors are rarer than one in n, not that there are none, and without it their best factor is infinite.
    The likelihood is summed on a grid of factors, four an octave, so that no logits are kept; it is convex in s, and a
    parabola through the best three points gives the minimum between them. The factor changes no argmax.

    References:
        Guo et al. (2017). On Calibration of Modern Neural Networks. https://arxiv.org/abs/1706.04599

    Example:
        >>> fit = TemperatureFit()
        >>> fit.add_batch(10.0 * torch.eye(2).repeat(10, 1), torch.tensor([0, 1] * 9 + [1, 0]))
        >>> 0.15 < fit.factor() < 0.25  # 18 of 20 right: odds of 9, whose logarithm is 2.2
        True
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, len(_EXPONENTS), dtype=torch.float64)  # of the labels, and of the uniform label
        self.rows = 0

    def add_batch(self, logits: Tensor, labels: Tensor) -> None:
        """Add rows: logits (batch, num_classes) and labels (batch,)."""
        precise = logits.detach().float()
        for index, factor in enumerate((2.0**_EXPONENTS).tolist()):
            logs = F.log_softmax(factor * precise, dim=-1)
            true, uniform = F.nll_loss(logs, labels, reduction="sum"), -logs.mean(dim=-1).sum()
            self.sums[:, index] += torch.stack([true, uniform]).double().cpu()
        self.rows += len(labels)

    def factor(self) -> float:
        """Return the factor of least negative log-likelihood, from 1/64 to 1024; 1.0 where no row was added."""
        if self.rows == 0:
            return 1.0
        losses = self.sums[0] + self.sums[1] / self.rows
        best = int(losses.argmin())
        exponent = float(_EXPONENTS[best])
        if 0 < best < len(_EXPONENTS) - 1:
            before, here, after = losses[best - 1 : best + 2].tolist()
            curvature = before - 2.0 * here + after
            if curvature > 0.0:
                exponent += 0.25 * 0.5 * (before - after) / curvature
        return float(2.0**exponent)


def fit_prior_adjustment(logits: Tensor, labels: Tensor, class_counts: Tensor | Sequence[int]) -> tuple[float, float]:
    r"""Fit the factor s of the logits and the strength t of an adjustment by the prior, on held-out rows.

    .. math:: \min_{s, t} \; -\sum_c \frac{1}{C n_c} \sum_{i : y_i = c} \log \mathrm{softmax}(s\,u_i - t \log \pi)_c

    with :math:`\pi` the class frequencies of the training rows and C the number of classes that have held-out rows, each of
    which counts once: what is wanted where all classes matter alike. With :math:`s = t = 1` it is the adjustment of
    Menon et al. after training by cross-entropy; a loss or a head that has seen the prior leaves less to do, so its strength
    is fitted. One row of uniform label is added as in ``TemperatureFit``. The problem is convex and is solved by Newton steps.

    Args:
        logits: Tensor (batch, num_classes) of held-out rows.
        labels: Their classes (batch,).
        class_counts: Training rows of each class (num_classes,), all positive.

    Returns:
        Factor s, from 1/64 to 1024, and strength t, at least 0; (1, 0) where there are no rows.

    References:
        Menon et al. (2021). Long-tail learning via logit adjustment. https://arxiv.org/abs/2007.07314

    Example:
        >>> logits = torch.log(torch.tensor([[0.9, 0.1], [0.6, 0.4]])).repeat(50, 1)
        >>> factor, strength = fit_prior_adjustment(logits, torch.tensor([0, 1] * 50), [90, 10])
        >>> (factor * logits - strength * torch.log(torch.tensor([0.9, 0.1])))[:2].argmax(dim=1).tolist()
        [0, 1]
    """
    if len(labels) == 0:
        return 1.0, 0.0
    num_classes = logits.shape[1]
    prior = log_prior(class_counts, logits.double())
    rows = torch.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((rows > 0).sum() * rows.clamp_min(1).double())  # their sum over the rows is their number
    least, most = torch.tensor([[2.0**-6, 0.0], [2.0**10, math.inf]], dtype=torch.float64)

    def shorten(step: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Shorten a step from the point, cut off at the bounds, until it leads down."""
        for shortenings in range(_SHORTENINGS):
            moved = torch.clamp(point - 0.25**shortenings * step, least, most)
            found = _adjusted_loss(moved, logits, labels, prior, weights)
            if found[0] < value:
                break
        return moved, found

    # Where all rows are sure of themselves the loss is a straight line, of which Newton's steps know nothing.
    starts = [torch.tensor([2.0**exponent, 0.0], dtype=torch.float64) for exponent in range(-6, 11, 2)]
    point = min(starts, key=lambda start: float(_adjusted_loss(start, logits, labels, prior, weights)[0]))
    value, gradient, curvature = _adjusted_loss(point, logits, labels, prior, weights)
    one = torch.eye(2, dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        both = torch.linalg.solve(curvature + _TINY * (1.0 + curvature.trace()) * one, gradient)
        moved, found = shorten(both)
        if value - found[0] < 0.1 * torch.dot(gradient, both):
            # A bound lies in the way, and what is left of the step may lead uphill: then one of the two moves alone.
            alone = gradient / curvature.diagonal().clamp_min(_TINY)
            tried = [(moved, found), *(shorten(alone * direction) for direction in one)]
            moved, found = min(tried, key=lambda end: float(end[1][0]))
        gain = value - found[0]
        if gain > 0.0:
            point, (value, gradient, curvature) = moved, found
        if gain <= _TINY * value.abs():
            break
    return float(point[0]), float(point[1])


def _adjusted_loss(
    point: Tensor, logits: Tensor, labels: Tensor, prior: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the objective of ``fit_prior_adjustment`` at (s, t), its gradient (2,) and its second derivatives (2, 2)."""
    value, gradient = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    curvature = torch.zeros(2, 2, dtype=torch.float64)
    for own, classes in zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True):
        inputs = torch.stack([own.double(), -prior.expand_as(own)])  # (2, rows, num_classes): what s and t multiply
        logs = F.log_softmax(torch.tensordot(point, inputs, dims=1), dim=1)
        target = torch.full_like(logs, 1.0 / (len(labels) * logs.shape[1]))
        target[torch.arange(len(classes)), classes] += weights[classes]
        mass, probability = target.sum(dim=1, keepdim=True), logs.exp()
        mean = (inputs * probability).sum(dim=2, keepdim=True)
        value -= (target * logs).sum()
        gradient += (inputs * (mass * probability - target)).sum(dim=(1, 2))
        centred = inputs - mean
        curvature += torch.einsum("ark,brk,rk->ab", centred, centred, mass * probability)
    return value, gradient, curvature
