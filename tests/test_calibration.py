"""Laws of the temperature: it undoes a factor on the logits and keeps the argmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.calibration import TemperatureFit


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
