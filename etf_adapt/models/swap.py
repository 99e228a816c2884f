"""Find, replace and put back the classification head of any timm or transformers model.

One rule serves both libraries: build the same architecture again on the meta device with a number of classes that no layer
has; the layers whose output has that size are the head.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn
from transformers import PreTrainedModel

from etf_adapt.heads.in_model import HeadError, head_modules
from etf_adapt.heads.layers import ClassifierHead, make_head

SENTINEL = 1013  # a number of classes that no layer of a pretrained model has

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_RECORD = "_etf_adapt_swap"
_REMEDY = 'name the layer that makes the logits, such as head="classifier".'


@dataclass
class _Record:
    """First values of everything that swaps changed: attributes of modules, layers included, and of the configuration."""

    attributes: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self.attributes.setdefault((module, name), getattr(module, name))
        setattr(module, name, value)

    def undo(self, model: nn.Module) -> None:
        for (module, name), value in self.attributes.items():
            current = getattr(module, name)
            if isinstance(current, ClassifierHead) and isinstance(value, nn.Module):
                value.to(current.weight)  # the model may have been moved or cast since
            setattr(module, name, value)
        for name, value in self.config.items():
            setattr(cast(Any, model).config, name, value)


def find_heads(model: nn.Module, *, head: str | Sequence[str] | None = None) -> list[str]:
    """Return the module paths of the layers that make a model's class logits, several where logits are averaged or added.

    No forward pass is run, no weight is touched and no random number is drawn. Paths given as ``head`` are only checked.
    """
    if head is not None:
        paths = [head] if isinstance(head, str) else list(head)
        for path in paths:
            _submodule(model, path)
        return paths
    if made := list(head_modules(model)):
        return made
    name, twin, layers = _name(model), dict(_twin(model).named_modules()), dict(model.named_modules())
    paths = [path for path, module in twin.items() if _outputs(module) == SENTINEL]
    if not paths:
        raise HeadError(f"{name} has no classification layer: load its classification class or name it as `head`.")
    if _lacks_classifier(model):
        raise HeadError(f"{name} was built with num_classes=0 and has no classification layer: swap_head gives it one.")
    # A model that timm's create_model did not build does not say how it was built, and any may have been changed since.
    sizes = {_outputs(layers.get(path)) for path in paths}
    others = [path for path, module in layers.items() if path not in twin and _outputs(module) in sizes]
    if None in sizes or len(sizes) > 1 or others:
        raise HeadError(
            f"{name} as its library builds it makes its logits in {', '.join(paths)}, and this model was built otherwise or "
            "changed since: name the layer that makes its logits with `head`."
        )
    return paths


def swap_head(
    model: nn.Module,
    num_classes: int,
    *,
    head: str | Sequence[str] | None = None,
    kind: str = "etf",
    trainable: bool | None = None,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the last layer of a classification model and all settings of its classes, in place.

    Norms, hidden layers and pooling before that layer stay as they are (timm's ``reset_classifier`` destroys trained ones in
    55 models). The old layer's weights are not in the model any more; ``restore_head`` brings them back in the same process.

    Args:
        model: A timm model or a classification model of transformers.
        num_classes: Number of classes of the new head, at least 2.
        head: Module path or paths of the layer, where it cannot be found.
        kind: ``"etf"``, ``"linear"``, ``"cosine"`` or ``"paper"``.
        trainable: Whether the new head learns; the kind's default where None.
        id2label: Names of the classes 0 .. num_classes - 1, by number or in their order, for models that keep them.
        generator: Source of a random frame; the global CPU generator where None.

    Returns:
        The same model.

    Raises:
        HeadError: The head cannot be found or replaced. The model is then unchanged.

    Example:
        >>> model = swap_head(timm.create_model("test_vit"), 3)
        >>> model.head.weight.shape, model.num_classes
        (torch.Size([3, 64]), 3)
    """
    if num_classes < 2:
        raise HeadError(f"`num_classes` (={num_classes}) must be at least 2: check the label column.")
    names = label_names(id2label or {})
    if id2label is not None and list(names) != list(range(num_classes)):
        raise HeadError(f"`id2label` must name the classes 0 to {num_classes - 1}; it names {list(names)[:5]} ...")
    config = model.config if isinstance(model, PreTrainedModel) else None
    record = _Record()
    try:
        lacks_classifier = head is None and _lacks_classifier(model)
        paths = _build_classifier(model, record) if lacks_classifier else find_heads(model, head=head)
        if kind == "paper" and len(paths) > 1:
            raise HeadError(f"{type(model).__name__} has several heads {paths}; the published method has one.")
        for path in paths:
            leaf = _submodule(model, path)
            require_plain_weight(leaf, path)
            new = make_head(leaf, num_classes, kind=kind, trainable=trainable, generator=generator)
            for parent in [*model.modules()]:
                for name in [name for name, child in parent._modules.items() if child is leaf]:  # it may be shared
                    record.set(parent, name, new)
    except Exception as error:
        record.undo(model)
        if isinstance(error, (TypeError, ValueError)) and not isinstance(error, HeadError):
            raise HeadError(f"{type(model).__name__}: {error}") from error
        raise
    for module in model.modules():
        for name in ("num_classes", "num_labels"):
            if isinstance(vars(module).get(name), int):
                record.set(module, name, num_classes)
    if config is not None:
        changed = {"id2label", "label2id", "problem_type", "label_names"} & vars(config).keys()
        record.config = {name: deepcopy(getattr(config, name)) for name in changed}
        config.num_labels = num_classes  # keeps the names where their number is right
        labels = names or {int(index): str(label) for index, label in (config.id2label or {}).items()}
        if names:
            indices = {label: index for index, label in names.items()}
            # A name that comes twice has no index, as in transformers.
            config.id2label, config.label2id = names, indices if len(indices) == num_classes else None
        if config.problem_type in ("regression", "multi_label_classification"):
            warnings.warn(
                f"The model was trained with `problem_type` {config.problem_type!r}: its new head puts each row into one of "
                f"{num_classes} classes, and `problem_type` is None.",
                stacklevel=2,
            )
        config.problem_type = None
        if "label_names" in changed:  # TimmWrapper writes these in place of id2label
            config.label_names = [labels[index] for index in range(num_classes)]
    earlier: _Record = getattr(model, _RECORD, _Record())
    setattr(model, _RECORD, _Record(record.attributes | earlier.attributes, record.config | earlier.config))
    return model


