"""Find, replace and put back the classification head of any timm or transformers model.

This is the only file that knows how the two libraries lay out their models. One rule serves both: build the same
architecture again on the meta device with a number of classes that no layer has; the layers whose output has that size are
the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from etf_adapt.head import ClassifierHead, is_head, make_head

SENTINEL = 1013
"""A number of classes that no layer of a pretrained model has."""

_RECORD = "_etf_adapt_swap"


class HeadError(ValueError):
    """A model's classification head cannot be found, replaced or put back."""


@dataclass
class _Record:
    """What ``restore_head`` puts back: layers by path, attributes by module, and the configuration."""

    layers: list[tuple[str, nn.Module]]
    attributes: list[tuple[nn.Module, str, Any]]
    config: dict[str, Any] | None


def find_heads(model: nn.Module, *, head: str | Sequence[str] | None = None) -> list[str]:
    """Find the layer or layers that make a model's class logits.

    No forward pass is run and no weight is touched.

    Args:
        model: A timm model or a classification model of transformers, with a head.
        head: Module path or paths of the layer, for models whose architecture cannot be built again; only checked.

    Returns:
        Module paths, as ``model.get_submodule`` takes them; several for models that average or add several logits.

    Raises:
        HeadError: There is no head, or it cannot be found.

    Example:
        >>> find_heads(timm.create_model("test_vit", num_classes=7))
        ['head']
    """
    if head is not None:
        paths = [head] if isinstance(head, str) else list(head)
        for path in paths:
            _submodule(model, path)
        return paths
    if is_swapped := [path for path, module in model.named_modules() if is_head(module)]:
        return is_swapped
    twin = _twin(model, SENTINEL)
    paths = [path for path, module in twin.named_modules() if _outputs(module) == SENTINEL]
    if not paths:
        raise HeadError(
            f"{type(model).__name__} has no classification layer: load its classification class, build it with "
            "`num_classes` above 0, or name the layer with `head`."
        )
    classes = {_outputs(_submodule(model, path)) for path in paths}
    if len(classes) != 1:
        raise HeadError(
            f"The layers {paths} of {type(model).__name__} have {sorted(map(str, classes))} outputs: they are not one head. "
            "Name the layer that makes the logits with `head`."
        )
    return paths


