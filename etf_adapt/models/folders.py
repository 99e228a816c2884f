"""Model folders and repositories: where a model is, its configuration, its processor and its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, TimmWrapperConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from etf_adapt.models.names import ENTRY, is_timm_elsewhere, locate_model, resolve_model_name, timm_location
from etf_adapt.models.timm_layout import ARGS_OF_WEIGHTS, NOTE, data_config, timm_config

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where on the Hub and in its cache files are."""


def locate(name_or_path: str | Path, *, fetch: bool, options: Mapping[str, Any] | None = None) -> str:
    """Turn any name of a model into a folder or Hub id, and make sure within seconds that it can be had.

    Args:
        name_or_path: Folder, Hub id, timm name or short name (``etf_adapt.models.names.resolve_model_name``).
        fetch: Whether its files are needed.
        options: Arguments of ``from_pretrained``. With a cache or revision of one's own among them the Hub is not asked
            beforehand.

    Returns:
        A folder or a Hub id.

    Raises:
        OSError: The model is neither here nor can it be fetched.
        ValueError: No model has this name.
    """
    location = _resolve(name_or_path, options)
    has_own_options = any((options or {}).get(name) is not None for name in HUB_OPTIONS)
    return locate_model(location) if fetch and not has_own_options else location


def _resolve(name_or_path: str | Path, options: Mapping[str, Any] | None = None) -> str:
    """Turn any name of a model into a folder or Hub id; a timm name without a tag gets the one that timm prefers."""
    subfolder = (options or {}).get("subfolder")
    if subfolder and Path(name_or_path).expanduser().is_dir():
        resolve_model_name(str(Path(name_or_path, subfolder)))
        return str(Path(name_or_path).expanduser())
    location = resolve_model_name(str(name_or_path))
    name = location.removeprefix("timm/")
    if name == location or "." in name or Path(location).is_dir() or not timm.is_model(name):
        return location
    return timm_location(name)


def load_config(location: str, *, fetch: bool, **options: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Read a model's configuration, in transformers' or timm's layout.

    Args:
        location: A folder or Hub id from ``locate``.
        fetch: Whether the Hub may be asked; the configuration of a timm model is otherwise timm's own.
        options: Arguments of ``from_pretrained``.

    Returns:
        The configuration, and those of the options that it has not taken up.
    """
    if is_timm_elsewhere(location) or (not fetch and location.startswith("timm/") and not Path(location).is_dir()):
        return timm_config(location.removeprefix("timm/")), options
    hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    loaded = AutoConfig.from_pretrained(location, return_unused_kwargs=True, **options)
    config, unused = loaded
    model_args = getattr(config, "model_args", None)
    if isinstance(config, TimmWrapperConfig):
        # timm's own exports hold it here too, and TimmWrapper then passes it twice
        kept = {name: value for name, value in (model_args or {}).items() if name != "num_classes"}
        config.model_args = ARGS_OF_WEIGHTS.get(config.architecture, {}) | kept or None
    notes = (getattr(config, "pretrained_cfg", None) or {}).get("notes") or ()
    ours = [note.removeprefix(NOTE) for note in notes if note.startswith(NOTE)]
    if ours and config.num_labels and getattr(config, ENTRY, None) is None:
        setattr(config, ENTRY, json.loads(ours[0]))
    return config, {**unused, **hub_options}


def load_processor(name_or_path: str, task: str, **options: Any) -> Any:
    """Load what turns a model's raw inputs into tensors.

    Args:
        name_or_path: Anything that ``ETFFor...from_pretrained`` takes.
        task: ``"image"`` or ``"text"``.
        options: Arguments of ``AutoTokenizer.from_pretrained`` or ``AutoImageProcessor.from_pretrained``.

    Returns:
        A tokenizer, which has a padding token; an image processor; or, for timm's models, the data configuration: a dict
        with ``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct`` and ``crop_mode``.

    Raises:
        FileNotFoundError: The model's folder holds no tokenizer or image processor.
        ValueError: The task is unknown.

    Example:
        >>> load_processor("timm/test_vit.r160_in1k", "image")["input_size"]
        (3, 160, 160)
    """
    if task not in ("image", "text"):
        raise ValueError(f"`task` (={task!r}) must be one of 'image', 'text'.")
    location = _resolve(name_or_path, options)
    if task == "image":
        config, _ = load_config(location, fetch=not location.startswith("timm/"), **options)
        if isinstance(config, TimmWrapperConfig):
            return data_config(config)
    loader, what = (AutoTokenizer, "tokenizer") if task == "text" else (AutoImageProcessor, "image processor")
    try:
        processor = loader.from_pretrained(location, **options)
        if task == "text" and set(processor.get_vocab()) <= set(processor.all_special_tokens):
            # transformers 5 makes one without a word from a folder that holds none: every text is unknown to it
            raise ValueError("the tokenizer made from the configuration alone has an empty vocabulary")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).split("If you were trying")[0].strip(" .\n")
        raise FileNotFoundError(
            f"`{name_or_path}` holds no {what} ({reason}): save the one that belongs to the model there."
        ) from error
    if task == "text" and processor.pad_token is None and processor.eos_token is not None:
        processor.pad_token = processor.eos_token
    return processor


def find_processor(location: str, task: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> Any:
    """Load the tokenizer or image processor beside a model; None where there is none, or timm's configuration holds it.

    Args:
        location: A folder or Hub id from ``locate``.
        task: ``"image"`` or ``"text"``.
        config: The model's configuration.
        options: Arguments of ``from_pretrained``.
    """
    if isinstance(config, TimmWrapperConfig):
        return None
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    try:
        return load_processor(location, task, **{name: options[name] for name in names if name in options})
    except (FileNotFoundError, ImportError):  # some tokenizers need a package of their own
        return None


def is_training_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder has the name that ``Trainer`` gives its checkpoints: ``checkpoint-<step>``.

    Example:
        >>> is_training_checkpoint("out/checkpoint-20"), is_training_checkpoint("out")
        (True, False)
    """
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).resolve().name) is not None