def label_names(id2label: Mapping[int, str] | Sequence[str]) -> dict[int, str]:
    """Return the names of the classes by number; a list holds them in order."""
    pairs = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
    return dict(sorted((int(index), str(name)) for index, name in pairs))


def restore_head(model: nn.Module) -> nn.Module:
    """Put back the layers and settings that the first ``swap_head`` of this process replaced, in place.

    Args:
        model: A model that was given to ``swap_head``.

    Returns:
        The same model.

    Raises:
        HeadError: No head was replaced in this process, as in a model that was loaded with its new head.

    Example:
        >>> model = swap_head(timm.create_model("test_vit"), 3)
        >>> restore_head(model).head.weight.shape
        torch.Size([1000, 64])
    """
    record: _Record | None = getattr(model, _RECORD, None)
    if record is None:
        raise HeadError(
            f"{type(model).__name__} holds no earlier head: only a head that swap_head replaced in this process can be "
            "restored. Load the original model instead."
        )
    record.undo(model)
    delattr(model, _RECORD)
    return model


def _twin(model: nn.Module) -> nn.Module:
    """Build the model's architecture on the meta device with ``SENTINEL`` classes."""
    architecture = _architecture(model)
    if architecture is None and not isinstance(model, PreTrainedModel):
        raise HeadError(f"{type(model).__name__} is neither a timm model nor one of transformers: {_REMEDY}")
    try:
        # Some constructors draw on the CPU all the same.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            if isinstance(model, PreTrainedModel):
                config = deepcopy(model.config)
                config.num_labels = SENTINEL
                return getattr(model, "_stock_class", type(model))(config)
            return timm.create_model(cast(str, architecture), **{**get_model_args(model), "num_classes": SENTINEL})
    except Exception as error:  # whatever a model's own constructor raises
        raise HeadError(
            f"{_name(model)} cannot be built again to find its head ({type(error).__name__}: {error}): {_REMEDY}"
        ) from error


def _architecture(model: nn.Module) -> str | None:
    """Return a timm model's architecture, as ``timm.create_model`` takes it; None for any other model."""
    settings = getattr(model, "pretrained_cfg", None)
    return settings.get("architecture") if isinstance(settings, Mapping) else None


def _name(model: nn.Module) -> str:
    return _architecture(model) or type(model).__name__


def _lacks_classifier(model: nn.Module) -> bool:
    """Return whether a timm model was built with ``num_classes=0``."""
    return _architecture(model) is not None and getattr(model, "num_classes", None) == 0


def _build_classifier(model: nn.Module, record: _Record) -> list[str]:
    """Give a timm model that was built without a classifier one, which loses nothing trained, and return its paths."""
    reset = getattr(model, "reset_classifier", None)
    if reset is None:
        raise HeadError(f"{_name(model)} is an encoder without a classifier in timm: choose a model that classifies.")
    before = [(module, {**vars(module), **module._modules}) for module in model.modules()]
    cast(Any, reset)(SENTINEL)
    for module, values in before:
        changed = {name: value for name, value in values.items() if getattr(module, name, None) is not value}
        record.attributes |= {(module, name): value for name, value in changed.items()}
    return [path for path, module in model.named_modules() if _outputs(module) == SENTINEL]


def _outputs(module: nn.Module | None) -> int | None:
    """Return the number of outputs of a layer with a weight of its own, None for any other module."""
    weight = getattr(module, "weight", None)
    return None if not isinstance(weight, Tensor) or weight.ndim < 2 else weight.shape[0]


def require_plain_weight(leaf: nn.Module, path: str) -> None:
    """Refuse a linear layer or convolution whose weight is quantized, sharded or parametrized."""
    weight = getattr(leaf, "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in _FLOATS
    if isinstance(leaf, (nn.Linear, nn.Conv2d)) and not plain:
        raise HeadError(
            f"The weight of `{path}` ({type(leaf).__name__}) is quantized, sharded or parametrized ({type(weight).__name__}, "
            f"{getattr(weight, 'dtype', None)}): replace the head before that is done, or keep `{path}` out of it."
        )


def _submodule(model: nn.Module, path: str) -> nn.Module:
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    if module is None or module is model:
        raise HeadError(f"`head` (={path!r}) is no module of {type(model).__name__}: name the layer of the logits.")
    return module
