"""State dicts in the names and shapes of files, brought into those that a transformers model has in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from etf_adapt.head import is_head


@dataclass(frozen=True)
class ConvertedState:
    """A state dict in a model's own names and shapes.

    Attributes:
        tensors: What can be loaded.
        unexpected: Names for which the model has no place.
        unfit: Names of the model whose tensors came in another shape, or of which a part is missing where the model merges
            several tensors of the file into one.
    """

    tensors: dict[str, Tensor]
    unexpected: list[str]
    unfit: list[str]


def convert_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> ConvertedState:
    """Convert a state dict as ``save_pretrained`` writes it to the model's own names and tensors.

    Names and tensors on disk are those of older versions for many models (a ViT's ``vit.layers.0.attention.q_proj`` is
    written as ``vit.encoder.layer.0.attention.attention.query``). ``from_pretrained`` converts them; ``Trainer`` calls
    ``load_state_dict`` without that, and so resumes with the weights that it happened to have
    (https://github.com/huggingface/transformers/issues/43701, open as of transformers 5.24).

    Args:
        model: The model that the tensors are for; not changed.
        state_dict: Tensors by name, as in a file or as in memory.

    Returns:
        Tensors under the model's own names, and what was left over.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        >>> model = ViTForImageClassification(ViTConfig(**sizes))
        >>> old = {"vit.encoder.layer.0.attention.attention.query.bias": torch.zeros(4)}
        >>> list(convert_state_dict(model, old).tensors)
        ['vit.layers.0.attention.q_proj.bias']
    """
    own = model.state_dict()
    if state_dict.keys() <= own.keys():
        unfit = sorted(name for name, tensor in state_dict.items() if tensor.shape != own[name].shape)
        return ConvertedState({name: state_dict[name] for name in state_dict if name not in unfit}, [], unfit)
    twin = _meta_twin(model)
    config = LoadStateDictConfig(weight_mapping=cast(Any, get_model_conversion_mapping(model)))
    show_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(twin, dict(state_dict), config)
    finally:
        if show_progress:
            logging.enable_progress_bar()
    tensors = {name: tensor for name, tensor in twin.state_dict().items() if not tensor.is_meta}
    refused = {name for name, *_ in info.mismatched_keys} | set(info.conversion_errors)
    return ConvertedState(tensors, sorted(info.unexpected_keys), sorted(refused))


def find_missing(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """List the tensors of a model that a state dict leaves as they are.

    Args:
        model: A model.
        names: Names in the state dict, as in memory.

    Returns:
        Names of the model's own state dict. Tied weights, of which files keep one, and those that the model's class
        declares dispensable do not count.
    """
    own = model.state_dict(keep_vars=True)
    given = set(names)
    tied = {id(tensor) for name, tensor in own.items() if name in given}
    dispensable = [*(model._keys_to_ignore_on_load_missing or ()), *map(re.escape, model._keys_to_ignore_on_save or ())]
    return [
        name
        for name, tensor in own.items()
        if name not in given and id(tensor) not in tied and not any(re.search(rule, name) for rule in dispensable)
    ]


def _meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the tree of modules with empty tensors on the meta device in place of the model's own.

    The conversion replaces parameters and sets ``requires_grad``, which must not happen to a model whose parameters an
    optimizer holds. Modules are copied as they stand rather than built again, so that what was put into the model (a head,
    adapters) is there too.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def empty(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            blank = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
        return tensors[id(tensor)]

    def copy(module: nn.Module | None) -> nn.Module | None:
        if module is None or id(module) in modules:
            return None if module is None else modules[id(module)]
        twin = modules[id(module)] = object.__new__(type(module))
        twin.__dict__.update(vars(module))
        twin.__dict__["_parameters"] = {name: empty(parameter) for name, parameter in module._parameters.items()}
        twin.__dict__["_buffers"] = {name: empty(buffer) for name, buffer in module._buffers.items()}
        twin.__dict__["_modules"] = {name: copy(child) for name, child in module._modules.items()}
        return twin

    return cast(PreTrainedModel, copy(model))


def load_noting_new(auto_model: Any, location: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model by one of transformers' Auto classes, and note of which parameters its file holds none.

    Args:
        auto_model: The Auto class.
        location: Folder or Hub id.
        options: Arguments of its ``from_pretrained``.

    Returns:
        The model; ``new_weights`` tells what was noted, ``_loading_info`` what transformers says of it.
    """
    model, found = auto_model.from_pretrained(location, output_loading_info=True, **options)
    names = {name for name, _ in model.named_parameters()}
    model._new_weights = tuple(sorted(names & {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}))
    model._loading_info = found
    return cast(PreTrainedModel, model)


def new_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters before the head that are new, random ones: the file that the model is of holds none of them.

    Stock classes put such layers before the head (``classifier.dense`` of RoBERTa, ``pooler.dense`` of DeBERTa), which
    checkpoints that were pretrained for something else do not have.

    Args:
        model: A model loaded by ``ETFFor...from_pretrained``; none are known of others.

    Returns:
        The parameters by name.
    """
    names = getattr(model, "_new_weights", ())
    inside = {parameter for module in model.modules() if is_head(module) for parameter in module.parameters()}
    return {name: value for name, value in model.named_parameters() if name in names and value not in inside}
