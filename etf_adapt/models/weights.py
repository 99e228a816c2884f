"""Weights on disk: state dicts converted to a model's own names, digests of head layers, bare files of weights."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.swap import find_heads

logger = logging.getLogger(__name__)


class ConvertedState(NamedTuple):
    """A state dict in a model's own names and shapes."""

    tensors: dict[str, Tensor]
    unexpected: list[str]  # names for which the model has no place
    unfit: list[str]  # the model's names of tensors in another shape, or merged from several of which one is missing


def convert_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> ConvertedState:
    """Convert a state dict in the names of a file, or in those of memory, to a model's own names and tensors."""
    # Names and tensors on disk are those of older versions for many models (a ViT's `vit.layers.0.attention.q_proj` is written
    # as `vit.encoder.layer.0.attention.attention.query`). `from_pretrained` converts them; `Trainer` calls `load_state_dict`
    # without that, and so resumes with the weights that it happened to have
    # (https://github.com/huggingface/transformers/issues/43701, open as of transformers 5.24).
    own = model.state_dict()
    if state_dict.keys() <= own.keys():
        unfit = sorted(name for name, tensor in state_dict.items() if tensor.shape != own[name].shape)
        return ConvertedState({name: state_dict[name] for name in state_dict if name not in unfit}, [], unfit)
    twin = _meta_twin(model)
    config = LoadStateDictConfig(weight_mapping=cast(Any, get_model_conversion_mapping(model)))
    with without_bars():
        info, _ = convert_and_load_state_dict_in_model(twin, dict(state_dict), config)
    tensors = {name: tensor for name, tensor in twin.state_dict().items() if not tensor.is_meta}
    refused = {name for name, *_ in info.mismatched_keys} | set(info.conversion_errors)
    return ConvertedState(tensors, sorted(info.unexpected_keys), sorted(refused))


@contextmanager
def without_bars() -> Iterator[None]:
    """Leave out transformers' progress bars, one for each file of weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def find_missing(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """List the model's own names that a state dict does not give, but for tied and dispensable ones."""
    own = model.state_dict(keep_vars=True)
    given = set(names)
    # Of tied weights files keep one; a model's class declares which are dispensable.
    tied = {id(tensor) for name, tensor in own.items() if name in given}
    dispensable = [*(model._keys_to_ignore_on_load_missing or ()), *map(re.escape, model._keys_to_ignore_on_save or ())]
    return [
        name
        for name, tensor in own.items()
        if name not in given and id(tensor) not in tied and not any(re.search(rule, name) for rule in dispensable)
    ]


