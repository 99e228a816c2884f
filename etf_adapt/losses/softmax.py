"""The cross-entropies that dot regression is compared with: plain, weighted by class, focal, and with the prior in the logits.

Class weights are factors of each row's loss, and the mean is over rows, for class indices and for soft labels alike: that of
a batch is that of its equal parts. (torch's own mean divides by the weights in the batch for indices, and by rows for soft
labels.) The balanced weights n / (K n_c) are 1 on average over the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.losses.terms import combine_terms, log_prior, soft_labels


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    r"""Compute the mean over rows of :math:`-\sum_k w_k y_k \log p_k`; labels are class indices or probabilities."""
    weight = None if class_weights is None else class_weights.to(logits)
    return F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=label_smoothing).mean()


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Compute the mean over rows of :math:`-\sum_k w_k y_k (1 - p_k)^\gamma \log p_k`, p the softmax.

    Of Lin et al. (2017), Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002, their equation 5 with their
    :math:`\alpha` as class weights; with :math:`\gamma = 0` it is the cross-entropy. Labels as above.
    """
    if not gamma >= 0.0:
        raise ValueError(f"`gamma` (={gamma}) must be at least 0.")
    soft = soft_labels(logits, labels, label_smoothing)
    logs = logits.log_softmax(dim=1)
    if soft is None:
        logs = logs.gather(1, labels.unsqueeze(1))
    # The floor keeps the gradient of a row that is certain finite for gamma below 1.
    others = (-torch.expm1(logs)).clamp_min(torch.finfo(logs.dtype).tiny)
    return combine_terms(-(others**gamma) * logs, labels, soft, class_weights=class_weights)


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

    with :math:`\pi` the class frequencies of the training rows. With :math:`\tau = 1` it is the balanced softmax of Ren et al.

    Args:
        logits: Tensor (batch, num_classes).
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        class_counts: Training rows of each class (num_classes,), all positive.
        tau: Strength of the adjustment, at least 0.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.

    Returns:
        Scalar tensor, float32 (float64 for float64 logits).

    Raises:
        ValueError: The number of class counts is not that of the classes.

    References:
        Menon et al. (2021). Long-tail learning via logit adjustment. https://arxiv.org/abs/2007.07314
        Ren et al. (2020). Balanced Meta-Softmax. https://arxiv.org/abs/2007.10740

    Example:
        >>> round(logit_adjusted_loss(torch.zeros(1, 2), torch.tensor([1]), class_counts=[9, 1]).item(), 4)
        2.3026
    """
    prior = log_prior(class_counts, logits)
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.to(prior.dtype) + tau * prior, labels, label_smoothing=label_smoothing)
