"""Weights on disk: state dicts converted to a model's own names, digests of head layers, bare files of weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from etf_adapt.heads.layers import is_head
from etf_adapt.models.swap import find_heads


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


_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_layers(layers: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """Describe the layers of a model's heads, so that ``is_changed`` knows them again.

    Args:
        layers: Weight and bias of each head, as they are saved.

    Returns:
        ``dtype``; ``sha256``, their ``layer_digest``; ``rounded``, that digest after rounding to each half-precision type.
    """
    halves = {
        name: [(weight.to(half), None if bias is None else bias.to(half)) for weight, bias in layers]
        for name, half in _HALVES.items()
    }
    return {
        "dtype": str(layers[0][0].dtype).removeprefix("torch."),
        "sha256": layer_digest(layers),
        "rounded": {name: layer_digest(rounded) for name, rounded in halves.items()},
    }


def is_changed(layers: Sequence[tuple[Tensor, Tensor | None]], entry: Mapping[str, Any]) -> bool:
    """Return whether layers are others than those that were saved; the same ones rounded are not.

    Args:
        layers: Weight and bias of each head, as they were loaded.
        entry: What ``describe_layers`` said of them when they were saved. Without ``rounded``, as in folders of its first
            versions, nothing is known of layers in a lower precision.

    Returns:
        Whether they differ; False where that is unknown.

    Example:
        >>> weight = torch.tensor([[0.1, 0.2]])
        >>> entry = describe_layers([(weight, None)])
        >>> is_changed([(weight.bfloat16(), None)], entry), is_changed([(weight.bfloat16() * 2, None)], entry)
        (False, True)
    """
    weight = layers[0][0]
    if weight.is_meta:  # spread over devices, which is refused elsewhere
        return False
    if "rounded" not in entry and torch.finfo(weight.dtype).bits < torch.finfo(getattr(torch, entry["dtype"])).bits:
        return False
    return layer_digest(layers) not in (entry["sha256"], *entry.get("rounded", {}).values())


def layer_digest(layers: Iterable[tuple[Tensor, Tensor | None]]) -> str:
    """Hash the rows and biases of a model's heads.

    Args:
        layers: Weight and bias of each head. They are hashed in float32, so that half-precision files loaded as float32
            give the same digest.

    Returns:
        SHA-256 in hexadecimal.

    Example:
        >>> weight = torch.ones(2, 3, dtype=torch.bfloat16)
        >>> layer_digest([(weight, None)]) == layer_digest([(weight.float(), None)])
        True
    """
    digest = hashlib.sha256()
    for tensor in (part for layer in layers for part in layer if part is not None):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype(np.dtype("<f4")).tobytes())
    return digest.hexdigest()


_NAMED = 3


def load_weight_file(model: PreTrainedModel, path: str | Path, *, head_path: str | Sequence[str] | None = None) -> None:
    """Load the backbone of a model from a file of weights; the classifier that the file may hold is passed over.

    Args:
        model: A classification model of transformers, or timm's in transformers' wrapper.
        path: A state dict as ``.safetensors``, or as torch saves it, in which nothing but tensors is unpickled. It may lie
            inside a training checkpoint of timm, whose averaged weights are then preferred, as by timm itself.
        head_path: Module path or paths of the classifier, where it is not found.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no state dict, or it is another architecture's. The model is then as it was.
    """
    tensors = read_state_dict(path)
    heads = tuple(f"{place}." for place in find_heads(model, head=head_path))
    converted = convert_state_dict(model, tensors)
    prefix = f"{model.base_model_prefix}."

    def of_backbone(names: Sequence[str]) -> list[str]:
        return [name for name in names if not name.startswith(heads) and not f"{prefix}{name}".startswith(heads)]

    # Files of old versions of torch do not count the batches of a BatchNorm.
    passed_over = {*converted.unfit, *(name for name in model.state_dict() if name.endswith(".num_batches_tracked"))}
    faults = {
        "lacks": of_backbone([name for name in find_missing(model, converted.tensors) if name not in passed_over]),
        "has beside": of_backbone(converted.unexpected),
        "has in another shape": of_backbone(converted.unfit),
    }
    if any(faults.values()):
        said = "; ".join(f"{what} {_listed(names)}" for what, names in faults.items() if names)
        raise ValueError(
            f"`checkpoint_path` (={str(path)!r}) holds the weights of another model than {_architecture(model)}: it {said}. "
            "Name the architecture and the image size that they were saved from."
        )
    own = {name: tensor for name, tensor in converted.tensors.items() if not name.startswith(heads)}
    model.load_state_dict(own, strict=False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights.

    Args:
        path: As for ``load_weight_file``.

    Returns:
        Tensors by name, without what ``DistributedDataParallel`` and ``torch.compile`` put before them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no state dict that can be read without running code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`checkpoint_path` (={str(path)!r}) is no file: give a file of weights.")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it is no mapping of names to tensors")
    except Exception as error:  # whatever readers raise of files that are broken, or are none of weights
        reason = str(error).split(". ")[0].splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"`checkpoint_path` (={str(path)!r}) holds no state dict that can be read without running code ({reason}): save "
            "the tensors of model.state_dict() with safetensors."
        ) from error
    return tensors


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _architecture(model: PreTrainedModel) -> str:
    return getattr(model.config, "architecture", None) or type(model).__name__