def _meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the tree of modules with empty tensors on the meta device in place of the model's own."""
    # The conversion replaces parameters and sets requires_grad, which must not happen to a model whose parameters an optimizer
    # holds. Modules are copied as they stand rather than built again, so that what was put into the model (a head, adapters) is
    # in the copy too.
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def empty(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in tensors:
            blank = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
        return None if tensor is None else tensors[id(tensor)]

    def copy(module: nn.Module | None) -> nn.Module | None:
        if module is not None and id(module) not in modules:
            twin = modules[id(module)] = object.__new__(type(module))
            twin.__dict__.update(vars(module))
            twin.__dict__["_parameters"] = {name: empty(parameter) for name, parameter in module._parameters.items()}
            twin.__dict__["_buffers"] = {name: empty(buffer) for name, buffer in module._buffers.items()}
            twin.__dict__["_modules"] = {name: copy(child) for name, child in module._modules.items()}
        return None if module is None else modules[id(module)]

    return cast(PreTrainedModel, copy(model))


def load_noting_new(auto_model: Any, location: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model by one of transformers' Auto classes; note the parameters that its file lacks, and its loading info."""
    model, found = auto_model.from_pretrained(location, output_loading_info=True, **options)
    names = {name for name, _ in model.named_parameters()}
    model._new_weights = tuple(sorted(names & {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}))
    model._loading_info = found
    return cast(PreTrainedModel, model)


def new_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters before the head that are random because the model's file holds none of them, by name."""
    # Stock classes put such layers before the head (`classifier.dense` of RoBERTa, `pooler.dense` of DeBERTa), which
    # checkpoints that were pretrained for something else do not have.
    names = getattr(model, "_new_weights", ())
    inside = {parameter for head in head_modules(model).values() for parameter in head.parameters()}
    return {name: value for name, value in model.named_parameters() if name in names and value not in inside}


def describe_layers(layers: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """Describe weight and bias of each head as they are saved: dtype, digest, and digest after rounding to half precision."""
    rounded = {}
    for name in ("bfloat16", "float16"):
        half = getattr(torch, name)
        halves = [(weight.to(half), None if bias is None else bias.to(half)) for weight, bias in layers]
        rounded[name] = layer_digest(halves)
    dtype = str(layers[0][0].dtype).removeprefix("torch.")
    return {"dtype": dtype, "sha256": layer_digest(layers), "rounded": rounded}


def is_changed(layers: Sequence[tuple[Tensor, Tensor | None]], entry: Mapping[str, Any]) -> bool:
    """Return whether layers differ from those that ``describe_layers`` described; False for the same ones rounded."""
    weight = layers[0][0]
    if weight.is_meta:  # spread over devices, which is refused elsewhere
        return False
    # Entries of the first versions say nothing of layers in a lower precision.
    if "rounded" not in entry and torch.finfo(weight.dtype).bits < torch.finfo(getattr(torch, entry["dtype"])).bits:
        return False
    return layer_digest(layers) not in (entry["sha256"], *entry.get("rounded", {}).values())


def layer_digest(layers: Iterable[tuple[Tensor, Tensor | None]]) -> str:
    """Hash weight and bias of each head in float32, so that half-precision files loaded as float32 give the same digest."""
    digest = hashlib.sha256()
    for tensor in (part for layer in layers for part in layer if part is not None):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype(np.dtype("<f4")).tobytes())
    return digest.hexdigest()


def load_weight_file(model: PreTrainedModel, path: str | Path, *, head_path: str | Sequence[str] | None = None) -> None:
    """Load a backbone from a bare file of weights, as safetensors or as torch saves it; leave out a classifier in it."""
    argument = f"`checkpoint_path` (={str(path)!r})"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument} is no file: give a file of weights.")
    try:  # timm's reader: averaged weights first, names without the prefixes of DistributedDataParallel and torch.compile
        converted = convert_state_dict(model, load_state_dict(str(path), weights_only=True))
    except Exception as error:  # whatever readers raise of files that are broken, or are none of weights
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{argument} holds no state dict that can be read without running code ({reason}): save the tensors of "
            "model.state_dict() with safetensors."
        ) from error
    prefix = f"{model.base_model_prefix}."  # which names in a file may lack
    heads = tuple(f"{place.removeprefix(prefix)}." for place in find_heads(model, head=head_path))

    def of_backbone(names: Iterable[str]) -> list[str]:
        return [name for name in names if not name.removeprefix(prefix).startswith(heads)]

    # Files of old versions of torch do not count the batches of a BatchNorm.
    missing = [name for name in find_missing(model, converted.tensors) if not name.endswith(".num_batches_tracked")]
    names = {"lacks, or has in another shape,": of_backbone(missing), "has beside": of_backbone(converted.unexpected)}
    faults = [f"{fault} {found[0]} ({len(found)} in all)" for fault, found in names.items() if found]
    if faults:
        architecture = getattr(model.config, "architecture", None) or type(model).__name__
        raise ValueError(
            f"{argument} holds the weights of another model than {architecture}: it {'; it '.join(faults)}. Name the "
            "architecture and the image size that they were saved from."
        )
    taken = of_backbone(converted.tensors)
    model.load_state_dict({name: converted.tensors[name] for name in taken}, strict=False)
    logger.warning("%s: %d tensors of the backbone loaded, its classifier left out.", argument, len(taken))
