"""What of a model is trained and what is held still: parameters, the fixed head, and BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etf_adapt.heads.in_model import evaluation_mode, head_modules, to_device
from etf_adapt.heads.layers import ClassifierHead, is_head
from etf_adapt.models.adapters import has_adapters
from etf_adapt.models.weights import new_weights


def fix_parameters(model: nn.Module, *, freeze: str = "none", steps: float = 1) -> list[str]:
    """Say which parameters are trained: give fixed heads back their switch, and freeze the backbone where asked.

    Args:
        model: A model with a head of ours.
        freeze: ``"backbone"`` trains nothing but a head that learns and layers that the model's file had no weights for;
            ``"none"`` adds nothing to what is fixed.
        steps: Steps or epochs to train; with none, nothing need be left to train.

    Returns:
        Module paths of fixed heads that had been freed, as ``model.requires_grad_(True)`` does.

    Raises:
        ValueError: Nothing is left to train, or a weight that is trained is not float32.

    Example:
        >>> from etf_adapt.heads.layers import ETFHead
        >>> model = nn.Sequential(nn.Linear(4, 4), ETFHead(4, 3)).requires_grad_(True)
        >>> fix_parameters(model)
        ['1']
    """
    if freeze == "backbone" and has_adapters(model):
        raise ValueError(
            "`freeze` (='backbone') would fix the adapters, which are part of it: leave out one of the two."
        )
    heads = head_modules(model)
    freed = [path for path, head in heads.items() if not head.trainable and head.weight.requires_grad]
    for head in heads.values():
        head.fix()
    if freeze == "backbone":
        kept = {parameter for head in heads.values() for parameter in head.parameters()} | {
            *new_weights(model).values()
        }
        for parameter in model.parameters():
            if parameter not in kept:
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


def set_head_learning_rate(
    optimizer: torch.optim.Optimizer, heads: Iterable[ClassifierHead], learning_rate: float
) -> None:
    """Move the parameters of heads into groups of their own, each a copy of the group where they were.

    Args:
        optimizer: An optimizer that has made no step.
        heads: The heads; parameters that the optimizer does not hold are passed over.
        learning_rate: Learning rate of the new groups.
    """
    of_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in of_heads]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_heads]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def require_finite(model: nn.Module, *, step: int) -> None:
    """Raise where a parameter or a running statistic of BatchNorm is not finite.

    Args:
        model: Any model.
        step: Steps done, for the message.

    Raises:
        FloatingPointError: Names the first that is not.
    """
    running = [(f"running_var of BatchNorm layer {i}", norm.running_var) for i, norm in enumerate(batch_norms(model))]
    for name, values in (*model.named_parameters(), *running):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise FloatingPointError(
                f"`{name}` is no longer finite after step {step}, and was not saved: lower `learning_rate`, set "
                "`max_grad_norm`, or train in float32. The last checkpoint is good."
            )


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorm layers of a model that keep running statistics, without those inside its head.

    Args:
        model: Any model.

    Returns:
        The layers.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2))))
        1
    """
    inside = {part for module in model.modules() if is_head(module) for part in module.modules()}
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module not in inside
    ]


def reestimate_batch_norms(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Set the running statistics of a model's BatchNorm layers to their plain mean over batches.

    Each batch's mean and variance count equally, whichever process sees it (as in ``torch.optim.swa_utils.update_bn``).
    Everything else is in evaluation mode meanwhile, so that dropout does not widen them.

    Args:
        model: Any model; only the running statistics change.
        batches: This process's batches, mixed as those of the training are, as the model's forward takes them.

    Raises:
        ValueError: No batch passed through a layer.
    """
    norms = batch_norms(model)
    device = next(model.parameters()).device
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: a plain mean over all batches
            norm.train()
        for batch in batches:
            model(
                **{name: to_device(value, device) for name, value in batch.items() if name not in ("labels", "row_id")}
            )
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if PartialState().num_processes > 1:
            seen = _statistic(norm.num_batches_tracked)
            total = reduce(seen.clone(), "sum")
            for statistic in (_statistic(norm.running_mean), _statistic(norm.running_var)):
                statistic.copy_(reduce(statistic * seen, "sum") / total.clamp_min(1))
            seen.copy_(total)
    if any(int(_statistic(norm.num_batches_tracked)) == 0 for norm in norms):
        raise ValueError(
            "The statistics of BatchNorm layers cannot be estimated: the batches did not pass through them, as kept features "
            "do not. Set batch_norm to 'frozen'."
        )


def _statistic(buffer: Tensor | None) -> Tensor:
    if buffer is None:
        raise TypeError("A BatchNorm layer without running statistics has nothing to estimate.")
    return buffer
