"""The losses by name: functions of stock logits and labels, made from the settings that stand in ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.errors import check_choice
from etf_adapt.losses.dot_regression import dot_regression_loss, margin_dot_regression_loss
from etf_adapt.losses.softmax import effective_number_weights, ldam_loss, logit_adjusted_loss
from etf_adapt.losses.terms import require_counts

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Entry:
    """A loss, the options that its settings may give, and whether it knows class counts: no, where given, or always."""

    function: Callable[..., Tensor]
    options: tuple[str, ...]
    counts: Literal["unused", "optional", "needed"] = "unused"


LOSSES: Mapping[str, _Entry] = {
    "dot_regression": _Entry(
        dot_regression_loss, ("form", "target", "balance", "unit_features", "class_weights", "label_smoothing")
    ),
    "margin_dot_regression": _Entry(
        margin_dot_regression_loss,
        ("margin", "temperature", "prior_strength", "form", "huber", "class_weights", "label_smoothing"),
        counts="optional",
    ),
    "cross_entropy": _Entry(F.cross_entropy, ("scale", "label_smoothing")),
    "logit_adjusted": _Entry(logit_adjusted_loss, ("scale", "tau", "label_smoothing"), counts="needed"),
    "ldam": _Entry(ldam_loss, ("scale", "max_margin", "class_weights", "label_smoothing"), counts="needed"),
}

LOSS_NAMES = tuple(LOSSES)


def make_loss(settings: Mapping[str, Any], *, class_counts: Sequence[int] | None = None) -> Loss:
    """Build a loss of ``(logits, labels)`` from its settings, as they stand in a model's ``config.json``.

    Args:
        settings: ``{"name": ...}``, one of ``LOSS_NAMES``, and options of that loss by the names of its function's
            arguments. Besides these, the cross-entropies take ``scale`` (factor of the logits, 1 by default);
            ``"dot_regression"`` takes ``unit_features`` (True: the logits are those of a unit feature with unit rows, as in
            the paper, so that its length is one); and ``class_weights`` is ``"effective_number"``.
        class_counts: Training rows of each class; needed by logit adjustment and LDAM, and even where None for
            ``"margin_dot_regression"``.

    Returns:
        Function of logits (batch, num_classes) and labels that returns a scalar tensor.

    Raises:
        ValueError: The name or an option is unknown, or the class counts are missing.

    Example:
        >>> loss = make_loss({"name": "dot_regression", "form": "sphere"})
        >>> loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1])).item()
        0.0
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
    if "class_weights" in options:
        check_choice("class_weights", options["class_weights"], ("effective_number",))
        options["class_weights"] = effective_number_weights(require_counts(class_counts, name))
    if entry.counts == "needed" or (entry.counts == "optional" and class_counts is not None):
        options["class_counts"] = require_counts(class_counts, name)
    function = partial(entry.function, **options)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if unit_features:
            num_classes = logits.shape[-1]
            return function(precise, labels, lengths=precise.new_tensor(math.sqrt(num_classes / (num_classes - 1))))
        return function(precise if scale == 1.0 else scale * precise, labels)

    num_classes = 2 if class_counts is None else len(class_counts)
    with torch.device("cpu"):
        loss(torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64))  # values that cannot be are named now
    return loss
