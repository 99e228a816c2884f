"""What the losses share: labels as probabilities, margins over the rivals, log priors, and means over rows.

A loss is a term for each row and each class that the row may be of, (batch, num_classes) for soft labels; for class
indices only the label's own term is computed, (batch, 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.errors import check_choice

_BLOCK = 2**17  # logits of a block: half a megabyte


def soft_labels(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor | None:
    """Return labels as probabilities (batch, num_classes), checked; None for class indices without smoothing."""
    batch, num_classes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` (={label_smoothing}) must lie in [0, 1).")
    if labels.shape != (logits.shape if labels.is_floating_point() else (batch,)):
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}: class indices need ({batch},), probabilities ({batch}, {num_classes})."
        )
    if labels.is_floating_point():
        soft = labels.to(dtype)
    else:
        # On a GPU the check would wait for the device at every step, under torch.compile break the graph.
        readable = labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling()
        if readable and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"`labels` reach from {int(labels.min())} to {int(labels.max())}, but the logits have {num_classes} classes: "
                f"indices must lie in [0, {num_classes - 1}]."
            )
        if label_smoothing == 0.0:
            return None
        soft = F.one_hot(labels, num_classes).to(dtype)
    return (1.0 - label_smoothing) * soft + label_smoothing / num_classes if label_smoothing else soft


def soft_margins(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Compute by how much the score of a class exceeds the soft maximum of all others.

    .. math:: z_k = a_k - \tau \log \sum_{j \ne k} e^{a_j / \tau}

    and :math:`a_k - \max_{j \ne k} a_j` for :math:`\tau = 0`. It is all that a softmax sees of a row: the cross-entropy of
    :math:`a / \tau` is :math:`\log(1 + e^{-z_y / \tau})`. A number added to all scores of a row changes nothing.
    """
    if not temperature >= 0.0:
        raise ValueError(f"`temperature` (={temperature}) must be at least 0.")
    best = scores.argmax(dim=1, keepdim=True)
    others = scores.scatter(1, best, -torch.inf)
    if temperature == 0.0:
        rivals = scores.gather(1, best).expand_as(scores)
        without_best = others.amax(dim=1, keepdim=True)
    else:
        # The others' sum is that of all less one's own, which is at most half of it unless one is the best.
        scaled = scores / temperature
        share = scaled.softmax(dim=1).scatter(1, best, 0.0)
        rivals = temperature * (scaled.logsumexp(dim=1, keepdim=True) + torch.log1p(-share))
        without_best = temperature * torch.logsumexp(others / temperature, dim=1, keepdim=True)
    return scores - rivals.scatter(1, best, without_best)


class LabelMargins(torch.autograd.Function):
    r"""The ``soft_margins`` of labels for scores :math:`a_k = s u_k + o_k`, by blocks of rows that a core's cache holds."""

    # Where classes are many, each pass over all logits costs a good part of what the head costs.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, scale: float, offsets: Tensor, temperature: float) -> Tensor:
        """Return the margins (batch, 1); ``offsets`` is (num_classes,), labels are (batch,)."""
        column, scaled = labels.unsqueeze(1), offsets / temperature
        margins, rivals = (torch.empty_like(column, dtype=logits.dtype) for _ in range(2))
        for some, own, margin, rival in _blocks(logits, column, margins, rivals):
            scores = torch.add(scaled, some, alpha=scale / temperature)
            mine = scores.gather(1, own)
            top = scores.scatter_(1, own, -torch.inf).amax(dim=1, keepdim=True)
            rival.copy_(top + scores.sub_(top).exp_().sum(dim=1, keepdim=True).log_())
            margin.copy_(temperature * (mine - rival))
        ctx.save_for_backward(logits, column, scaled, rivals)
        ctx.factors = scale, temperature
        return margins

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits: for each row e_y less the softmax over the rivals."""
        logits, column, scaled, rivals = ctx.saved_tensors
        scale, temperature = ctx.factors
        gradient = torch.empty_like(logits)
        for some, own, rival, slope, shares in _blocks(logits, column, rivals, scale * outer, gradient):
            torch.add(scaled, some, alpha=scale / temperature, out=shares)
            shares.sub_(rival).exp_().mul_(-slope).scatter_(1, own, slope)
        return gradient, None, None, None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors (batch, ...) by blocks of rows, as many as of the first, the logits, a block holds."""
    rows = max(1, _BLOCK // tensors[0].shape[1]) if tensors[0].device.type == "cpu" else len(tensors[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def log_prior(class_counts: Tensor | Sequence[int], logits: Tensor) -> Tensor:
    """Return the log of the classes' shares of the training rows (num_classes,), in the logits' dtype (float32 at least)."""
    counts = torch.as_tensor(class_counts, device=logits.device)
    if counts.shape != logits.shape[-1:]:
        raise ValueError(
            f"`class_counts` (of shape {tuple(counts.shape)}) must have one count for each of the {logits.shape[-1]} classes."
        )
    prior = counts.to(torch.float64) / counts.sum()
    return prior.log().to(torch.promote_types(logits.dtype, torch.float32))


def combine_terms(
    terms: Tensor,
    labels: Tensor,
    soft: Tensor | None,
    *,
    class_weights: Tensor | None = None,
    balance: str = "none",
    reduction: str = "mean",
) -> Tensor:
    """Weight terms (batch, 1 or num_classes) by soft labels and classes; sum over classes, reduce over rows.

    ``balance="in_batch"`` is the mean over the classes in the batch of each one's mean; options as in ``dot_regression_loss``.
    """
    check_choice("balance", balance, ("none", "in_batch"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if soft is not None:
        terms = terms * soft
    if class_weights is not None:
        weights = class_weights.to(terms)
        terms = terms * (weights[labels].unsqueeze(1) if soft is None else weights)
    if balance == "in_batch":
        rows = torch.bincount(labels) if soft is None else soft.sum(dim=0)
        share = torch.where(rows > 0, len(terms) / ((rows > 0).sum() * rows.clamp_min(1e-12)), 0.0).to(terms.dtype)
        terms = terms * (share[labels].unsqueeze(1) if soft is None else share)
    row_losses = terms.sum(dim=1)
    return row_losses if reduction == "none" else row_losses.mean() if reduction == "mean" else row_losses.sum()
