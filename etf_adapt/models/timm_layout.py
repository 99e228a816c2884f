"""timm's folder layout and what timm alone knows of its models: their configuration, data configuration and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import filter_pretrained_cfg
from torch import Tensor
from transformers import TimmWrapperConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from etf_adapt.models.names import ENTRY, UnavailableError

NOTE = f"{ENTRY}: "

# Arguments that timm builds a model with only where it loads weights by itself, which transformers' wrapper never lets it.
ARGS_OF_WEIGHTS = {"fbnetc_100": {"bn_eps": 1e-3}}


def timm_config(name: str) -> TimmWrapperConfig:
    """Return the configuration of a model in timm's registry, as its folder on the Hub has it."""
    try:
        known: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"`pretrained_model_name_or_path` (='timm/{name}'): {error} See timm.list_models.") from error
    settings = filter_pretrained_cfg(known.to_dict(), remove_source=True, remove_null=True)
    settings.pop("architecture", None)
    labels = [f"LABEL_{index}" for index in range(known.num_classes)]
    config = {"architecture": name.split(".")[0], "num_classes": known.num_classes, "label_names": labels}
    model_args = ARGS_OF_WEIGHTS.get(str(config["architecture"]))
    return TimmWrapperConfig.from_dict({**config, "pretrained_cfg": settings, "model_args": model_args})


def data_config(config: TimmWrapperConfig, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return how timm prepares images at the model's size; ``default`` is for configurations without ``pretrained_cfg``."""
    settings = dict(getattr(config, "pretrained_cfg", None) or default or {})
    size = (config.model_args or {}).get("img_size")
    if size is not None:
        channels = settings.get("input_size", (3,))[0]
        settings["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    resolved: dict[str, Any] = resolve_data_config(pretrained_cfg=settings)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in resolved.items()}


def timm_weights(name: str, config: TimmWrapperConfig, *, pretrained: bool) -> dict[str, Tensor]:
    """Return the weights that timm itself draws for one of its models, or fetches from wherever it knows that they are."""
    arguments = {"num_classes": config.num_labels, **(config.model_args or {})}
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments).state_dict()
    except Exception as error:  # of its downloads, by one library or another
        if not pretrained:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnavailableError(
            f"`pretrained_model_name_or_path` (='timm/{name}'): timm could not fetch its weights ({reason}): take another "
            "model or a folder."
        ) from error


def write_timm_folder(folder: str | Path, config: TimmWrapperConfig, model: Any, state_dict: dict[str, Tensor]) -> None:
    """Write a model in timm's hub layout, which timm and transformers' TimmWrapper both read."""
    # TimmWrapper's own folder is read by neither timm nor pipeline; timm's own export holds num_classes among model_args, which
    # TimmWrapper refuses, and names no labels, which then become ImageNet's.
    pretrained_cfg = getattr(config, "pretrained_cfg", None)
    if not pretrained_cfg:
        pretrained_cfg = filter_pretrained_cfg(dict(model.pretrained_cfg), remove_source=True, remove_null=True)
    pretrained_cfg = deepcopy(dict(pretrained_cfg))
    for name in ("architecture", "label_names", "label_descriptions", "label_offset"):
        pretrained_cfg.pop(name, None)
    entry = getattr(config, ENTRY, None)
    notes = [note for note in pretrained_cfg.pop("notes", ()) if not note.startswith(NOTE)]
    if entry is not None:  # of all the file, timm keeps this alone when it saves the folder again
        notes.append(NOTE + json.dumps(entry))
    pretrained_cfg |= {"notes": notes} if notes else {}
    pool = getattr(model, "global_pool", None)
    contents: dict[str, Any] = {
        "architecture": config.architecture,
        "num_classes": config.num_labels,
        "num_features": model.num_features,
        "label_names": [name for _, name in sorted((config.id2label or {}).items())],
        "model_args": {name: value for name, value in (config.model_args or {}).items() if name != "num_classes"},
        "pretrained_cfg": pretrained_cfg | {"num_classes": config.num_labels, "custom_load": False},
        ENTRY: entry,
        "global_pool": pool if isinstance(pool, str) else None,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, Path(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
    text = json.dumps({name: value for name, value in contents.items() if value not in (None, {})}, indent=2)
    Path(folder, CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
