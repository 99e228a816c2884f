"""Quantized backbones: the layer that makes the logits is left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

from etf_adapt.models.swap import find_heads

_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # what each kind calls them


def spare_heads(
    settings: Any, auto_model: Any, config: PreTrainedConfig, *, head_path: str | Sequence[str] | None = None
) -> Any:
    """Return a copy of a quantization configuration (or of its arguments) that spares a model's classification layers too."""
    # transformers spares the layer of a model's last parameter, and so only heads without a bias: of a `classifier.bias` it
    # looks for a layer of that name (`get_keys_to_not_convert`, as of transformers 5.24).
    spared = AutoQuantizationConfig.from_dict(dict(settings)) if isinstance(settings, Mapping) else deepcopy(settings)
    name = next((name for name in _SKIPPED if hasattr(spared, name)), None)
    if name is not None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = auto_model.from_config(deepcopy(config))
        before = getattr(spared, name)
        usual = get_keys_to_not_convert(model) if before is None else before
        setattr(spared, name, [*usual, *find_heads(model, head=head_path)])
    return spared
