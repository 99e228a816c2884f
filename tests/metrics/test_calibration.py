"""Laws of what is fitted after training: it undoes a factor and a prior in the logits, and is the best there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from etf_adapt.metrics.calibration import TemperatureFit, fit_prior_adjustment


def rows(count=4000):
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(count, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


def fitted(logits, labels, parts=1):
    fit = TemperatureFit()
    for part in range(parts):
        fit.add_batch(logits[part::parts], labels[part::parts])
    return fit.factor()


@pytest.mark.parametrize("factor", [0.05, 0.3, 1.0, 20.0])
def test_a_factor_on_the_logits_is_undone(factor):
    logits, labels = rows()
    assert fitted(factor * logits, labels) * factor == pytest.approx(1.0, abs=0.05)


def test_the_minimum_is_that_of_a_fine_search():
    logits, labels = rows()
    grid = torch.linspace(0.7, 1.4, 701)
    losses = [F.cross_entropy(s * logits, labels).item() for s in grid]
    assert fitted(logits, labels) == pytest.approx(grid[losses.index(min(losses))].item(), abs=1e-2)


def test_batches_add_up():
    logits, labels = rows(300)
    assert fitted(logits, labels, parts=7) == pytest.approx(fitted(logits, labels), rel=1e-6)


@pytest.mark.parametrize("count", [10, 1000])
def test_rows_that_are_all_right_leave_room_for_one_error_in_their_number(count):
    logits = torch.tensor([[1.0, -1.0]]).repeat(count, 1)
    factor = fitted(logits, torch.zeros(count, dtype=torch.long))
    error = 1.0 - (factor * logits[0]).softmax(dim=0)[0].item()
    assert error == pytest.approx(0.5 / (count + 1), rel=0.25)  # half of the uniform row is wrong


def test_no_rows_change_nothing():
    assert TemperatureFit().factor() == 1.0


def long_tailed_rows(counts, count=6000):
    """Draw evidence that is fair where classes are even, the log prior to add to it, and labels."""
    generator = torch.Generator().manual_seed(1)
    prior = torch.log(torch.tensor(counts, dtype=torch.float64) / sum(counts))
    evidence = 2.0 * torch.randn(count, len(counts), generator=generator, dtype=torch.float64)
    labels = torch.multinomial(evidence.softmax(dim=1), 1, generator=generator).squeeze(1)
    return evidence, prior, labels


@pytest.mark.parametrize(("factor", "strength"), [(1.0, 1.0), (3.0, 0.5), (0.2, 1.5), (1.0, 0.0)])
def test_a_prior_in_the_logits_is_taken_out_with_its_factor(factor, strength):
    counts = [500, 100, 20, 5]
    evidence, prior, labels = long_tailed_rows(counts)
    s, t = fit_prior_adjustment((evidence + strength * prior) / factor, labels, counts)
    assert s == pytest.approx(factor, rel=0.06) and t == pytest.approx(strength, abs=0.08)


def test_it_is_the_best_of_all_factors_and_strengths():
    counts = [50, 20, 3]
    evidence, prior, labels = long_tailed_rows(counts, count=40)
    logits = evidence + prior
    weights = 1.0 / (3 * torch.bincount(labels, minlength=3).double())

    def objective(s, t):
        logs = F.log_softmax(s * logits - t * prior, dim=1)
        uniform = -logs.mean(dim=1).sum() / len(labels)
        return (len(labels) * weights[labels] * -logs[torch.arange(len(labels)), labels]).sum() + uniform

    best = objective(*fit_prior_adjustment(logits, labels, counts))
    grid = [objective(s, t) for s in torch.arange(0.05, 3.0, 0.05) for t in torch.arange(0.0, 3.0, 0.05)]
    assert best <= min(grid) + 1e-9


def test_rows_that_are_all_right_give_finite_numbers():
    s, t = fit_prior_adjustment(10.0 * torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4), [9, 3, 1])
    assert 0.0 < s < 1024.0 and 0.0 <= t < 10.0
    assert fit_prior_adjustment(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), [9, 3, 1]) == (1.0, 0.0)


def test_chunks_of_rows_change_nothing(monkeypatch):
    evidence, prior, labels = long_tailed_rows([50, 20, 3], count=100)
    whole = fit_prior_adjustment(evidence + prior, labels, [50, 20, 3])
    monkeypatch.setattr("etf_adapt.metrics.calibration._CHUNK", 7)
    assert fit_prior_adjustment(evidence + prior, labels, [50, 20, 3]) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 3, 18, 68, 89, 91])  # the last five once ended at a bound, far from the minimum
def test_the_adjustment_is_the_least_loss_within_the_bounds_wherever_it_lies(seed):
    generator = torch.Generator().manual_seed(seed)
    num_classes, rows = (int(torch.randint(*span, (1,), generator=generator)) for span in ((2, 8), (10, 400)))
    counts = (1000 * torch.rand(num_classes, generator=generator) ** 4 + 2).long()
    frequencies = counts.double() / counts.sum()
    labels = torch.multinomial(frequencies, rows, replacement=True, generator=generator)
    scale = 10 ** (torch.rand(1, generator=generator) * 3 - 0.5)
    separation = 10 ** (torch.rand(1, generator=generator) * 1.5 - 0.5)
    logits = separation * torch.nn.functional.one_hot(labels, num_classes).float()
    logits = logits + 0.5 * torch.randn(rows, num_classes, generator=generator)
    logits = scale * (logits + torch.log(frequencies).float() * torch.randn(1, generator=generator))

    held = torch.bincount(labels, minlength=num_classes)
    weights = (rows / ((held > 0).sum() * held.clamp_min(1)))[labels]

    def loss(factor, strength):
        logs = (factor * logits.double() - strength * frequencies.log()).log_softmax(dim=1)
        return float(-(weights * logs[torch.arange(rows), labels]).sum() - logs.mean())

    found = loss(*fit_prior_adjustment(logits, labels, counts))
    grid = [loss(2.0**exponent, strength) for exponent in np.arange(-6, 10.1, 0.5) for strength in np.arange(0, 8, 0.5)]
    assert found <= min(grid) * (1 + 1e-6)
