"""Which parameters of a model are trained, at which rates, and whether all are finite; its BatchNorm statistics."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from etf_adapt.heads.in_model import batch_norms, head_modules
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.models.adapters import add_adapters, has_adapters
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.models.weights import new_weights
from etf_adapt.results.run_folder import plain_value
from etf_adapt.training.arguments import ETFTrainingArguments


def fix_parameters(model: nn.Module, *, freeze: str = "none", steps: float = 1) -> list[str]:
    """Fix fixed heads again, freeze what is asked of the backbone, and return the paths of heads that had been freed.

    ``freeze``: "none", "backbone", or a regular expression, searched for in the names of the backbone's parameters. A head that
    learns, and layers that the model's file had no weights for, are left. With no ``steps``, nothing need be left to train.
    """
    if freeze != "none" and has_adapters(model):
        raise ValueError(f"`freeze` (={freeze!r}) would fix the adapters' layers too: leave out one of the two.")
    heads = head_modules(model)
    # `model.requires_grad_(True)`, a usual way to unfreeze, frees the head as well.
    freed = [path for path, head in heads.items() if not head.trainable and head.weight.requires_grad]
    for head in heads.values():
        head.fix()
    for parameter in frozen_parameters(model, freeze):
        parameter.requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained and steps > 0:
        raise ValueError(
            f"`freeze` (={freeze!r}) leaves nothing to train under a fixed head: set it to 'none', make the head trainable, "
            "or set num_train_epochs=0 to align the head only."
        )
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"`{name}` is {parameter.dtype}, but weights are trained in float32, under autocast where asked: load the "
                "model with dtype=torch.float32 and set bf16=True."
            )
    return freed


def frozen_parameters(model: nn.Module, freeze: str) -> set[nn.Parameter]:
    """Return the parameters of the backbone that ``freeze`` names, as in ``fix_parameters``."""
    if freeze == "none":
        return set()
    kept = {*new_weights(model).values()}.union(*(head.parameters() for head in head_modules(model).values()))
    backbone = {name: parameter for name, parameter in model.named_parameters() if parameter not in kept}
    frozen = {parameter for name, parameter in backbone.items() if freeze == "backbone" or re.search(freeze, name)}
    if not frozen:
        raise ValueError(
            f"`freeze` (={freeze!r}) is found in none of the {len(backbone)} names of the backbone's parameters, such as "
            f"{', '.join(list(backbone)[-3:])}: set it to 'none', 'backbone' or a regular expression of their names."
        )
    return frozen


def require_embeddings(model: nn.Module, alpha: float | None) -> None:
    """Refuse noise in the embeddings of a model without them, such as timm's."""
    embeddings = None
    with suppress(NotImplementedError):
        embeddings = cast(Any, model).get_input_embeddings()
    if alpha is not None and embeddings is None:
        raise ValueError(
            f"`neftune_noise_alpha` (={alpha}) needs a model of texts, or one of transformers: leave it out."
        )


def describe_learning(model: ETFModel) -> dict[str, Any]:
    """Return head, loss, dropout and adapters of a model, in values for JSON."""
    settings, adapters = model.etf_settings, getattr(model, "peft_config", {}).get("default")
    numbers = {} if adapters is None else {f"peft {name}": value for name, value in adapters.to_dict().items()}
    dropout = {f"config.{name}": value for name, value in model.config.to_dict().items() if "drop" in name}
    numbers = {name: value for name, value in {**dropout, **numbers}.items() if isinstance(value, (bool, int, float))}
    return dict(plain_value({"head": settings["head"]["kind"], "loss": settings["loss"], **numbers}))


def check_optimizers(args: ETFTrainingArguments, optimizer: Any, optimizer_cls_and_kwargs: Any) -> None:
    """Refuse learning rates that would have no effect; an optimizer, or its class with options, may be given."""
    if optimizer is not None and args.head_learning_rate is not None:
        raise ValueError(
            f"`head_learning_rate` (={args.head_learning_rate}) has no effect on the optimizer that is given: give the head's "
            "parameters a group with this `lr` there, and leave it out."
        )
    if optimizer_cls_and_kwargs is not None and "lr" not in optimizer_cls_and_kwargs[1]:
        raise ValueError(
            f"`optimizer_cls_and_kwargs` (={optimizer_cls_and_kwargs[0].__name__}) has no `lr` in its options, and "
            f'`learning_rate` does not reach it: add "lr": {args.learning_rate:g}.'
        )


def set_head_learning_rate(optimizer: Optimizer, heads: Iterable[ClassifierHead], learning_rate: float) -> None:
    """Move the parameters of heads into groups with this learning rate, copies otherwise of the groups where they were."""
    of_heads = {parameter for head in heads for parameter in head.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in of_heads]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in of_heads]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def require_finite(model: nn.Module, *, step: int) -> None:
    """Raise FloatingPointError where a parameter or a running variance of BatchNorm is not finite after ``step`` steps."""
    running = [(f"running_var of BatchNorm layer {i}", norm.running_var) for i, norm in enumerate(batch_norms(model))]
    for name, values in (*model.named_parameters(), *running):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise FloatingPointError(
                f"`{name}` is no longer finite after step {step}, and was not saved: lower `learning_rate`, set "
                "`max_grad_norm`, or train in float32. The last checkpoint is good."
            )


def resolve_batch_norm(model: nn.Module, head: ClassifierHead, args: ETFTrainingArguments) -> str:
    """Return what happens to BatchNorm's running statistics: "none" without layers, as asked, else "frozen" or "train"."""
    # A head that was aligned once goes stale when they move: mobilenetv2, 20 steps at learning rate zero: 0.76 -> 0.52.
    if not batch_norms(model):
        return "none"
    is_aligned = head.is_set_from_data and not head.trainable
    if args.batch_norm == "train" and is_aligned and args.frame != "random":
        raise ValueError(
            "`batch_norm` (='train') moves the features away from a head that was aligned on them and is fixed: set it "
            "to 'frozen', or make the head trainable."
        )
    return args.batch_norm or ("frozen" if is_aligned or args.freeze == "backbone" else "train")


def check_adapters(location: str, peft: str, revision: str | None, *, freeze: str) -> None:
    """Refuse adapters that a model cannot take, by its layers without their weights; before any data are read."""
    if freeze != "none":
        raise ValueError(
            f"`freeze` (={freeze!r}) would fix layers of the adapters of `peft`: leave out one of the two."
        )
    for factory in (ETFForImageClassification, ETFForSequenceClassification):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all is told when the model is loaded
            try:
                model = factory.from_pretrained(location, num_labels=2, pretrained=False, revision=revision)
            except Exception:  # a model of the other task
                continue
            add_adapters(model, peft)
