"""Model folders and repositories: where a model is, its configuration, its processor and its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, TimmWrapperConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from etf_adapt.errors import check_choice
from etf_adapt.models.names import ENTRY, is_timm_elsewhere, locate_model, resolve_model_name
from etf_adapt.models.timm_layout import ARGS_OF_WEIGHTS, NOTE, data_config, timm_config
from etf_adapt.models.weights import named_if_broken

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where on the Hub and in its cache files are."""

_CODE_OPTIONS = ("trust_remote_code", "code_revision")  # of a repository's own code; AutoConfig keeps them to itself

NOT_STOCK = f"no stock class has this classifier; load it with {ENTRY} or, where modules.json is, SentenceTransformer"
"""Written as the name of the weights: transformers' classes refuse the folder, and show this."""


def locate(name_or_path: str | Path, *, fetch: bool, options: Mapping[str, Any] | None = None) -> str:
    """Turn any name of a model into a folder or Hub id; with ``fetch``, check within seconds that it can be had."""
    location, own = _resolve(name_or_path, options), hub_options(options or {})
    # With a cache of one's own the Hub is not asked beforehand; of a folder stock classes pass over the revision.
    is_known = any(own[name] is not None for name in own if name != "revision") or Path(location).is_dir()
    return locate_model(location, own.get("revision")) if fetch and not is_known else location


def _resolve(name_or_path: str | Path, options: Mapping[str, Any] | None = None) -> str:
    subfolder = (options or {}).get("subfolder")
    if subfolder and Path(name_or_path).expanduser().is_dir():
        resolve_model_name(str(Path(name_or_path, subfolder)))  # refuses a subfolder without a model
        return str(Path(name_or_path).expanduser())
    return resolve_model_name(str(name_or_path))


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of ``from_pretrained`` that say where on the Hub and in its cache files are."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def load_config(location: str, *, fetch: bool, **options: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Read a model's configuration, in transformers' or timm's layout; return it with the options that it did not take up.

    Without ``fetch`` the configuration of a timm model is timm's own, and the Hub is not asked.
    """
    if is_timm_elsewhere(location) or (not fetch and location.startswith("timm/") and not Path(location).is_dir()):
        return timm_config(location.removeprefix("timm/")), options
    config, unused = cast(Any, AutoConfig.from_pretrained(location, return_unused_kwargs=True, **options))
    if isinstance(config, TimmWrapperConfig):
        # timm's own exports hold num_classes here too, and TimmWrapper then passes it twice
        kept = {name: value for name, value in (config.model_args or {}).items() if name != "num_classes"}
        config.model_args = ARGS_OF_WEIGHTS.get(config.architecture, {}) | kept or None
    if ENTRY in (getattr(config, "transformers_weights", None) or ""):  # NOT_STOCK, of this version or another
        config.transformers_weights = None
    notes = (getattr(config, "pretrained_cfg", None) or {}).get("notes") or ()
    ours = [note.removeprefix(NOTE) for note in notes if note.startswith(NOTE)]
    if ours and config.num_labels and getattr(config, ENTRY, None) is None:
        setattr(config, ENTRY, json.loads(ours[0]))
    return config, {**unused, **{name: options[name] for name in (*HUB_OPTIONS, *_CODE_OPTIONS) if name in options}}


def load_processor(name_or_path: str, task: str, **options: Any) -> Any:
    """Load a model's tokenizer, with a padding token, or image processor; of timm's models the data configuration."""
    check_choice("task", task, ("image", "text"))
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
        raise FileNotFoundError(f"`{name_or_path}` holds no {what} ({reason}): save the model's own there.") from error
    if task == "text" and processor.pad_token is None and processor.eos_token is not None:
        processor.pad_token = processor.eos_token
    return processor


def find_processor(location: str, task: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> Any:
    """Load the processor beside a model; None where there is none, or timm's configuration holds it."""
    if isinstance(config, TimmWrapperConfig):
        return None
    trust = {name: options[name] for name in _CODE_OPTIONS if name in options}
    try:
        return load_processor(location, task, **hub_options(options), **trust)
    except (FileNotFoundError, ImportError):  # some tokenizers need a package of their own
        return None


def is_training_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder has the name that ``Trainer`` gives its checkpoints: ``checkpoint-<step>``."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).resolve().name) is not None


def read_weights(location: str | Path, **options: Any) -> dict[str, Tensor]:
    """Read all tensors of the safetensors file or files of a folder or Hub id, as they are stored."""
    options = hub_options(options)
    index = find_file(location, SAFE_WEIGHTS_INDEX_NAME, **options)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        file = find_file(location, name, **options)
        if file is None:
            raise FileNotFoundError(f"`{location}` lacks {name}: its weights cannot be read.")
        with named_if_broken(location):
            tensors |= load_file(file)
    return tensors


def find_file(location: str | Path, name: str, *, is_needed: bool = False, **options: Any) -> Path | None:
    """Return a file of a folder or Hub id as it lies here, None where there is none.

    Where the Hub cannot be asked and the file is not cached, that is an error if the file is needed.
    """
    if Path(location).is_absolute() and not Path(location).is_dir():
        return None
    try:
        return Path(cast(str, cached_file(location, name, **options)))
    except OSError as error:
        # Its flags do not tell a file that is missing, an error without a cause, from one that nobody can be asked for.
        if error.__cause__ is None or (isinstance(error.__cause__, LocalEntryNotFoundError) and not is_needed):
            return None
        raise


def resolve_dtype(dtype: torch.dtype | str | None, config: PreTrainedConfig) -> torch.dtype:
    """Return the type that weights are loaded in: the configuration's for ``"auto"`` and None, float32 where it has none."""
    chosen = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    named = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    return named if isinstance(named, torch.dtype) else torch.float32


def remove_stale_weights(folder: str | Path, *, is_single: bool = False) -> None:
    """Remove weights of an earlier model where one file was saved over shards (known by ``is_single``), or shards over one."""
    # transformers takes away old shards alone, reads a file before shards, and fails at an index without its shards.
    index, single = Path(folder, SAFE_WEIGHTS_INDEX_NAME), Path(folder, SAFE_WEIGHTS_NAME)
    if not (index.is_file() and single.is_file()):
        return
    shards = [Path(folder, name) for name in {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}]
    if is_single or not all(shard.is_file() for shard in shards):
        for stale in (index, *shards):
            stale.unlink(missing_ok=True)
    else:
        single.unlink()
