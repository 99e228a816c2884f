"""What the losses share: labels as probabilities, margins over the rivals, log priors, and means over rows.

A loss is a term for each row and each class that the row may be of, (batch, num_classes) for soft labels; for class
indices only the label's own term is computed, (batch, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.errors import check_choice

BALANCES = ("none", "in_batch")


def soft_labels(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor | None:
    """Return labels as probabilities where they are needed as such, after checking them.

    Args:
        logits: Tensor (batch, num_classes).
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.

    Returns:
        Tensor (batch, num_classes), float32 at least; None for class indices without smoothing.

    Raises:
        ValueError: Labels and logits do not fit, an index is outside the classes, or the share outside [0, 1).
    """
    batch, num_classes = logits.shape
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` (={label_smoothing}) must lie in [0, 1).")
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)}; probabilities need that of the logits, {tuple(logits.shape)}."
            )
        soft = labels.to(torch.promote_types(logits.dtype, torch.float32))
    else:
        if labels.shape != (batch,):
            raise ValueError(f"`labels` has shape {tuple(labels.shape)}; class indices need shape ({batch},).")
        readable = labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling()
        if readable and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"`labels` reach from {int(labels.min())} to {int(labels.max())}, but the logits have {num_classes} classes: "
                f"indices must lie in [0, {num_classes - 1}]."
            )
        if label_smoothing == 0.0:
            return None
        soft = F.one_hot(labels, num_classes).to(torch.promote_types(logits.dtype, torch.float32))
    return (1.0 - label_smoothing) * soft + label_smoothing / num_classes if label_smoothing else soft


def of_labels(values: Tensor, labels: Tensor, soft: Tensor | None) -> Tensor:
    """Return the values (batch, 1) at the labels where these are indices, all values (batch, num_classes) otherwise."""
    return values.gather(1, labels.unsqueeze(1)) if soft is None else values


def soft_margins(scores: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    r"""Compute by how much the score of a class exceeds the soft maximum of all others.

    .. math:: z_k = a_k - \tau \log \sum_{j \ne k} e^{a_j / \tau}

    and :math:`a_k - \max_{j \ne k} a_j` for :math:`\tau = 0`. It is the one number of a row that a softmax sees: the
    cross-entropy of :math:`a / \tau` is :math:`\log(1 + e^{-z_y / \tau})`.

    Args:
        scores: Tensor (batch, num_classes).
        labels: Tensor (batch,) of the classes whose margins are wanted; all classes where None.
        temperature: The temperature :math:`\tau` of the maximum, at least 0.

    Returns:
        Tensor (batch, 1) for labels, else (batch, num_classes).

    Raises:
        ValueError: The temperature is negative.

    Example:
        >>> soft_margins(torch.tensor([[3.0, 1.0, 2.0]]), temperature=0.0).tolist()
        [[1.0, -2.0, -1.0]]
    """
    if not temperature >= 0.0:
        raise ValueError(f"`temperature` (={temperature}) must be at least 0.")
    if labels is not None:
        column = labels.unsqueeze(1)
        return scores.gather(1, column) - _soft_maximum(scores.scatter(1, column, -torch.inf), temperature)
    best = scores.argmax(dim=1, keepdim=True)
    without_best = _soft_maximum(scores.scatter(1, best, -torch.inf), temperature)
    if temperature == 0.0:
        rivals = scores.gather(1, best).expand_as(scores)
    else:
        # The others' sum is that of all less one's own, which is at most half of it unless one is the best.
        scaled = scores / temperature
        share = scaled.softmax(dim=1).scatter(1, best, 0.0)
        rivals = temperature * (scaled.logsumexp(dim=1, keepdim=True) + torch.log1p(-share))
    return scores - rivals.scatter(1, best, without_best)


def log_prior(class_counts: Tensor | Sequence[int], logits: Tensor) -> Tensor:
    """Compute the logarithm of the classes' shares of the training rows.

    Args:
        class_counts: Training rows of each class (num_classes,), all positive.
        logits: Tensor (batch, num_classes) whose device and, from float32 on, dtype the result has.

    Returns:
        Tensor (num_classes,).

    Raises:
        ValueError: A class count is not positive, or their number differs from that of the classes.
    """
    counts = torch.as_tensor(class_counts, device=logits.device)
    if counts.shape != logits.shape[-1:]:
        raise ValueError(
            f"`class_counts` has shape {tuple(counts.shape)}, but the logits have {logits.shape[-1]} classes: "
            "one count for each class is needed."
        )
    logs = torch.log(counts.to(torch.float64) / counts.sum())
    return logs.to(torch.promote_types(logits.dtype, torch.float32))


def require_counts(class_counts: Sequence[int] | None, loss: str) -> Tensor:
    """Return the class counts that a loss needs, checked once for all batches.

    Raises:
        ValueError: There are none, or one is not positive.
    """
    if class_counts is None:
        raise ValueError(
            f"`class_counts` (=None) is needed by the loss {loss!r}: pass the training rows of each class."
        )
    counts = torch.as_tensor(class_counts)
    if (counts <= 0).any():
        empty = int((counts <= 0).nonzero()[0])
        raise ValueError(
            f"`class_counts[{empty}]` (={counts[empty].item()}) must be positive: the log prior of a class without rows is "
            "infinite; drop the class or give it a row."
        )
    return counts


def combine_terms(
    terms: Tensor,
    labels: Tensor,
    soft: Tensor | None,
    *,
    class_weights: Tensor | None = None,
    balance: str = "none",
    reduction: str = "mean",
) -> Tensor:
    """Weight the terms by labels and classes, and take their sum over classes and mean over rows.

    Args:
        terms: Tensor (batch, 1) of the labels' own terms, or (batch, num_classes).
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        soft: What ``soft_labels`` made of them.
        class_weights: Tensor (num_classes,): factor of each class's term. The mean is over rows, not over weights.
        balance: ``"none"``, or ``"in_batch"``: the mean over the classes present in the batch of each one's mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar tensor, or (batch,) with ``reduction="none"``.
    """
    check_choice("balance", balance, BALANCES)
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
    rows_of_loss = terms.sum(dim=1)
    return rows_of_loss if reduction == "none" else rows_of_loss.mean() if reduction == "mean" else rows_of_loss.sum()


def _soft_maximum(scores: Tensor, temperature: float) -> Tensor:
    if temperature == 0.0:
        return scores.amax(dim=1, keepdim=True)
    return temperature * torch.logsumexp(scores / temperature, dim=1, keepdim=True)
