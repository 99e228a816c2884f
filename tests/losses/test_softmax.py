"""Laws of logit adjustment."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from etf_adapt.losses.softmax import logit_adjusted_loss


def draw(num_classes, batch=32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


def test_with_even_counts_it_is_cross_entropy():
    logits, labels = draw(4)
    torch.testing.assert_close(
        logit_adjusted_loss(logits, labels, class_counts=[7] * 4), F.cross_entropy(logits, labels)
    )


def test_it_is_the_balanced_softmax():
    logits, labels = draw(3)
    counts = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    weighted = counts * logits.exp()
    expected = -(weighted.gather(1, labels[:, None]).squeeze(1) / weighted.sum(dim=1)).log().mean()
    torch.testing.assert_close(logit_adjusted_loss(logits, labels, class_counts=counts), expected)


def test_half_precision_logits_give_a_float32_loss():
    logits, labels = draw(4)
    half = logits.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = logit_adjusted_loss(half, labels, class_counts=[9, 4, 2, 1])
    torch.testing.assert_close(loss, logit_adjusted_loss(half.float(), labels, class_counts=[9, 4, 2, 1]))
