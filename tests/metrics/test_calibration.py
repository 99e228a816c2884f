"""Laws of what is fitted after training: it undoes a factor and a prior in the logits, and is the best within its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from slow_cases import rest_slow
from torch.utils._python_dispatch import TorchDispatchMode

from etf_adapt.losses.terms import log_prior
from etf_adapt.metrics import calibration
from etf_adapt.metrics.calibration import FACTORS, fit_logit_scale, fit_prior_adjustment

COUNTS = [500, 100, 20, 5]


def fair_rows(num_rows=6000):
    """Draw logits that are fair where classes are even, the log prior to add to them, and labels."""
    generator = torch.Generator().manual_seed(1)
    logits = 2.0 * torch.randn(num_rows, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits, log_prior(COUNTS, logits), labels


def hard_rows(seed):
    """Draw logits of any scale and separation, with a multiple of the log prior in them, labels and class counts."""
    generator = torch.Generator().manual_seed(seed)
    num_classes, rows = (int(torch.randint(*span, (1,), generator=generator)) for span in ((2, 8), (10, 400)))
    counts = (1000 * torch.rand(num_classes, generator=generator) ** 4 + 2).long()
    frequencies = counts.double() / counts.sum()
    labels = torch.multinomial(frequencies, rows, replacement=True, generator=generator)
    scale = 10 ** (torch.rand(1, generator=generator) * 3 - 0.5)
    separation = 10 ** (torch.rand(1, generator=generator) * 1.5 - 0.5)
    logits = separation * torch.nn.functional.one_hot(labels, num_classes).float()
    logits = logits + 0.5 * torch.randn(rows, num_classes, generator=generator)
    return scale * (logits + torch.log(frequencies).float() * torch.randn(1, generator=generator)), labels, counts


def loss(factor, strength, logits, labels, counts, *, by_class):
    """Compute the loss from its definition."""
    rows, prior = len(labels), torch.as_tensor(counts).double().log() - math.log(sum(counts))
    held = torch.bincount(labels, minlength=len(counts))
    weights = rows / ((held > 0).sum() * held.clamp_min(1)) if by_class else torch.ones(len(counts))
    logs = (factor * logits.double() - strength * prior).log_softmax(dim=1)
    return float(-(weights[labels] * logs[torch.arange(rows), labels]).sum() - logs.mean())


@pytest.mark.parametrize(("factor", "strength"), [(1.0, 1.0), (3.0, 0.5), (0.2, 1.5), (20.0, 0.0)])
def test_a_factor_and_a_prior_in_the_logits_are_undone(factor, strength):
    logits, prior, labels = fair_rows()
    s, t = fit_prior_adjustment((logits + strength * prior) / factor, labels, torch.tensor(COUNTS))
    assert s == pytest.approx(factor, rel=0.06) and t == pytest.approx(strength, abs=0.08)
    assert fit_logit_scale(logits / factor, labels) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(
    "seed", rest_slow([0, 3, 91, 1, 18, 68, 89], fast=3)
)  # all but 0 and 1 have defeated Newton's steps
def test_the_fit_beats_a_fine_grid_wherever_the_minimum_lies(seed):
    rows = hard_rows(seed)
    factors, strengths = 2.0 ** np.arange(-6, 10.1, 0.25), np.arange(0, 8, 0.25)
    best = min(loss(s, t, *rows, by_class=True) for s in factors for t in strengths)
    assert loss(*fit_prior_adjustment(*rows), *rows, by_class=True) <= best * (1 + 1e-12)
    best = min(loss(s, 0.0, *rows, by_class=False) for s in np.geomspace(*FACTORS, 501))
    assert loss(fit_logit_scale(*rows[:2]), 0.0, *rows, by_class=False) <= best * (1 + 1e-12)


@pytest.mark.parametrize("point", [[-1.0, 0.0], [0.5, 2.0]])
def test_the_gradient_is_that_of_finite_differences(point):
    logits, prior, labels = fair_rows(50)
    arguments = logits, labels, torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), prior
    expected = approx_fprime(np.array(point), lambda x: calibration._loss(x, *arguments)[0], 1e-7)
    assert calibration._loss(np.array(point), *arguments)[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [10, 1000])
def test_rows_that_are_all_right_leave_room_for_one_error_in_their_number(count):
    logits = torch.tensor([[1.0, -1.0]]).repeat(count, 1)
    factor = fit_logit_scale(logits, torch.zeros(count, dtype=torch.long))
    error = 1.0 - (factor * logits[0]).softmax(dim=0)[0].item()
    assert error == pytest.approx(0.5 / (count + 1), rel=1e-3)  # half of the uniform row is wrong


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("labels", [[0, 1] * 4, [1, 0] * 4, [0], [1], [1, 1, 1]])
def test_rows_that_say_little_give_finite_numbers_within_the_bounds(num_classes, scale, labels):
    logits = scale * torch.eye(num_classes)[[0, 1] * 4][: len(labels)]  # all right, all wrong, one row, one class
    s, t = fit_prior_adjustment(logits, torch.tensor(labels), torch.tensor([9, 3, 1])[:num_classes])
    factors = s, fit_logit_scale(logits, torch.tensor(labels))
    assert all(FACTORS[0] <= factor <= FACTORS[1] for factor in factors) and 0.0 <= t < math.inf


def test_no_rows_change_nothing():
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert fit_logit_scale(*none) == 1.0 and fit_prior_adjustment(*none, torch.tensor(COUNTS)) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["_CHUNK", "_SAMPLE"])
def test_chunks_of_rows_and_the_sample_that_the_fit_begins_on_change_nothing(name, monkeypatch):
    logits, prior, labels = fair_rows(100)
    whole = fit_prior_adjustment(logits + prior, labels, COUNTS)
    monkeypatch.setattr(calibration, name, 37)
    assert fit_prior_adjustment(logits + prior, labels, COUNTS) == pytest.approx(whole, rel=1e-6)


class Largest(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel() * result.element_size())
        return result


def test_nothing_beside_the_logits_is_as_large_as_they_are():
    logits, labels = torch.randn(1000, 500, generator=torch.Generator().manual_seed(0)), torch.arange(1000) % 500
    with Largest() as largest:
        fit_prior_adjustment(logits, labels, torch.arange(1, 501))
    assert largest.size == logits.numel() * logits.element_size(), (
        "a view of them; in float64 they would be twice as large"
    )
