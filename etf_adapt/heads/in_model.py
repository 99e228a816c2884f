"""The heads of a model: find them, read the features that they score, keep the model's mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader

from etf_adapt.heads.layers import ClassifierHead


class HeadError(ValueError):
    """A model's classification head cannot be found, replaced or put back."""


def head_modules(model: nn.Module) -> dict[str, ClassifierHead]:
    """Return the heads made by this library in a model, by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ClassifierHead)}


def read_features(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> list[Tensor]:
    """Run a model up to its head and return the rows that the head scores.

    The head hands its input on as it is, and the model's own gather, pooling or average yields the feature of each row, also
    where the head is applied to every token. With several heads the input of each is read instead, averaged over the tokens
    where a head reads tokens.

    Args:
        model: A model with a head made here; in whichever mode it is, gradients as the caller has them.
        batch: Inputs of the model's forward without labels: a mapping or a tensor.

    Returns:
        One tensor (batch, in_features) for each head.

    Raises:
        HeadError: The model has no head made here, or what it passes on is no row of features.
    """
    heads = head_modules(model)
    if not heads:
        raise HeadError(
            f"{type(model).__name__} has no head made by etf_adapt: call swap_head(model, num_classes) first."
        )
    inputs: dict[str, Tensor] = {}

    def reader(path: str, score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def read(features: Tensor) -> Tensor:
            inputs[path] = features
            return features if len(heads) == 1 else score(features)

        return read

    with ExitStack() as stack:
        for path, head in heads.items():
            # An instance's forward, not a hook: torch.compile does not see hooks that come after it has compiled.
            stack.callback(_set_forward, head, vars(head).get("forward"))
            _set_forward(head, reader(path, head.forward))
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if len(heads) == 1:
        inputs = dict.fromkeys(heads, logits_of(output))
    features = [_rows_of(head, inputs[path]) for path, head in heads.items()]
    for (path, head), row in zip(heads.items(), features, strict=True):
        if row.shape[1] != head.weight.shape[1]:
            raise HeadError(
                f"`{path}` reads {head.weight.shape[1]} features a row, but the model passes on {tuple(row.shape)}: "
                "it transforms what comes out of its head, and its features cannot be read."
            )
    return features


def score_features(model: nn.Module, features: Tensor) -> Tensor:
    """Return the logits (batch, num_classes) that a model's one head gives to rows of features (batch, in_features).

    Raises:
        HeadError: The model has no head made here, or several.
    """
    heads = list(head_modules(model).values())
    if len(heads) != 1:
        raise HeadError(f"{type(model).__name__} has {len(heads)} heads made by etf_adapt: features are scored by one.")
    positions = (1,) * (heads[0].weight.ndim - 2)  # of a head that is a convolution
    logits: Tensor = heads[0](features.reshape(*features.shape, *positions))
    return logits.flatten(1)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor of timm's, or an output object or tuple of transformers'."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _set_forward(head: nn.Module, forward: Callable[[Tensor], Tensor] | None) -> None:
    """Give a module a forward of its own, or its class's again."""
    if forward is None:
        del head.forward
    else:
        cast(Any, head).forward = forward


def _rows_of(head: nn.Module, inputs: Tensor) -> Tensor:
    """Return one row of features each: the mean over positions, which come last for a convolution, else before the features."""
    if inputs.ndim < 3:
        return inputs
    return inputs.flatten(2).mean(dim=2) if isinstance(head, nn.Conv2d) else inputs.flatten(1, -2).mean(dim=1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and each module back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor to a device; return anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def seeded_torch(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's CPU generator, and a GPU's where one is given, for a while; both get their states back afterwards."""
    gpus = [device.index or 0] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.random.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on its own device; it must lie where the processes communicate."""
    return tensor if PartialState().num_processes == 1 else reduce(tensor, "sum")


def gather_over_processes(parts: list[Any]) -> list[Any]:
    """Return the parts of all processes in one list, in the order of the processes."""
    return parts if PartialState().num_processes == 1 else gather_object(parts)


def own_batches(data: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield this process's batches with their number among all batches, none of them padded or repeated."""
    state = PartialState()
    if state.num_processes == 1:
        yield from enumerate(data)
    elif isinstance(data, DataLoader):
        shard = prepare_data_loader(
            data, num_processes=state.num_processes, process_index=state.process_index, even_batches=False
        )
        for step, batch in enumerate(shard):
            yield step * state.num_processes + state.process_index, batch
    else:
        yield from itertools.islice(enumerate(data), state.process_index, None, state.num_processes)
