"""What speaks against the settings of a run, from its class counts and its first alignment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from etf_adapt.results.tables import percent

COARSE_ERROR = 0.02  # standard error of a validation balanced accuracy from which it can hardly tell settings apart


def advise(
    result: Mapping[str, Any],
    *,
    class_counts: Sequence[int] | np.ndarray,
    in_features: int,
    validation_counts: Sequence[int] | np.ndarray | None = None,
) -> list[str]:
    """Return what speaks against the settings of a run, from its class counts and the first alignment: reason and remedy.

    Example:
        >>> result = {"penalties": (1.0,), "balanced_accuracy": 0.7}
        >>> advise(result, class_counts=[90, 80], in_features=8)
        ['the classes are nearly even (1.1 : 1): a linear head (--head linear --loss cross_entropy) is likely as good']
    """
    from etf_adapt.data.long_tail import EVEN_IMBALANCE  # late: these import frameworks
    from etf_adapt.geometry.leave_one_out import PENALTIES

    counts = np.asarray(class_counts)
    advice = []
    imbalance = counts.max() / max(counts.min(), 1)
    if imbalance < EVEN_IMBALANCE:
        advice.append(
            f"the classes are nearly even ({imbalance:.2g} : 1): a linear head (--head linear --loss cross_entropy) is likely "
            "as good"
        )
    if len(counts) - 1 > in_features:
        advice.append(
            f"{len(counts):,} classes do not fit {in_features:,} dimensions (one less than the classes are needed): no feature "
            "reaches its vertex, only the nearest cosine; a wider backbone has room"
        )
    alone = int((counts == 1).sum())
    if alone:
        advice.append(
            f"{alone:,} class{'es have' if alone > 1 else ' has'} a single training row: what such a row teaches is its own "
            "feature, and no figure before training knows these classes; a second row each helps most"
        )
    penalty = next(iter(result["penalties"]), None)
    if penalty is not None and result["balanced_accuracy"] is not None and penalty in (PENALTIES[0], PENALTIES[-1]):
        smallest = (
            f"the smallest penalty ({penalty:g}) was the best: the classes differ in directions in which the features hardly "
            "vary; --frame_penalty sets a smaller one"
        )
        greatest = (
            f"the greatest penalty ({penalty:g}) was the best: the head is the class means as they are, since the rows are too "
            "few to tell how features vary within a class, or these directions matter alike"
        )
        advice.append(smallest if penalty == PENALTIES[0] else greatest)
    error = _standard_error(result["balanced_accuracy"], validation_counts)
    if error >= COARSE_ERROR:
        advice.append(
            f"the validation rows tell balanced accuracies apart to about ±{percent(2 * error)} points (two standard errors): "
            "do not choose settings by smaller differences; a larger validation_fraction or several seeds tell more"
        )
    return advice


def _standard_error(accuracy: float | None, counts: Sequence[int] | np.ndarray | None) -> float:
    r"""Return the standard error of a balanced accuracy over K classes of n_c rows; 0 where it is unknown.

    .. math:: \frac1K \sqrt{\sum_c \frac{p (1 - p)}{n_c}}, \quad p \text{ the accuracy}
    """
    held = np.asarray([] if counts is None else counts)
    held = held[held > 0]
    if accuracy is None or not len(held):
        return 0.0
    return math.sqrt(accuracy * (1.0 - accuracy) * float((1.0 / held).sum())) / len(held)
