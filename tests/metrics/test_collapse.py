"""Laws of the neural collapse measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etf_adapt.metrics.collapse import NeuralCollapse

COUNTS = [40, 12, 5, 9]
KEYS = ["nc1", "nc2", "nc2_norms", "nc2_angles", "nc3", "nc4"]


@pytest.fixture
def sample():
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(4), COUNTS))
    means = 2.0 * generator.normal(size=(4, 6))
    features = means[labels] + generator.normal(size=(len(labels), 6)) @ np.diag(np.linspace(0.2, 2, 6)) + 5.0
    return features, labels, generator.normal(size=(4, 6)), generator.normal(size=4)


def measure(features, labels, weight, bias=None):
    return NeuralCollapse(weight, bias).compute(features=features, references=labels)


def simplex(num_classes):
    return np.sqrt(num_classes / (num_classes - 1)) * (np.eye(num_classes) - 1 / num_classes)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_all_are_zero_at_collapse(num_classes):
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(num_classes + 3, num_classes)))[0]
    means = 3.0 * simplex(num_classes) @ rotation.T
    labels = np.concatenate([np.arange(num_classes), np.zeros(20, dtype=int)])
    shift = np.linspace(-1, 1, num_classes + 3)
    weight = 0.1 * means + 7.0
    results = measure(means[labels] + shift, labels, weight, -weight @ shift)
    assert list(results) == KEYS
    assert results == pytest.approx(dict.fromkeys(KEYS, 0.0), abs=1e-13)


def test_measures_equal_their_definitions(sample):
    features, labels, weight, bias = sample
    means = np.stack([features[labels == c].mean(axis=0) for c in range(4)])
    offsets = means - means.mean(axis=0)
    within = np.mean([np.cov(features[labels == c].T, bias=True) for c in range(4)], axis=0)
    between = offsets.T @ offsets / 4
    norms = [np.linalg.norm(m) for m in offsets]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    gram = offsets @ offsets.T
    centred = weight - weight.mean(axis=0)
    nearest = [np.argmin([np.sum((h - m) ** 2) for m in means]) for h in features]
    expected = {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4,
        "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(4) - 1 / 4) / np.sqrt(3)),
        "nc2_norms": np.std(norms) / np.mean(norms),
        "nc2_angles": np.mean([abs(offsets[i] @ offsets[j] / (norms[i] * norms[j]) + 1 / 3) for i, j in pairs]),
        "nc3": np.linalg.norm(centred / np.linalg.norm(centred) - offsets / np.linalg.norm(offsets)),
        "nc4": np.mean(np.array(nearest) != (features @ weight.T + bias).argmax(axis=1)),
    }
    assert measure(*sample) == pytest.approx(expected, rel=1e-10)


def test_equally_filled_classes_give_the_original_measure(sample):
    """Papyan, Han, Donoho pool all rows; with equal counts the class-balanced and the pooled covariance agree."""
    features, _, weight, _ = sample
    features, labels = features[:64], np.arange(64) % 4
    means = np.stack([features[labels == c].mean(axis=0) for c in range(4)])
    deviations, offsets = features - means[labels], means - features.mean(axis=0)
    pooled = deviations.T @ deviations / 64
    expected = np.trace(pooled @ np.linalg.pinv(offsets.T @ offsets / 4, rcond=1e-10)) / 4
    assert measure(features, labels, weight)["nc1"] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [1, 7, 66])
def test_batches_add_up_to_the_whole(sample, size):
    features, labels, weight, bias = sample
    metric = NeuralCollapse(torch.tensor(weight), torch.tensor(bias, requires_grad=True))
    parts = [slice(i, i + size) for i in range(0, len(labels), size)]
    for part in parts:
        metric.add_batch(features=torch.tensor(features[part]), references=torch.tensor(labels[part]))
    assert metric.compute() == pytest.approx(measure(*sample), rel=1e-12)
    assert metric.compute(features=features, references=labels) == measure(*sample)


def test_moving_the_feature_space_changes_nothing(sample):
    features, labels, weight, bias = sample
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    shift = np.arange(6.0)
    moved = measure(
        2.5 * features @ rotation + shift, labels, weight @ rotation, 2.5 * bias - weight @ rotation @ shift
    )
    assert moved == pytest.approx(measure(*sample), rel=1e-9)
    far = measure(features + 1e7, labels, weight, bias - 1e7 * weight.sum(axis=1))
    assert far == pytest.approx(measure(*sample), rel=1e-6)


def test_relabelling_and_order_change_nothing(sample):
    features, labels, weight, bias = sample
    order, rows = np.array([2, 0, 3, 1]), np.random.default_rng(3).permutation(len(labels))
    renamed = np.argsort(order)[labels]
    assert measure(features[rows], renamed[rows], weight[order], bias[order]) == pytest.approx(
        measure(*sample), rel=1e-10
    )


def test_repeating_a_class_changes_no_geometry(sample):
    """Every class weighs the same in nc1 to nc3, however many rows it has."""
    features, labels, weight, bias = sample
    rows = np.concatenate([np.arange(len(labels)), *[np.flatnonzero(labels == 2)] * 9])
    repeated, once = measure(features[rows], labels[rows], weight, bias), measure(*sample)
    for name in KEYS[:-1]:
        assert repeated[name] == pytest.approx(once[name], rel=1e-10)


def test_classes_without_rows_take_no_part(sample):
    features, labels, weight, bias = sample
    kept = labels != 1
    present = [0, 2, 3]
    expected = measure(features[kept], np.searchsorted(present, labels[kept]), weight[present], bias[present])
    results = measure(features[kept], labels[kept], weight, bias - 1e6 * (np.arange(4) == 1))
    assert results == pytest.approx(expected, rel=1e-10)
    assert measure(features[kept], labels[kept], weight, bias + 1e6 * (np.arange(4) == 1))["nc4"] == 1.0


def test_a_buffer_may_be_filled_again(sample):
    features, labels, weight, bias = sample
    metric, buffer = NeuralCollapse(weight, bias), np.empty((22, 6))
    for part in (slice(0, 22), slice(22, 44), slice(44, 66)):
        buffer[:] = features[part]
        metric.add_batch(features=buffer, references=labels[part])
    assert metric.compute() == pytest.approx(measure(*sample), rel=1e-12)


def test_fewer_features_than_the_simplex_needs_keeps_it_away():
    results = measure(np.array([[1.0], [2.0], [4.0], [9.0]]), np.arange(4), np.ones((4, 1)))
    assert results["nc1"] == 0.0 and results["nc2"] > 0.1
    assert results["nc3"] is None


def test_class_means_that_coincide_have_no_geometry():
    features = np.tile([[0.1, 0.2], [0.3, -0.7]], (3, 1))
    results = measure(features, [0, 0, 1, 1, 2, 2], np.eye(3, 2))
    assert [results[name] for name in KEYS[:5]] == [None] * 5
    assert results["nc4"] is not None


def test_bad_input_is_named(sample):
    features, labels, weight, bias = sample
    with pytest.raises(ValueError, match=r"`weight` has shape \(4,\)"):
        NeuralCollapse(bias)
    with pytest.raises(ValueError, match=r"`bias` has shape \(3,\), but `weight` has 4 classes"):
        NeuralCollapse(weight, bias[:3])
    metric = NeuralCollapse(weight)
    for batch, message in [
        ((features, labels + 1), r"`references` \(=4 at row \d+\) must lie in 0\.\.3"),
        ((features[:, :5], labels), r"`features` has shape \(66, 5\), but 66 references and a head of 6"),
        ((features * np.nan, labels), "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.add_batch(features=batch[0], references=batch[1])
    metric.add(feature=features[0], reference=0)
    with pytest.raises(ValueError, match="1 classes have rows"):
        metric.compute()
