"""Laws of what the losses share: the soft margin, log priors, and labels that fit their logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.losses import terms
from etf_adapt.losses.dot_regression import dot_regression_loss
from etf_adapt.losses.terms import LabelMargins, log_prior, soft_margins

temperatures = pytest.mark.parametrize("temperature", [0.0, 0.05, 1.0])


def draw(num_classes, batch=32):
    generator = torch.Generator().manual_seed(0)
    scores = 3.0 * torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return scores, torch.randint(num_classes, (batch,), generator=generator)


@temperatures
@pytest.mark.parametrize("num_classes", [2, 3, 40])
def test_margins_are_the_scores_less_the_soft_maximum_of_the_others(num_classes, temperature):
    scores, labels = draw(num_classes)
    columns = []
    for k in range(num_classes):
        rivals = torch.cat([scores[:, :k], scores[:, k + 1 :]], dim=1)
        best = rivals.amax(1) if temperature == 0.0 else temperature * torch.logsumexp(rivals / temperature, 1)
        columns.append(scores[:, k] - best)
    slow = torch.stack(columns, dim=1)
    torch.testing.assert_close(soft_margins(scores, temperature=temperature), slow)
    own = soft_margins(scores, temperature=temperature).gather(1, labels[:, None])
    torch.testing.assert_close(own, slow.gather(1, labels[:, None]))


@temperatures
def test_margins_of_all_classes_have_finite_gradients_also_for_ties_and_certainty(temperature):
    scores = torch.tensor([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0], [-500.0, 1.0, 1.0]], requires_grad=True)
    margins = soft_margins(scores, temperature=temperature)
    (gradient,) = torch.autograd.grad(margins.sum(), scores)
    assert torch.isfinite(margins).all() and torch.isfinite(gradient).all()


def test_the_gradient_of_one_margin_is_that_of_all():
    scores, labels = draw(5)
    scores.requires_grad_()
    (one,) = torch.autograd.grad(soft_margins(scores).gather(1, labels[:, None]).sum(), scores)
    (of_all,) = torch.autograd.grad(soft_margins(scores).gather(1, labels[:, None]).sum(), scores)
    torch.testing.assert_close(one, of_all)


def test_the_margin_is_all_that_a_cross_entropy_sees():
    scores, labels = draw(6)
    for temperature in (0.1, 1.0):
        expected = F.cross_entropy(scores / temperature, labels, reduction="none")
        margins = soft_margins(scores, temperature=temperature).gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(F.softplus(-margins / temperature), expected)


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"`temperature` \(=-1.0\)"):
        soft_margins(torch.zeros(1, 2), temperature=-1.0)


def test_log_priors_are_those_of_the_counts():
    prior = log_prior([3, 1], torch.zeros(1, 2))
    torch.testing.assert_close(prior.exp(), torch.tensor([0.75, 0.25]))
    with pytest.raises(ValueError, match="one count for each of the 3 classes"):
        log_prior([3, 1], torch.zeros(1, 3))


def test_labels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="from 0 to 3"):
        dot_regression_loss(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"probabilities \(2, 3\)"):
        dot_regression_loss(torch.zeros(2, 3), torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"shape \(3,\): class indices need \(2,\)"):
        dot_regression_loss(torch.zeros(2, 3), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("block", [1, 20, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_margins_by_blocks_are_those_of_the_formula_with_their_gradient(monkeypatch, block, dtype):
    monkeypatch.setattr(terms, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(7, 9, generator=generator, dtype=dtype)).requires_grad_(True)
    labels, outer = torch.arange(7), torch.randn(7, 1, generator=generator, dtype=dtype)
    offsets = torch.randn(9, generator=generator, dtype=dtype)
    fast = LabelMargins.apply(logits, labels, 1.3, offsets, 0.25)
    slow = soft_margins(1.3 * logits + offsets, temperature=0.25).gather(1, labels[:, None])
    torch.testing.assert_close(fast, slow)
    gradients = [torch.autograd.grad(margins, logits, outer)[0] for margins in (fast, slow)]
    torch.testing.assert_close(*gradients)
    assert bool((gradients[0] != 0).any(dim=1).all())


def test_margins_by_blocks_have_the_gradient_that_differences_say():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(True)
    offsets = torch.linspace(-1, 1, 5, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda given: LabelMargins.apply(given, labels, 1.1, offsets, 0.5), logits)
    with torch.no_grad():  # equal scores, and one far above all others
        far = torch.tensor([[0.0, 0, 0, 0, 0], [1e30, 0, 0, 0, 0]])
        found = LabelMargins.apply(far, torch.tensor([1, 1]), 1.0, torch.zeros(5), 1.0)
    torch.testing.assert_close(found[:, 0], torch.tensor([-math.log(4.0), -1e30]))
