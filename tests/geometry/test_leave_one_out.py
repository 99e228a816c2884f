"""Leaving an example out is the same as fitting without it; the penalty is chosen by that."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry import leave_one_out
from etf_adapt.geometry.leave_one_out import LeaveOneOut, choose_penalty, usable_sample
from etf_adapt.geometry.statistics import ClassStatistics

COUNTS = (14, 9, 4, 2, 7)
intercepts = pytest.mark.parametrize("intercept", [True, False])


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    means = 1.5 * torch.randn(len(COUNTS), 6, generator=generator, dtype=torch.float64)
    scales = torch.linspace(0.3, 2.0, 6, dtype=torch.float64)
    features = means[labels] + scales * torch.randn(len(labels), 6, generator=generator, dtype=torch.float64) + 3.0
    return features, labels


def statistics(features, labels):
    return ClassStatistics.of(features, labels, len(COUNTS))


def without_each(features, labels):
    """Yield each row with the statistics of all others."""
    for row in range(len(labels)):
        keep = torch.arange(len(labels)) != row
        yield row, statistics(features[keep], labels[keep])


@intercepts
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_scores_are_those_of_the_head_refitted_without_the_row(rows, intercept, penalty):
    """The slow reference keeps the divisor of the covariance and the absolute penalty of the whole."""
    features, labels = rows
    whole = statistics(features, labels)
    ridge = penalty * whole.within.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    slow = []
    for row, part in without_each(features, labels):
        center = part.center if intercept else torch.zeros(6, dtype=torch.float64)
        offsets = part.means - center
        covariance = (len(labels) - 1) / len(labels) * part.within + ridge
        weight = torch.linalg.solve(covariance, offsets.T).T
        weight = weight / (weight * offsets).sum(dim=1, keepdim=True).sqrt()
        slow.append(weight @ (features[row] - center))
    fast = LeaveOneOut(whole, intercept=intercept).scores(features, labels, penalty=penalty)
    centre = lambda scores: scores - scores.mean(dim=1, keepdim=True)
    torch.testing.assert_close(centre(fast), centre(torch.stack(slow)))


def test_the_chosen_penalty_grows_with_the_noise():
    """Few rows in many noisy dimensions need a strong penalty, many rows in few a weak one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    noisy = torch.randn(30, 60, generator=generator) + torch.nn.functional.one_hot(labels, 60) * 3.0
    many_labels = torch.arange(3000) % 3
    spread = torch.tensor([0.05, 5.0, 5.0, 5.0])
    correlated = torch.randn(3000, 1, generator=generator) * spread + 0.3 * torch.randn(3000, 4, generator=generator)
    clear = correlated + torch.nn.functional.one_hot(many_labels, 4)
    (strong, _), (weak, _) = (
        choose_penalty(ClassStatistics.of(x, y, 3), x, y) for x, y in ((noisy, labels), (clear, many_labels))
    )
    assert strong > weak


def test_where_classes_are_many_a_penalty_is_chosen_by_every_nth_row(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8, generator=generator) + torch.nn.functional.one_hot(labels, 8)
    whole = ClassStatistics.of(features, labels, 3)
    assert len(usable_sample(whole, features, labels)[0]) == 60
    chosen = choose_penalty(whole, features, labels)
    monkeypatch.setattr(leave_one_out, "_CHUNK", 7)  # no row at a time, or two: the same
    assert choose_penalty(whole, features, labels) == chosen
    monkeypatch.setattr(leave_one_out, "_SCORES", 3 * 15)
    assert usable_sample(whole, features, labels)[1].tolist() == labels[::4].tolist()


def test_with_one_row_a_class_nothing_can_be_chosen_or_measured():
    features, labels = torch.randn(4, 3), torch.arange(4)
    stats = ClassStatistics.of(features, labels, 4)
    penalty, accuracy = choose_penalty(stats, features, labels)
    assert penalty == 1.0 and accuracy != accuracy
