"""Laws of the cross-entropies: weighted by class, focal, and adjusted by the prior."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.losses.softmax import cross_entropy_loss, focal_loss, logit_adjusted_loss


def draw(num_classes, batch=32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


LOSSES = {
    "cross_entropy": cross_entropy_loss,
    "focal": focal_loss,
    "focal, gamma 0.5": lambda *data, **options: focal_loss(*data, gamma=0.5, **options),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@losses
def test_class_weights_are_factors_of_rows_and_the_mean_is_over_rows(loss):
    logits, labels = draw(4)
    weights = torch.tensor([0.5, 1.0, 2.0, 3.5])
    rows = torch.stack([weights[y] * loss(u[None], y[None]) for u, y in zip(logits, labels)])
    torch.testing.assert_close(loss(logits, labels, class_weights=weights), rows.mean())
    halves = [loss(logits[i::2], labels[i::2], class_weights=weights) for i in (0, 1)]
    torch.testing.assert_close(loss(logits, labels, class_weights=weights), sum(halves) / 2)
    soft = F.one_hot(labels, 4).double()
    torch.testing.assert_close(loss(logits, soft, class_weights=weights), rows.mean())


@losses
def test_the_loss_of_soft_labels_is_the_mean_of_those_of_their_classes(loss):
    logits, labels = draw(3)
    soft = logits.flip(0).softmax(dim=1)
    by_class = [(soft[:, k] * torch.stack([loss(u[None], torch.tensor([k])) for u in logits])).mean() for k in range(3)]
    torch.testing.assert_close(loss(logits, soft), sum(by_class))
    smooth = 0.8 * F.one_hot(labels, 3).double() + 0.2 / 3
    torch.testing.assert_close(loss(logits, labels, label_smoothing=0.2), loss(logits, smooth))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_is_its_formula_and_without_gamma_the_cross_entropy(gamma):
    logits, labels = draw(5)
    own = logits.softmax(dim=1).gather(1, labels[:, None])
    torch.testing.assert_close(focal_loss(logits, labels, gamma=gamma), (-((1 - own) ** gamma) * own.log()).mean())
    torch.testing.assert_close(focal_loss(logits, labels, gamma=0.0), F.cross_entropy(logits, labels))
    assert torch.autograd.gradcheck(lambda u: focal_loss(u, labels, gamma=gamma), logits.requires_grad_())


def test_the_gradient_of_focal_loss_is_finite_for_certain_rows():
    logits = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 0.0, 0.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = focal_loss(logits, torch.tensor([0, 0]), gamma=gamma)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all() and gradient[1].abs().sum() > 0


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
