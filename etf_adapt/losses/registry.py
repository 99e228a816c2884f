"""The losses by name: functions of stock logits and labels, made from the settings that stand in ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etf_adapt.errors import check_choice
from etf_adapt.losses.dot_regression import dot_regression_loss, margin_dot_regression_loss
from etf_adapt.losses.softmax import cross_entropy_loss, focal_loss, logit_adjusted_loss

Loss = Callable[[Tensor, Tensor], Tensor]


class _Entry(NamedTuple):
    function: Callable[..., Tensor]
    options: tuple[str, ...]  # arguments of the function, ``scale`` and ``unit_features`` (see ``make_loss``)
    class_counts: str  # "unused", "optional" or "needed"


_WEIGHTED = ("class_weights", "label_smoothing")
LOSSES: Mapping[str, _Entry] = {
    "dot_regression": _Entry(dot_regression_loss, ("form", "target", "balance", "unit_features", *_WEIGHTED), "unused"),
    "margin_dot_regression": _Entry(
        margin_dot_regression_loss, ("margin", "temperature", "prior_strength", *_WEIGHTED), "optional"
    ),
    "cross_entropy": _Entry(cross_entropy_loss, ("scale", *_WEIGHTED), "unused"),
    "focal": _Entry(focal_loss, ("scale", "gamma", *_WEIGHTED), "unused"),
    "logit_adjusted": _Entry(logit_adjusted_loss, ("scale", "tau", "label_smoothing"), "needed"),
}
LOSS_NAMES = tuple(LOSSES)


def make_loss(settings: Mapping[str, Any], *, class_counts: Sequence[int] | None = None) -> Loss:
    """Build a loss of ``(logits, labels)`` from its settings: ``{"name": ...}``, one of ``LOSS_NAMES``, and its options.

    Beside the arguments of the loss's function, cross-entropies take ``scale`` (factor of the logits, 1 by default), and dot
    regression ``unit_features`` (True: the logits are those of unit features and unit class vectors, as in the paper).
    ``class_weights`` are numbers (num_classes,), or ``"balanced"``: n / (K n_c), as in scikit-learn. They and logit adjustment
    need ``class_counts`` (training rows of each class); margin dot regression takes even priors without them.
    """
    options = dict(settings)
    name = options.pop("name", None)
    check_choice("name", name, LOSS_NAMES)
    entry = LOSSES[name]
    if unknown := sorted(set(options) - set(entry.options)):
        raise ValueError(
            f"Loss {name!r} has no option {unknown[0]!r}; its options are {', '.join(sorted(entry.options))}."
        )
    scale = float(options.pop("scale", 1.0))
    unit_features = bool(options.pop("unit_features", False))
    if entry.class_counts == "needed" or (entry.class_counts == "optional" and class_counts is not None):
        options["class_counts"] = _checked_counts(class_counts, repr(name))
    if (weights := options.pop("class_weights", None)) is not None:
        options["class_weights"] = _checked_weights(weights, class_counts)
    function = partial(entry.function, **options)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if unit_features:
            num_classes = logits.shape[-1]
            return function(precise, labels, lengths=precise.new_tensor(math.sqrt(num_classes / (num_classes - 1))))
        return function(precise if scale == 1.0 else scale * precise, labels)

    num_classes = len(class_counts if class_counts is not None else options.get("class_weights", (1, 1)))
    with torch.device("cpu"):
        loss(torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64))  # refuses wrong values of options now
    return loss


def _checked_weights(weights: str | Sequence[float], class_counts: Sequence[int] | None) -> Tensor:
    if isinstance(weights, str):
        check_choice("class_weights", weights, ("balanced",))
        counts = _checked_counts(class_counts, f"class_weights={weights!r}").double()
        return (counts.mean() / counts).float()
    tensor = torch.as_tensor(weights, dtype=torch.float32)
    is_fit = tensor.ndim == 1 and (class_counts is None or len(tensor) == len(class_counts))
    if not is_fit or not bool((tensor >= 0).all() and tensor.isfinite().all() and tensor.any()):
        raise ValueError(f"`class_weights` (={weights!r}) must be 'balanced' or a number of at least 0 for each class.")
    return tensor


def _checked_counts(class_counts: Sequence[int] | None, reader: str) -> Tensor:
    if class_counts is None:
        raise ValueError(f"`class_counts` (=None) is needed by {reader}: pass the training rows of each class.")
    counts = torch.as_tensor(class_counts)
    empty = int(counts.argmin())
    if counts[empty] <= 0:
        raise ValueError(
            f"`class_counts[{empty}]` (={counts[empty].item()}) must be positive: drop the class or give it a row."
        )
    return counts
