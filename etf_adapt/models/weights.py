"""State dicts of files, converted to a model's own names, and what they lack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from etf_adapt.heads.in_model import head_modules


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
    # The conversion replaces parameters, which must not happen where an optimizer holds them. Modules are copied as they stand
    # rather than built again, with the head and adapters that were put into them.
    known = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for tensor in model.parameters():
        known[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
    twins = {id(module): object.__new__(type(module)) for module in model.modules()}
    for module in model.modules():
        twin = vars(twins[id(module)])
        twin.update(vars(module))
        for kind, made in (("_parameters", known), ("_buffers", known), ("_modules", twins)):
            twin[kind] = {name: made.get(id(part)) for name, part in twin[kind].items()}
    return cast(PreTrainedModel, twins[id(model)])


@contextmanager
def named_if_broken(location: str | Path) -> Iterator[None]:
    """Name the place of a file of weights that was cut short, or of a pointer to one; safetensors' own error does not."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"`{location}` holds weights that are not whole ({error}): fetch them again.") from error


def load_noting_new(auto_model: Any, location: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model by one of transformers' Auto classes; note the parameters that its file lacks, and its loading info."""
    with named_if_broken(location):
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
