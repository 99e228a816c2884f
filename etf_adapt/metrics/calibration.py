"""What is fitted on held-out rows after training: the logit scale, and an adjustment by the class prior."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etf_adapt.losses.terms import log_prior

FACTORS = (2.0**-6, 2.0**10)  # bounds of the factor of the logits

_CHUNK = 2**17  # logits that are computed in float64 at once: a part of a core's cache
_SAMPLE = 2**22  # logits on which the fit begins


def fit_logit_scale(logits: Tensor, labels: Tensor) -> float:
    """Fit the factor s = 1/T of the logits, within ``FACTORS``, by held-out likelihood; 1.0 without rows."""
    # Guo et al. 2017, https://arxiv.org/abs/1706.04599
    weights, prior = torch.ones(logits.shape[1]).double(), torch.zeros(logits.shape[1]).double()
    return _fit(logits, labels, weights, prior, strengths=(0.0, 0.0))[0]


def fit_prior_adjustment(logits: Tensor, labels: Tensor, class_counts: Tensor | Sequence[int]) -> tuple[float, float]:
    r"""Fit factor s and strength t >= 0 of ``s logits - t log prior`` on held-out rows, each class weighted alike.

    With s = t = 1 it is the adjustment of Menon et al. (2021, https://arxiv.org/abs/2007.07314) after cross-entropy; a loss or
    head that has seen the prior leaves less to do, so t is fitted. (1, 0) without rows.
    """
    return fit_balanced(logits, labels, class_counts, min_rows=1)[:2]


def fit_balanced(
    logits: Tensor, labels: Tensor, class_counts: Tensor | Sequence[int] | None = None, *, min_rows: int = 5
) -> tuple[float, float, float]:
    """Fit s, and with class counts t, as ``fit_prior_adjustment`` does; return them and the class-balanced log loss reached."""
    # Classes with few rows share their weight: the loss of one row alone is mostly chance.
    rows = torch.bincount(labels, minlength=logits.shape[1]).double()
    small = (rows > 0) & (rows < min_rows)
    rows[small] = rows[small].mean()
    weights = len(labels) / ((rows > 0).sum() * rows.clamp_min(1e-9))  # their sum over the rows is their number
    prior = torch.zeros(logits.shape[1]).double()
    if class_counts is not None:
        prior = log_prior(class_counts, logits[:0].double())
    return _fit(logits, labels, weights, prior, strengths=(0.0, 0.0 if class_counts is None else math.inf))


def _fit(
    logits: Tensor, labels: Tensor, weights: Tensor, prior: Tensor, strengths: tuple[float, float]
) -> tuple[float, float, float]:
    """Minimise ``_loss`` over log s and t: s, t and the loss, found exactly, as the loss is convex in (s, t)."""
    from scipy.optimize import minimize

    if len(labels) == 0:
        return 1.0, 0.0, math.nan

    def minimum(start: NDArray[np.float64], *data: Tensor) -> NDArray[np.float64]:
        bounds = (math.log(FACTORS[0]), math.log(FACTORS[1])), strengths
        options = {"ftol": 1e-15, "gtol": 1e-8}  # finer than that, sums over many rows are noise
        found = minimize(_loss, start, data, method="L-BFGS-B", jac=True, bounds=bounds, options=options)
        return np.asarray(found.x)

    # Far from the minimum the loss is flat in log s (small s) or a straight line in s (rows all sure): start near it, which
    # every n-th row tells.
    step = -(-logits.numel() // _SAMPLE)
    sample, whole = (logits[::step], labels[::step], weights, prior), (logits, labels, weights, prior)
    starts = [np.array([exponent * math.log(2.0), 0.0]) for exponent in range(-6, 11, 2)]
    start = min(starts, key=lambda point: _loss(point, *sample)[0])
    if step > 1:
        start = min(start, minimum(start, *sample), key=lambda point: _loss(point, *whole)[0])
    found = minimum(start, *whole)
    factor, strength = float(np.exp(found[0]).clip(*FACTORS)), float(found[1])
    return factor, strength, float(_loss(found, *whole)[0])


def _loss(
    point: NDArray[np.float64], logits: Tensor, labels: Tensor, weights: Tensor, prior: Tensor
) -> tuple[float, NDArray[np.float64]]:
    r"""Return the loss at (log s, t), averaged over the rows, and its gradient (2,).

    .. math:: L = -\frac{1}{n} \sum_{i=1}^n \Bigl( w_{y_i} \log p_{i y_i} + \frac{1}{nK} \sum_k \log p_{ik} \Bigr),
        \qquad p_i = \mathrm{softmax}(s\,u_i - t \log \pi)
    """
    # The second term is one row of uniform label: n rows that are all right say that errors are rarer than one in n, not
    # that none occur; without it their best factor is infinite.
    factor, strength = math.exp(point[0]), float(point[1])
    rows, num_classes = logits.shape
    value, by_factor, by_strength, chunk = 0.0, 0.0, 0.0, max(1, _CHUNK // num_classes)
    uniform, sums = 1.0 / (rows * num_classes), torch.stack([torch.ones_like(prior), prior], dim=1)
    for part, own in zip(logits.split(chunk), labels.split(chunk), strict=True):
        part, each, own_weight = part.double(), torch.arange(len(own)), weights[own]
        weight = own_weight + 1.0 / rows  # of the row and its share of the uniform one
        scores = factor * part - strength * prior
        scores -= scores.amax(dim=1, keepdim=True)
        value -= float(own_weight @ scores[each, own] + uniform * scores.sum())
        powers = scores.exp_()
        totals, priors = (powers @ sums).unbind(dim=1)
        value += float(weight @ totals.log())
        of_labels = own_weight * part[each, own] + uniform * part.sum(dim=1)
        by_factor += float((weight * powers.mul_(part).sum(dim=1) / totals - of_labels).sum())
        by_strength -= float((weight * priors / totals - own_weight * prior[own] - uniform * prior.sum()).sum())
    return value / rows, np.array([by_factor * factor, by_strength]) / rows
