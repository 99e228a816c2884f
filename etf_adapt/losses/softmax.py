"""The cross-entropy for unevenly filled classes that dot regression is compared with: the prior in the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.losses.terms import log_prior


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
