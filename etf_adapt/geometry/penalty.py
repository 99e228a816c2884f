"""The penalty of the whitened frame, chosen by exact leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from etf_adapt.geometry.leave_one_out import LeaveOneOut, in_chunks, mean_recall, usable_sample
from etf_adapt.geometry.statistics import ClassStatistics

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # multiples of the covariance's mean eigenvalue


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
    for penalty in penalties:
        chunks = in_chunks(statistics, features, labels)
        predicted = [left_out.scores(*some, penalty=penalty).argmax(dim=1) for some in chunks]
        accuracies[penalty] = mean_recall(torch.cat(predicted), labels)
    best = max(accuracies, key=lambda penalty: (accuracies[penalty], penalty))
    return best, accuracies[best]
