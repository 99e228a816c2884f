"""The heads of a model: find them, and read the features that they score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etf_adapt.heads.layers import ClassifierHead


class HeadError(ValueError):
    """A model's classification head cannot be found, replaced or put back."""


def head_modules(model: nn.Module) -> dict[str, ClassifierHead]:
    """Return the heads made by this library in a model, by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ClassifierHead)}


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor of timm's, or an output object or tuple of transformers'."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Return a model's output of keyword arguments, or of its one input."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def read_features(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> list[Tensor]:
    """Run a model on a batch without labels and return what its heads score: (batch, in_features) for each head.

    The one head hands its input on as if it were logits: the model's own gather, pooling or average then yields the feature
    of each row, also where the head is applied to every token. Of several heads the input of each is read instead, averaged
    over its positions.
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
            stack.enter_context(_forward_replaced(head, reader(path, head.forward)))
        output = call_model(model, batch)
    if len(heads) == 1:
        inputs = dict.fromkeys(heads, logits_of(output))
    features = [_mean_over_positions(head, inputs[path]) for path, head in heads.items()]
    for (path, head), part in zip(heads.items(), features, strict=True):
        if part.shape[1] != head.weight.shape[1]:
            raise HeadError(
                f"`{path}` reads {head.weight.shape[1]} features a row, but the model passes on {tuple(part.shape)}: "
                "it transforms what comes out of its head, and its features cannot be read."
            )
    return features


@contextmanager
def _forward_replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    # An instance's forward, not a hook: torch.compile does not see hooks that come after it has compiled.
    before = vars(head).get("forward")
    cast(Any, head).forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            cast(Any, head).forward = before


def _mean_over_positions(head: nn.Module, features: Tensor) -> Tensor:
    """Average over positions, which come last for a convolution, else before the features."""
    if features.ndim < 3:
        return features
    return features.flatten(2).mean(dim=2) if isinstance(head, nn.Conv2d) else features.flatten(1, -2).mean(dim=1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and each module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model draws at random what it computes in training: dropout, or stochastic depth."""
    if getattr(model, "without_dropout", False):
        return False
    dropouts = [module for module in model.modules() if "drop" in type(module).__name__.lower()]
    shares = [getattr(module, name, 0.0) for module in dropouts for name in ("p", "drop_prob")]
    config = getattr(model, "config", None)  # some models of transformers call torch's function
    shares += [] if config is None else [value for name, value in config.to_dict().items() if "drop" in name]
    return any(isinstance(share, float) and share > 0.0 for share in shares)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorm layers of a model that keep running statistics, without those inside its head."""
    inside = {part for module in model.modules() if isinstance(module, ClassifierHead) for part in module.modules()}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    return [norm for norm in norms if norm not in inside]


@contextmanager
def seeded_torch(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's CPU generator, and a GPU's where one is given, for a while; both get their states back afterwards."""
    gpus = [device.index or 0] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.random.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield
