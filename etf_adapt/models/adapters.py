"""Adapters of peft (LoRA and its relatives) in a model's backbone; the head stays as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from etf_adapt.heads.in_model import head_modules, seeded_torch
from etf_adapt.models.pooling import MeanPoolingForSequenceClassification as MeanPooling
from etf_adapt.models.weights import new_weights

# LoRA of Hu et al. (2021), https://arxiv.org/abs/2106.09685, of rank 16, its updates counted twice.
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}


def add_adapters(model: nn.Module, config: str | Path | Mapping[str, Any] = "lora", *, seed: int = 0) -> list[str]:
    """Put trainable adapters into a backbone's layers, in place, and fix all else but a head that learns; return their paths.

    ``config`` is ``"lora"``, the arguments of one of peft's configurations with their ``peft_type``, or a JSON file of these.
    ``target_modules`` are by default all linear layers; without any, all convolutions that are not grouped. The model keeps
    its class; ``save_pretrained`` merges the adapters, and a training checkpoint holds backbone and adapters apart.
    """
    try:
        import peft
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as error:
        raise ImportError(f'Adapters need a further package ({error}): pip install "etf_adapt[peft]".') from error
    heads = head_modules(model)
    if not heads:
        raise ValueError("`model` has no head made by etf_adapt: call swap_head(model, num_classes) first.")
    if has_adapters(model):
        raise ValueError("`model` has adapters already: call merge_adapters(model) first.")
    settings = _read(config)
    if settings.get("modules_to_save"):
        raise ValueError("`modules_to_save` would copy layers: leave it out, a head that learns is trained anyway.")
    # Layers that the model's file had no weights for, such as the one that RoBERTa's class puts before the head, are trained as
    # a whole: random ones would stay random under an adapter.
    new = new_weights(model)
    fixed = list(heads)
    for path, module in model.named_modules():
        is_new = bool(parameters := set(module.parameters())) and parameters <= set(new.values())
        is_unread = isinstance(model, MeanPooling) and path.startswith("encoder.pooler")
        if is_new or is_unread:
            fixed.append(path)
    if settings.get("target_modules") is None:
        settings["target_modules"] = targets = _default_targets(model, fixed)
        if settings["peft_type"] == "LORA" and any(isinstance(model.get_submodule(path), Conv1D) for path in targets):
            settings.setdefault("fan_in_fan_out", True)
    settings["inference_mode"] = False  # peft writes True into what it saves
    modes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        wanted = peft.get_peft_config(settings)
        if hasattr(wanted, "exclude_modules") and not isinstance(wanted.exclude_modules, str):
            wanted.exclude_modules = [*(wanted.exclude_modules or []), *fixed]
        with seeded_torch(seed):
            peft.inject_adapter_in_model(wanted, model)
        reached = [path for path, head in heads.items() if model.get_submodule(path) is not head]
        if reached:
            raise ValueError(f"`target_modules` reaches the head `{reached[0]}`, which stays as it is: leave it out.")
    # What peft raises at mistakes.
    except (TypeError, KeyError, AttributeError, ValueError, NotImplementedError) as error:
        _take_out(model)
        for parameter, was_trained in modes:
            parameter.requires_grad_(was_trained)
        raise ValueError(f"`config` (={config!r}) is no configuration for this model: {error}") from error
    cast_adapter_dtype(model, adapter_name="default")  # adapters are trained in float32 whatever the backbone is
    for parameter in new.values():
        parameter.requires_grad_(True)
    for head in heads.values():
        head.fix()
    return list(_adapted(model))


def merge_adapters(model: nn.Module) -> list[str]:
    """Fold the adapters of a model into the layers that they adapt, in place; return the paths of these."""
    adapted = _adapted(model)
    for layer in adapted.values():
        layer.merge(safe_merge=True)
    _take_out(model)
    return list(adapted)


def _take_out(model: nn.Module) -> None:
    """Put adapted layers back into the places of their adapters, innermost first."""
    for path, layer in reversed(_adapted(model).items()):
        model.set_submodule(path, layer.get_base_layer())
    with suppress(AttributeError):
        del model.peft_config


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model holds adapters that are not merged."""
    return bool(_adapted(model))


def _adapted(model: nn.Module) -> dict[str, Any]:
    if "peft" not in sys.modules:  # nobody can have made one
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _read(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if config == "lora":
        return dict(LORA)
    settings: Any = config
    if not isinstance(config, Mapping):
        try:
            settings = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`peft` (={str(config)!r}) is neither 'lora' nor a JSON file: {error}") from error
    if not isinstance(settings, Mapping) or "peft_type" not in settings:
        raise ValueError(f"`peft` (={str(config)!r}) names no `peft_type`, such as LORA.")
    return {**settings, "peft_type": str(settings["peft_type"]).upper()}


def _default_targets(model: nn.Module, fixed: Sequence[str]) -> list[str]:
    """Return the paths of all linear layers, or of all convolutions that are not grouped where there are none."""
    layers = [(path, module) for path, module in model.named_modules() if path not in fixed]
    linear = [path for path, module in layers if isinstance(module, (nn.Linear, Conv1D))]
    return linear or [path for path, module in layers if isinstance(module, nn.Conv2d) and module.groups == 1]
