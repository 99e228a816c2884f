"""Cross-entropies for unevenly filled classes, to compare dot regression with: the prior or a margin in the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.losses.terms import combine_terms, log_prior, of_labels, soft_labels, soft_margins


def logit_adjusted_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | Sequence[int],
    tau: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Compute the cross-entropy of logits shifted by the log prior of their classes.

    .. math:: L = -\log \frac{\exp(u_y + \tau \log \pi_y)}{\sum_k \exp(u_k + \tau \log \pi_k)}

    with :math:`\pi` the class frequencies of the training rows (Menon et al.). With :math:`\tau = 1` this is the
    balanced softmax of Ren et al. (2020).

    Args:
        logits: Tensor (batch, num_classes).
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        class_counts: Training rows of each class (num_classes,), all positive.
        tau: Strength of the adjustment, at least 0.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.

    Returns:
        Scalar tensor, float32 (float64 for float64 logits).

    Raises:
        ValueError: A class count is not positive, or their number differs from that of the classes.

    References:
        Menon et al. (2021). Long-tail learning via logit adjustment. https://arxiv.org/abs/2007.07314
        Ren et al. (2020). Balanced Meta-Softmax. https://arxiv.org/abs/2007.10740

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> round(logit_adjusted_loss(logits, torch.tensor([1]), class_counts=[9, 1]).item(), 4)
        2.3026
    """
    prior = log_prior(class_counts, logits)
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.to(prior.dtype) + tau * prior, labels, label_smoothing=label_smoothing)


def ldam_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | Sequence[int],
    max_margin: float = 12.5,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the label-distribution-aware margin loss: a cross-entropy in which rare classes must win by more.

    .. math:: L = -\log \frac{e^{u_y - \Delta_y}}{e^{u_y - \Delta_y} + \sum_{k \ne y} e^{u_k}}, \qquad
        \Delta_c = \Delta_{\max} \left(\frac{\min_k n_k}{n_c}\right)^{1/4}

    (Cao et al., equations 12 and 13.) Theirs is on cosines u / s with margins of at most 0.5 and s = 30; here margins are in
    units of the logits: half the scale of a cosine head, which is 25 here.

    Args:
        logits: Tensor (batch, num_classes): cosines times a scale.
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        class_counts: Training rows of each class (num_classes,), all positive.
        max_margin: Margin of the rarest class, at least 0.
        class_weights: Tensor (num_classes,), such as ``effective_number_weights`` for the last epochs (the paper's
            deferred re-weighting). The mean is over rows; that of the published code is over weights.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar tensor, or (batch,) with ``reduction="none"``; float32 (float64 for float64 logits).

    Raises:
        ValueError: Counts, labels and logits do not fit, or the margin is negative.

    References:
        Cao, Wei, Gaidon, Arechiga, Ma (2019). Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss.
        https://arxiv.org/abs/1906.07413

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> round(ldam_loss(logits, torch.tensor([1]), class_counts=[16, 1], max_margin=2.0).item(), 4)
        2.1269
    """
    if not max_margin >= 0.0:
        raise ValueError(f"`max_margin` (={max_margin}) must be at least 0.")
    soft = soft_labels(logits, labels, label_smoothing)
    prior = log_prior(class_counts, logits)
    with torch.autocast(logits.device.type, enabled=False):
        margins = soft_margins(logits.to(prior.dtype), labels if soft is None else None)
        wanted = max_margin * torch.exp(0.25 * (prior.min() - prior)).expand(len(logits), -1)
        terms = F.softplus(of_labels(wanted, labels, soft) - margins)
    return combine_terms(terms, labels, soft, class_weights=class_weights, reduction=reduction)


def effective_number_weights(class_counts: Tensor | Sequence[int], *, beta: float = 0.9999) -> Tensor:
    r"""Compute class weights inverse to the effective number of rows, with mean one.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    Args:
        class_counts: Training rows of each class (num_classes,), all positive.
        beta: From 0 (all equal) to below 1 (towards 1 / n).

    Returns:
        Tensor (num_classes,), float64.

    Raises:
        ValueError: ``beta`` is outside [0, 1).

    References:
        Cui, Jia, Lin, Song, Belongie (2019). Class-Balanced Loss Based on Effective Number of Samples.
        https://arxiv.org/abs/1901.05555

    Example:
        >>> effective_number_weights([1, 2], beta=0.5)
        tensor([1.2000, 0.8000], dtype=torch.float64)
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"`beta` (={beta}) must lie in [0, 1).")
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    weights = 1.0 / (1.0 - beta**counts)
    return weights / weights.mean()
