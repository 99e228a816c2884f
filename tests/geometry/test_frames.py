"""Laws of the closed-form heads."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry.frames import FRAMES, PENALIZED, closed_form_vectors
from etf_adapt.geometry.leave_one_out import choose_penalty, leave_one_out_scores
from etf_adapt.geometry.statistics import ClassStatistics

COUNTS = (23, 9, 4, 2, 7)


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
    torch.testing.assert_close(whole.between(), torch.cov(whole.means.T, correction=0))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("frame", FRAMES)
def test_rows_are_centred_over_the_classes(rows, frame, intercept):
    if frame in ("discriminant", "nearest_mean") and not intercept:
        with pytest.raises(ValueError, match="needs a layer with a bias"):
            closed_form_vectors(statistics(*rows), frame, intercept=intercept)
        return
    weight, bias = closed_form_vectors(statistics(*rows), frame, intercept=intercept)
    torch.testing.assert_close(weight.sum(dim=0), torch.zeros(6, dtype=torch.float64))
    assert bias.sum().abs() < 1e-12
    assert intercept or not bias.any()


def test_nearest_mean_gives_each_row_the_class_whose_mean_is_nearest(rows):
    features, _ = rows
    weight, bias = closed_form_vectors(statistics(*rows), "nearest_mean")
    nearest = torch.cdist(features, statistics(*rows).means).argmin(dim=1)
    assert torch.equal((features @ weight.T + bias).argmax(dim=1), nearest)


def test_ridge_is_the_minimiser_of_the_class_balanced_regression_onto_the_vertices(rows):
    """With balanced classes the pooled covariance is the balanced one, and plain least squares is the oracle."""
    features, labels = rows[0][:20], torch.arange(20) % len(COUNTS)
    weight, bias = closed_form_vectors(statistics(features, labels), "ridge", penalty=0.0)
    vertices = torch.eye(len(COUNTS), dtype=torch.float64) - 1.0 / len(COUNTS)
    design = torch.cat([features, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    oracle = torch.linalg.lstsq(design, vertices[labels]).solution.T
    ours = torch.cat([weight, bias.unsqueeze(1)], dim=1)
    torch.testing.assert_close(ours / ours.norm(), oracle / oracle.norm())


def test_rotated_is_an_exact_simplex_nearest_to_the_means(rows):
    weight, _ = closed_form_vectors(statistics(*rows), "rotated")
    gram = weight @ weight.T
    torch.testing.assert_close(gram, 1.25 * torch.eye(5, dtype=torch.float64) - 0.25)
    stats = statistics(*rows)
    offsets = stats.means - stats.center
    random, _ = closed_form_vectors(stats, "random", generator=torch.Generator().manual_seed(1))
    assert (weight * offsets).sum() > (random * offsets).sum()


def test_discriminant_of_two_classes_is_fishers_direction(rows):
    features, labels = rows[0][:32], (torch.arange(32) % 2).long()
    stats = ClassStatistics.of(features, labels, 2)
    weight, _ = closed_form_vectors(stats, "discriminant", penalty=0.0)
    fisher = torch.linalg.solve(stats.within, stats.means[1] - stats.means[0])
    ours = weight[1] - weight[0]
    torch.testing.assert_close(ours / ours.norm(), fisher / fisher.norm())


def test_whitened_rows_are_those_of_means_where_the_within_class_covariance_is_white(rows):
    features, labels = rows
    values, vectors = torch.linalg.eigh(statistics(features, labels).within)
    root = vectors / values.sqrt() @ vectors.T
    weight, bias = closed_form_vectors(statistics(features, labels), "whitened", penalty=0.0)
    white, white_bias = closed_form_vectors(statistics(features @ root, labels), "means")
    torch.testing.assert_close(features @ weight.T + bias, features @ root @ white.T + white_bias)


def test_whitened_rows_are_those_of_means_at_a_great_penalty(rows):
    weight, _ = closed_form_vectors(statistics(*rows), "whitened", penalty=1e9)
    means, _ = closed_form_vectors(statistics(*rows), "means")
    torch.testing.assert_close(weight / weight.norm(), means / means.norm())


@pytest.mark.parametrize("frame", FRAMES)
def test_rows_follow_the_relabelling_of_the_classes(rows, frame):
    features, labels = rows
    if frame == "random":
        return  # drawn, not fitted
    order = torch.tensor([3, 0, 4, 1, 2])
    weight, bias = closed_form_vectors(statistics(features, labels), frame)
    renamed, renamed_bias = closed_form_vectors(statistics(features, order[labels]), frame)
    torch.testing.assert_close(renamed[order], weight)
    torch.testing.assert_close(renamed_bias[order], bias)


@pytest.mark.parametrize("frame", [frame for frame in FRAMES if frame != "random"])
def test_argmax_ignores_the_scale_and_the_origin_of_the_features(rows, frame):
    features, labels = rows
    moved = 0.01 * features - 7.0
    before = _logits(features, labels, frame).argmax(dim=1)
    assert torch.equal(before, _logits(moved, labels, frame).argmax(dim=1))


def _logits(features, labels, frame):
    weight, bias = closed_form_vectors(statistics(features, labels), frame, penalty=0.1)
    return features @ weight.T + bias


@pytest.mark.parametrize(
    ("frame", "intercept"),
    [("ridge", True), ("ridge", False), ("discriminant", True), ("whitened", True), ("whitened", False)],
)
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_leave_one_out_equals_refitting_without_the_row(rows, frame, intercept, penalty, monkeypatch):
    features, labels = rows
    whole = statistics(features, labels)
    fast = leave_one_out_scores(whole, features, labels, frame, penalty=penalty, intercept=intercept)
    slow = torch.stack(
        [_refit(features, labels, row, frame, penalty, intercept, whole, monkeypatch) for row in range(len(labels))]
    )
    centre = lambda scores: scores - scores.mean(dim=1, keepdim=True)
    torch.testing.assert_close(centre(fast), centre(slow))


def _refit(features, labels, row, frame, penalty, intercept, whole, monkeypatch):
    """Fit without one row: divisor, penalty and shrinkage stay those of the whole, as documented."""
    keep = torch.arange(len(labels)) != row
    part = statistics(features[keep], labels[keep])
    rescale = (len(labels) - 1) / len(labels)
    matrix = whole.within + (whole.between(centered=intercept) if frame == "ridge" else 0.0)
    absolute = penalty * matrix.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    center = part.center if intercept else torch.zeros(6, dtype=torch.float64)
    offsets = part.means - center
    matrix = rescale * part.within + absolute
    if frame == "ridge":
        matrix = matrix + part.between(centered=intercept)
    elif frame == "discriminant":
        offsets = offsets * (part.counts / (part.counts + whole.shrinkage)).unsqueeze(1)
    weight = torch.linalg.solve(matrix, offsets.T).T
    bias = -0.5 * (weight * offsets).sum(dim=1) if frame == "discriminant" else 0.0
    if frame == "whitened":
        weight = weight / (weight * offsets).sum(dim=1, keepdim=True).sqrt()
    return weight @ (features[row] - center) + bias


def test_the_chosen_penalty_grows_with_the_noise():
    """Few rows in many noisy dimensions need a strong penalty, many rows in few a weak one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    noisy = torch.randn(30, 60, generator=generator) + torch.nn.functional.one_hot(labels, 60) * 3.0
    many_labels = torch.arange(3000) % 3
    spread = torch.tensor([0.05, 5.0, 5.0, 5.0])
    correlated = torch.randn(3000, 1, generator=generator) * spread + 0.3 * torch.randn(3000, 4, generator=generator)
    clear = correlated + torch.nn.functional.one_hot(many_labels, 4)
    chosen = [
        choose_penalty(ClassStatistics.of(x, y, 3), x, y, "ridge")[0]
        for x, y in ((noisy, labels), (clear, many_labels))
    ]
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize("frame", PENALIZED)
def test_one_row_a_class_has_a_default_penalty(frame):
    features, labels = torch.randn(4, 3), torch.arange(4)
    penalty, score = choose_penalty(ClassStatistics.of(features, labels, 4), features, labels, frame)
    assert penalty == 1.0 and score != score


def test_errors_name_the_value_and_the_rule(rows):
    stats = statistics(*rows)
    with pytest.raises(ValueError, match="'nearest'"):
        closed_form_vectors(stats, "nearest")
    with pytest.raises(ValueError, match=r"`penalty` \(=-1\)"):
        closed_form_vectors(stats, "ridge", penalty=-1)
    with pytest.raises(ValueError, match="Class 5 has no row"):
        closed_form_vectors(ClassStatistics.of(*rows, 6), "ridge")