def swap_head(
    model: nn.Module,
    num_classes: int,
    *,
    head: str | Sequence[str] | None = None,
    kind: str = "etf",
    trainable: bool | None = None,
    id2label: Mapping[int, str] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the last layer of a classification model, in place, and all settings that speak of its classes.

    Only the layer that makes the logits is replaced: norms, hidden layers and pooling before it stay as they are
    (``reset_classifier`` of timm destroys trained ones in 55 models). What is not preserved: the old layer's weights,
    which ``restore_head`` brings back in the same process.

    Args:
        model: A timm model or a classification model of transformers.
        num_classes: Number of classes of the new head, at least 2.
        head: Module path or paths of the layer, where it cannot be found.
        kind: ``"etf"``, ``"linear"``, ``"cosine"`` or ``"paper"`` (``etf_adapt.head.make_head``).
        trainable: Whether the new head learns; the kind's default where None.
        id2label: Names of the classes 0 .. num_classes - 1, for models that keep them.
        generator: Source of a random frame.

    Returns:
        The same model.

    Raises:
        HeadError: The head cannot be found or replaced, or the model is set up for regression or several labels.

    Example:
        >>> model = swap_head(timm.create_model("test_vit"), 3)
        >>> model.head.weight.shape, model.num_classes
        (torch.Size([3, 64]), 3)
    """
    if num_classes < 2:
        raise HeadError(
            f"`num_classes` (={num_classes}) must be at least 2: a classifier needs two classes; check the label column."
        )
    if id2label is not None and sorted(map(int, id2label)) != list(range(num_classes)):
        raise HeadError(f"`id2label` must name the classes 0 to {num_classes - 1}; it names {sorted(id2label)[:5]} ...")
    config = model.config if isinstance(model, PreTrainedModel) else None
    if config is not None and config.problem_type in ("regression", "multi_label_classification"):
        raise HeadError(
            f"`problem_type` (={config.problem_type!r}) is not classification into one of several classes, which an ETF "
            "head is for; load the model with problem_type=None if it is."
        )
    attributes: list[tuple[nn.Module, str, Any]] = []
    if config is None and head is None and getattr(model, "num_classes", None) == 0:
        _build_classifier(model, num_classes)
    paths = find_heads(model, head=head)
    record = _Record([(path, _submodule(model, path)) for path in paths], attributes, None)
    for _, leaf in record.layers:
        try:
            new = make_head(leaf, num_classes, kind=kind, trainable=trainable, generator=generator)
        except (TypeError, ValueError) as error:
            raise HeadError(f"{type(model).__name__}: {error}") from error
        if kind == "paper" and len(paths) > 1:
            raise HeadError(f"{type(model).__name__} has several heads {paths}; the published method has one.")
        for path in _paths_of(model, leaf):
            replace_module(model, path, new)
    for module in model.modules():
        for name in ("num_classes", "num_labels"):
            if isinstance(vars(module).get(name), int) and not is_head(module):
                attributes.append((module, name, getattr(module, name)))
                setattr(module, name, num_classes)
    if config is not None:
        names = ("id2label", "label2id", "problem_type")
        record.config = {name: deepcopy(getattr(config, name)) for name in names}
        config.num_labels = num_classes  # keeps the names where their number is right
        labels = {int(index): str(name) for index, name in (id2label or config.id2label or {}).items()}
        if id2label is not None:
            config.id2label, config.label2id = labels, {name: index for index, name in labels.items()}
        config.problem_type = None
        if "label_names" in vars(config):  # TimmWrapper writes these in place of id2label
            record.config["label_names"] = config.label_names
            config.label_names = [labels[index] for index in range(num_classes)]
    if not hasattr(model, _RECORD):
        setattr(model, _RECORD, record)
    return model


def restore_head(model: nn.Module) -> nn.Module:
    """Put back the layers and settings that the first ``swap_head`` of this process replaced.

    Args:
        model: A model that was given to ``swap_head``.

    Returns:
        The same model.

    Raises:
        HeadError: Nothing was replaced here, as in a model that was loaded with its new head.

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
    for path, layer in record.layers:
        current = _submodule(model, path)
        for alias in _paths_of(model, current):
            replace_module(model, alias, layer.to(next(current.parameters()).device))
    for module, name, value in record.attributes:
        setattr(module, name, value)
    if record.config is not None:
        config = cast(PreTrainedModel, model).config
        for name, value in record.config.items():
            setattr(config, name, value)
    delattr(model, _RECORD)
    return model


def head_modules(model: nn.Module) -> dict[str, ClassifierHead]:
    """Return the heads made by this library in a model, by module path.

    Example:
        >>> list(head_modules(swap_head(timm.create_model("test_vit"), 3)))
        ['head']
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, ClassifierHead)}


def read_features(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> list[Tensor]:
    """Run a model up to its head and return the rows that the head scores.

    An identity in the layer's place lets the model's own gather, pooling or average yield the feature of each row, also
    where the head is applied to every token. With several heads the input of each is read instead, averaged over the tokens
    where a head reads tokens.

    Args:
        model: A model with a head made here; in whichever mode it is, gradients as the caller has them.
        batch: Inputs of the model's forward without labels: a mapping or a tensor.

    Returns:
        One tensor (batch, in_features) for each head.

    Raises:
        HeadError: The model has no head made here, or what it passes on is no row of features.

    Example:
        >>> model = swap_head(timm.create_model("test_vit"), 3)
        >>> [features.shape for features in read_features(model, torch.randn(2, 3, 160, 160))]
        [torch.Size([2, 64])]
    """
    heads = head_modules(model)
    if not heads:
        raise HeadError(
            f"{type(model).__name__} has no head made by etf_adapt: call swap_head(model, num_classes) first."
        )
    with (_identity if len(heads) == 1 else _input_hooks)(model, heads) as inputs:
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
        rows = inputs or [logits_of(output)]
    features = [_rows(row) for row in rows]
    for (path, head), row in zip(heads.items(), features, strict=True):
        if row.shape[1] != head.weight.shape[1]:
            raise HeadError(
                f"`{path}` reads {head.weight.shape[1]} features a row, but the model passes on {tuple(row.shape)}: "
                "it transforms what comes out of its head, and its features cannot be read."
            )
    return features


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor of timm's, or an output object or tuple of transformers'."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


@contextmanager
def _identity(model: nn.Module, heads: Mapping[str, ClassifierHead]) -> Iterator[list[Tensor]]:
    """Put an identity in the head's place; yields no inputs, since the model's output is what is wanted."""
    [head] = heads.values()
    aliases = _paths_of(model, head)
    try:
        for alias in aliases:
            replace_module(model, alias, nn.Identity())
        yield []
    finally:
        for alias in aliases:
            replace_module(model, alias, head)


@contextmanager
def _input_hooks(model: nn.Module, heads: Mapping[str, ClassifierHead]) -> Iterator[list[Tensor]]:
    """Collect the input of each head in the order of the heads; filled when the block's forward has run."""
    seen: dict[str, Tensor] = {}
    inputs: list[Tensor] = []

    def reader(path: str) -> Any:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path] = args[0]
            if len(seen) == len(heads):
                inputs[:] = [seen[name] for name in heads]

        return read

    handles = [head.register_forward_pre_hook(reader(path)) for path, head in heads.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _rows(inputs: Tensor) -> Tensor:
    """Return one row of features each: from (batch, d), tokens (batch, n, d) or the input of a 1x1 convolution."""
    return inputs.mean(dim=1) if inputs.ndim == 3 else inputs.flatten(2).mean(dim=2) if inputs.ndim == 4 else inputs


def _twin(model: nn.Module, num_classes: int) -> nn.Module:
    """Build the model's architecture on the meta device with another number of classes."""
    try:
        with torch.device("meta"):
            if isinstance(model, PreTrainedModel):
                config = deepcopy(model.config)
                config.num_labels = num_classes
                stock = getattr(model, "_stock_class", type(model))
                return stock(config)
            return timm.create_model(_architecture(model), num_classes=num_classes)
    except HeadError:
        raise
    except Exception as error:  # whatever a model's own constructor raises
        raise HeadError(
            f"{type(model).__name__} cannot be built again to find its head ({type(error).__name__}: {error}): name the "
            'layer that makes the logits, such as head="classifier".'
        ) from error


def _architecture(model: nn.Module) -> str:
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = settings.get("architecture") if isinstance(settings, Mapping) else getattr(settings, "architecture", None)
    if not name:
        raise HeadError(
            f"{type(model).__name__} is neither a timm model nor a transformers model: name the layer that makes the "
            'logits, such as head="classifier".'
        )
    return str(name)


def _build_classifier(model: nn.Module, num_classes: int) -> None:
    """Give a timm model that was built without a classifier one; there is nothing trained to lose."""
    reset = getattr(model, "reset_classifier", None)
    try:
        cast(Any, reset)(num_classes)
    except Exception as error:
        raise HeadError(
            f"{_architecture(model)} is an encoder without a classification head, and timm can give it none: choose a model "
            "that classifies."
        ) from error


def _outputs(module: nn.Module) -> int | None:
    """Return the number of outputs of a layer with a weight of its own, None for any other module."""
    weight = getattr(module, "weight", None)
    return None if not isinstance(weight, Tensor) or weight.ndim < 2 else weight.shape[0]


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise HeadError(
            f"`head` (={path!r}) is no module of {type(model).__name__}: name the layer that makes the logits."
        ) from error


def _paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Return every path at which a module stands; a layer may be shared."""
    return [path for path, other in model.named_modules(remove_duplicate=False) if other is module]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
