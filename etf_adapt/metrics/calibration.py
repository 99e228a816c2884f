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

_CHUNK = 256  # rows that are computed in float64 at once


def fit_logit_scale(logits: Tensor, labels: Tensor) -> float:
    """Fit the factor s = 1/T of the logits by held-out likelihood (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Within ``FACTORS``; 1.0 without rows. Logits (rows, num_classes), labels (rows,).
    """
    weights, prior = torch.ones(logits.shape[1]).double(), torch.zeros(logits.shape[1]).double()
    return _fit(logits, labels, weights, prior, strengths=(0.0, 0.0))[0]


def fit_prior_adjustment(logits: Tensor, labels: Tensor, class_counts: Tensor | Sequence[int]) -> tuple[float, float]:
    r"""Fit factor s and strength t >= 0 of ``s logits - t log prior`` on held-out rows, each class weighted alike.

    With s = t = 1 it is the adjustment of Menon et al. (2021, https://arxiv.org/abs/2007.07314) after cross-entropy; a loss or
    head that has seen the prior leaves less to do, so t is fitted. (1, 0) without rows.
    """
    rows = torch.bincount(labels, minlength=logits.shape[1])
    weights = len(labels) / ((rows > 0).sum() * rows.clamp_min(1).double())  # their sum over the rows is their number
    return _fit(logits, labels, weights, log_prior(class_counts, logits.double()), strengths=(0.0, math.inf))


def _fit(
    logits: Tensor, labels: Tensor, weights: Tensor, prior: Tensor, strengths: tuple[float, float]
) -> tuple[float, float]:
    """Minimise ``_loss`` over log s and t; both are found exactly, as the loss is convex in (s, t)."""
    from scipy.optimize import minimize

    if len(labels) == 0:
        return 1.0, 0.0
    data = logits, labels, weights, prior
    bounds = (math.log(FACTORS[0]), math.log(FACTORS[1])), strengths
    # Far from the minimum the loss is flat in log s (small s) or a straight line in s (rows all sure): start near it.
    starts = [np.array([exponent * math.log(2.0), 0.0]) for exponent in range(-6, 11, 2)]
    start = min(starts, key=lambda point: _loss(point, *data)[0])
    options = {"ftol": 1e-15, "gtol": 1e-10}
    found = minimize(_loss, start, data, method="L-BFGS-B", jac=True, bounds=bounds, options=options)
    return float(np.exp(found.x[0]).clip(*FACTORS)), float(found.x[1])


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
    value, by_factor, by_strength = 0.0, 0.0, 0.0
    for part, own in zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True):
        part = part.double()
        logs = torch.log_softmax(factor * part - strength * prior, dim=1)
        target = torch.full_like(logs, 1.0 / (rows * num_classes))
        target[torch.arange(len(own)), own] += weights[own]
        value -= float((target * logs).sum())
        slope = logs.exp() * target.sum(dim=1, keepdim=True) - target  # derivative by the scores (rows, num_classes)
        by_factor += float((slope * part).sum())
        by_strength -= float((slope @ prior).sum())
    return value / rows, np.array([by_factor * factor, by_strength]) / rows
