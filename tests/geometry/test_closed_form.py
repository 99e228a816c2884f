"""Laws of the closed-form frames, and of the statistics that they are computed from."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry.closed_form import FRAMES, closed_form_vectors
from etf_adapt.geometry.statistics import ClassStatistics

COUNTS = (23, 9, 4, 2, 7)
fitted = pytest.mark.parametrize("frame", [frame for frame in FRAMES if frame != "random"])


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


def test_statistics_add_up_and_equal_their_definition(rows):
    features, labels = rows
    whole = statistics(features, labels)
    parts = sum((statistics(features[i::3], labels[i::3]) for i in range(3)), ClassStatistics.empty(len(COUNTS), 6))
    centred = features - whole.means[labels]
    torch.testing.assert_close(parts.moment, whole.moment)
    torch.testing.assert_close(parts.means, whole.means)
    torch.testing.assert_close(whole.within, centred.T @ centred / len(labels))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("frame", FRAMES)
def test_class_vectors_are_centred_over_the_classes(rows, frame, intercept):
    weight, bias = closed_form_vectors(statistics(*rows), frame, intercept=intercept)
    torch.testing.assert_close(weight.sum(dim=0), torch.zeros(6, dtype=torch.float64))
    assert bias.sum().abs() < 1e-12
    assert intercept or not bias.any()


@pytest.mark.parametrize("frame", FRAMES)
def test_with_an_intercept_the_centre_of_the_classes_has_even_logits(rows, frame):
    weight, bias = closed_form_vectors(statistics(*rows), frame)
    assert (weight @ statistics(*rows).center + bias).abs().max() < 1e-12


def test_whitened_of_two_classes_is_fishers_direction(rows):
    features, labels = rows[0][:32], torch.arange(32) % 2
    stats = ClassStatistics.of(features, labels, 2)
    weight, _ = closed_form_vectors(stats, "whitened", penalty=0.0)
    fisher = torch.linalg.solve(stats.within, stats.means[1] - stats.means[0])
    ours = weight[1] - weight[0]
    torch.testing.assert_close(ours / ours.norm(), fisher / fisher.norm())


def test_whitened_is_means_where_the_within_class_covariance_is_white(rows):
    features, labels = rows
    values, vectors = torch.linalg.eigh(statistics(features, labels).within)
    root = vectors / values.sqrt() @ vectors.T
    weight, bias = closed_form_vectors(statistics(features, labels), "whitened", penalty=0.0)
    white, white_bias = closed_form_vectors(statistics(features @ root, labels), "means")
    torch.testing.assert_close(features @ weight.T + bias, features @ root @ white.T + white_bias)


def test_whitened_is_means_at_a_great_penalty(rows):
    weight, _ = closed_form_vectors(statistics(*rows), "whitened", penalty=1e9)
    means, _ = closed_form_vectors(statistics(*rows), "means")
    torch.testing.assert_close(weight / weight.norm(), means / means.norm())


@fitted
def test_class_vectors_follow_the_relabelling_of_the_classes(rows, frame):
    features, labels = rows
    order = torch.tensor([3, 0, 4, 1, 2])
    weight, bias = closed_form_vectors(statistics(features, labels), frame)
    renamed, renamed_bias = closed_form_vectors(statistics(features, order[labels]), frame)
    torch.testing.assert_close(renamed[order], weight)
    torch.testing.assert_close(renamed_bias[order], bias)


@fitted
def test_argmax_ignores_the_scale_and_the_origin_of_the_features(rows, frame):
    def predicted(features, labels):
        weight, bias = closed_form_vectors(statistics(features, labels), frame, penalty=0.1)
        return (features @ weight.T + bias).argmax(dim=1)

    features, labels = rows
    assert torch.equal(predicted(features, labels), predicted(0.01 * features - 7.0, labels))


def test_of_one_row_a_class_rounding_sets_no_head():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(100)
    features = 100 * torch.randn(100, 192, generator=generator)
    found = ClassStatistics.of(features, labels, 100)
    for _ in range(5):
        moved = features + 0.1 * torch.randn(100, 192, generator=generator)
        found.replace_(features, moved, labels)
        features = moved
        weight, bias = closed_form_vectors(found, "whitened")
        assert torch.equal((features.double() @ weight.T + bias).argmax(dim=1), labels)


def test_errors_name_the_value_and_the_rule(rows):
    stats = statistics(*rows)
    with pytest.raises(ValueError, match="'nearest'"):
        closed_form_vectors(stats, "nearest")
    with pytest.raises(ValueError, match=r"`penalty` \(=-1\)"):
        closed_form_vectors(stats, "whitened", penalty=-1)
    with pytest.raises(ValueError, match="Class 5 has no row"):
        closed_form_vectors(ClassStatistics.of(*rows, 6), "whitened")
