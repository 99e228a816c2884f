"""Classes made on the fly: a stock classification class with the methods of ours, under its own name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from etf_adapt.heads.in_model import logits_of
from etf_adapt.heads.layers import ClassifierHead

_MADE: dict[tuple[type, type], type] = {}


def made_class(factory: type, stock: type[PreTrainedModel]) -> Any:
    """Make the subclass of a stock class and a factory (and so of ``etf_model.ETFModel``), under the stock class's name."""
    if (factory, stock) not in _MADE:
        # transformers takes a class from another module for custom code, saves it as such, and converts no weights for it.
        namespace = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__", "__init__")}
        namespace |= {"_stock_class": stock, "forward": _with_loss(stock)}
        _MADE[factory, stock] = type(stock.__name__, (factory, stock), namespace)
    return _MADE[factory, stock]


def _with_loss(stock: type[PreTrainedModel]) -> Callable[..., Any]:
    """Wrap a stock class's forward: it gets no labels and so computes no loss of its own; ours is added."""
    stock_forward = stock.forward
    signature = inspect.signature(stock_forward)  # kept: by it `Trainer` chooses the columns to keep
    names = list(signature.parameters)[1:]  # without self
    position = names.index("labels") if "labels" in names else None

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._require_complete()
        if position is not None and len(args) > position:
            labels, args = args[position], (*args[:position], None, *args[position + 1 :])
        else:
            labels = kwargs.pop("labels", None)
        if labels is not None and not any(isinstance(module, ClassifierHead) for module in self.modules()):
            return stock_forward(self, *args, labels=labels, **kwargs)  # after restore_head
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_in_training(labels)
        output = stock_forward(self, *args, **kwargs)
        if labels is None:
            return output
        loss = self.compute_loss_from_logits(logits_of(output), labels)
        if not isinstance(output, ModelOutput):
            return loss, *output
        output["loss"] = loss
        output.move_to_end("loss", last=False)
        return output

    if position is None:  # as of LeViT and DeiT with a teacher, which have no loss
        parameters = list(signature.parameters.values())
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        has_rest = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        parameters.insert(len(parameters) - has_rest, labels)
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def factory_of(made: type) -> Any:
    """Return the factory of a class made on the fly; a factory itself as it is."""
    return next(base for base in made.__mro__ if not issubclass(base, PreTrainedModel))


def blank(factory: type, stock: type[PreTrainedModel]) -> nn.Module:
    """Make an empty instance, for unpickling."""
    return cast(nn.Module, object.__new__(made_class(factory, stock)))
