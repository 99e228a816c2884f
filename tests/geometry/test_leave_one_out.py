"""Leaving an example out is the same as fitting without it; the penalty is chosen by that."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry import leave_one_out
from etf_adapt.geometry.closed_form import MEAN_FRAMES, closed_form_vectors
from etf_adapt.geometry.leave_one_out import LeaveOneOut, left_out_changes, usable_sample
from etf_adapt.geometry.penalty import choose_penalty
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


@intercepts
@pytest.mark.parametrize("frame", MEAN_FRAMES)
def test_changes_are_those_of_a_class_whose_mean_is_that_of_its_other_rows(rows, frame, intercept, monkeypatch):
    """The slow reference sets all class vectors again, with covariance and centre of the whole."""
    features, labels = rows
    whole = statistics(features, labels)
    weight, bias = closed_form_vectors(whole, frame, penalty=0.3, intercept=intercept)
    change, bias_change = left_out_changes(whole, features, labels, frame, penalty=0.3, intercept=intercept)
    for name in ("within", "center"):
        value = getattr(whole, name)
        monkeypatch.setattr(ClassStatistics, name, property(lambda self, value=value: value))
    for row, part in without_each(features, labels):
        slow, slow_bias = closed_form_vectors(part, frame, penalty=0.3, intercept=intercept)
        own, others = labels[row], torch.arange(len(COUNTS)) != labels[row]
        # Class vectors are centred over the classes: against another class, the changed one has moved by its change.
        moved = (slow[own] - slow[others]) - (weight[own] - weight[others])
        torch.testing.assert_close(moved, change[row].expand_as(moved))
        moved = (slow_bias[own] - slow_bias[others]) - (bias[own] - bias[others])
        torch.testing.assert_close(moved, bias_change[row].expand_as(moved))


def test_what_cannot_be_left_out_is_refused(rows):
    features, labels = rows
    with pytest.raises(ValueError, match=r"`frame` \(='rotated'\)"):
        left_out_changes(statistics(features, labels), features, labels, "rotated")


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