def read_weights(location: str | Path, **options: Any) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors file or files, as they are stored.

    Args:
        location: Folder or Hub id.
        options: Where on the Hub and in its cache files are; others are passed over.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: The folder holds no safetensors weights.
    """
    hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    index = find_file(location, SAFE_WEIGHTS_INDEX_NAME, **hub_options)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = {name: find_file(location, name, **hub_options) for name in sorted(names)}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise FileNotFoundError(f"`{location}` lacks {missing[0]}: its weights cannot be read.")
    return {key: tensor for file in files.values() for key, tensor in load_file(cast(Path, file)).items()}


def find_file(location: str | Path, name: str, *, is_needed: bool = False, **options: Any) -> Path | None:
    """Return a file of a folder or of a repository on the Hub, as it lies here; None where there is none.

    Args:
        location: Folder or Hub id.
        name: Its path inside.
        is_needed: Whether it is an error that nobody can say whether there is one.
        options: Where on the Hub and in its cache files are.

    Raises:
        OSError: The file is needed, is not cached, and the Hub cannot be asked.
    """
    if Path(location).is_dir() or Path(location).is_absolute():
        file = Path(location, options.get("subfolder") or "", name)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(location), name, **options))
    except LocalEntryNotFoundError:  # the Hub could not be asked
        if is_needed:
            raise
    except EntryNotFoundError:
        pass
    return None


def resolve_dtype(dtype: torch.dtype | str | None, config: PreTrainedConfig) -> torch.dtype:
    """Return the type that weights are loaded in, as ``from_pretrained`` understands it.

    Args:
        dtype: A type of torch or its name; that of the configuration for ``"auto"`` and None.
        config: The model's configuration.

    Returns:
        The type; float32 where the configuration has none.
    """
    chosen = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    named = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    return named if isinstance(named, torch.dtype) else torch.float32


def remove_stale_weights(folder: str | Path, *, is_single: bool = False) -> None:
    """Remove what an earlier model left where one file was saved over shards, or shards over one file.

    transformers takes away old shards alone, reads a file before shards, and fails at an index without its shards.

    Args:
        folder: Where a model has just been saved.
        is_single: Whether its weights are known to be one file; found by the shards that are there otherwise.
    """
    index, single = Path(folder, SAFE_WEIGHTS_INDEX_NAME), Path(folder, SAFE_WEIGHTS_NAME)
    if not (index.is_file() and single.is_file()):
        return
    shards = [Path(folder, name) for name in {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}]
    if is_single or not all(shard.is_file() for shard in shards):
        for stale in (index, *shards):
            stale.unlink(missing_ok=True)
    else:
        single.unlink()
