"""Laws of the classification metrics."""

from __future__ import annotations

import json

import evaluate
import numpy as np
import pytest
import torch

from etf_adapt.metrics.shots import ShotAccuracy, class_groups, pooled_class_mean

NUM_CLASSES = 12
OVERALL = ["accuracy", "balanced_accuracy", "macro_f1"]
GROUPS = ["many", "medium", "few", "head_third", "middle_third", "tail_third"]
KEYS = [*OVERALL, *GROUPS, "ece", "loss", "balanced_loss"]
TRAIN_COUNTS = [300, 5, 120, 101, 100, 44, 20, 19, 3, 300, 1, 60]


@pytest.fixture
def rows():
    """Classes 10 and 11 have no test rows; class 11 is predicted, class 10 never."""
    generator = np.random.default_rng(0)
    references = generator.integers(0, 10, 400)
    wrong = generator.integers(0, NUM_CLASSES, 400)
    wrong[wrong == 10] = 11
    return {
        "predictions": np.where(generator.random(400) < 0.6, references, wrong),
        "references": references,
        "confidences": np.concatenate([generator.random(380), np.arange(20) / 15 % 1.0]),
        "losses": generator.exponential(size=400),
    }


def batches(rows, size):
    return [{name: column[i : i + size] for name, column in rows.items()} for i in range(0, 400, size)]


def compute(batch_list, **options):
    metric = ShotAccuracy(TRAIN_COUNTS, **options)
    for batch in batch_list:
        metric.add_batch(**batch)
    return metric.compute()


def test_overall_figures_equal_their_definitions(rows):
    results = compute([rows])
    true, predicted = rows["references"], rows["predictions"]
    assert list(results) == KEYS
    assert results["accuracy"] == pytest.approx((true == predicted).mean(), abs=1e-15)
    hits = [((true == c) & (predicted == c)).sum() for c in range(NUM_CLASSES)]
    recalls = [hits[c] / (true == c).sum() for c in range(10)]
    assert results["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-15)
    f1_scores = [2 * hits[c] / ((true == c).sum() + (predicted == c).sum()) for c in range(NUM_CLASSES) if c != 10]
    assert results["macro_f1"] == pytest.approx(np.mean(f1_scores), abs=1e-15)


def test_groups_are_unweighted_means_of_recalls(rows):
    results = compute([rows])

    def recall(label):
        own = rows["references"] == label
        return (rows["predictions"][own] == label).mean()

    by_hand = {
        "many": [0, 2, 3, 9],
        "medium": [4, 5, 6],
        "few": [1, 7, 8],
        "head_third": [0, 9, 2, 3],
        "middle_third": [4, 5, 6],
        "tail_third": [7, 1, 8],
    }
    for name, labels in by_hand.items():
        assert results[name] == pytest.approx(np.mean([recall(label) for label in labels]), abs=1e-15)


def test_calibration_error_is_that_of_its_definition(rows):
    correct = rows["predictions"] == rows["references"]
    error = 0.0
    for b in range(15):
        inside = (rows["confidences"] > b / 15) & (rows["confidences"] <= (b + 1) / 15)
        if b == 0:
            inside |= rows["confidences"] == 0.0
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - rows["confidences"][inside].mean())
    assert compute([rows])["ece"] == pytest.approx(error, abs=1e-14)
    assert compute([rows])["loss"] == pytest.approx(rows["losses"].mean(), abs=1e-14)


def test_calibration_error_in_the_limits():
    sure = {"predictions": [0, 1], "references": [0, 1]}
    assert ShotAccuracy().compute(**sure, confidences=[1.0, 1.0])["ece"] == 0.0
    assert ShotAccuracy().compute(**sure, confidences=[0.0, 0.0])["ece"] == 1.0
    assert ShotAccuracy().compute(predictions=[1, 0], references=[0, 1], confidences=[1.0, 1.0])["ece"] == 1.0


@pytest.mark.parametrize("size", [1, 7, 399])
def test_batches_add_up_to_the_whole(rows, size):
    assert compute(batches(rows, size)) == pytest.approx(compute([rows]), abs=1e-14)
    assert compute(batches(rows, size)[::-1]) == pytest.approx(compute([rows]), abs=1e-14)


def test_single_rows_and_tensors_are_rows_too(rows):
    by_row = ShotAccuracy(TRAIN_COUNTS)
    for i in range(400):
        by_row.add(
            prediction=rows["predictions"][i],
            reference=rows["references"][i],
            confidence=rows["confidences"][i],
            loss=rows["losses"][i],
        )
    assert len(by_row) == 400
    assert by_row.compute() == pytest.approx(compute([rows]), abs=1e-14)
    tensors = {name: torch.tensor(column) for name, column in rows.items()}
    assert compute([tensors]) == compute([rows])
    half = rows | {"losses": tensors["losses"].bfloat16().requires_grad_()}
    assert compute([half])["loss"] == pytest.approx(compute([rows])["loss"], rel=1e-2)


def test_relabelling_changes_nothing(rows):
    """With distinct training counts, so that ties do not depend on the labels."""
    counts = np.array([300, 5, 120, 101, 100, 44, 20, 19, 3, 299, 1, 60])
    order = np.random.default_rng(1).permutation(NUM_CLASSES)
    renamed = rows | {name: order[rows[name]] for name in ("predictions", "references")}
    moved = np.empty_like(counts)
    moved[order] = counts
    expected = ShotAccuracy(counts).compute(**rows)
    assert ShotAccuracy(moved).compute(**renamed) == pytest.approx(expected, abs=1e-14)


def test_perfect_and_hopeless_predictions():
    references = np.arange(NUM_CLASSES)
    perfect = ShotAccuracy(TRAIN_COUNTS).compute(predictions=references, references=references)
    hopeless = ShotAccuracy(TRAIN_COUNTS).compute(predictions=(references + 1) % NUM_CLASSES, references=references)
    assert {perfect[name] for name in [*OVERALL, *GROUPS]} == {1.0}
    assert {hopeless[name] for name in [*OVERALL, *GROUPS]} == {0.0}


def test_what_is_not_known_is_none():
    bare = ShotAccuracy().compute(predictions=[0, 1], references=[0, 0])
    assert [name for name, value in bare.items() if value is None] == [*GROUPS, "ece", "loss", "balanced_loss"]
    grouped = ShotAccuracy([500, 400]).compute(predictions=[0, 1], references=[0, 0])
    assert grouped["many"] == 0.5 and grouped["medium"] is grouped["few"] is grouped["tail_third"] is None
    assert json.loads(json.dumps(grouped)) == grouped


def test_shot_groups_follow_the_bounds():
    groups = [class_groups(TRAIN_COUNTS)[name] for name in ("many", "medium", "few")]
    assert [len(classes) for classes in groups] == [4, 4, 4]
    assert class_groups([1, 2, 3, 4], (2, 3))["medium"].tolist() == [1, 2]
    assert sorted(np.concatenate(groups)) == list(range(NUM_CLASSES))


def test_thirds_split_by_count():
    for num_classes in range(1, 14):
        counts = np.random.default_rng(num_classes).integers(0, 5, num_classes)
        thirds = [class_groups(counts)[f"{name}_third"] for name in ("head", "middle", "tail")]
        order = np.concatenate(thirds)
        assert sorted(order) == list(range(num_classes))
        assert order.tolist() == sorted(range(num_classes), key=lambda label: (-counts[label], label))
        sizes = [len(labels) for labels in thirds]
        assert sizes[0] == sizes[2] and abs(sizes[0] - sizes[1]) <= 1


def test_pooling_lies_between_balanced_accuracy_and_accuracy(rows):
    labels, results = rows["references"], compute([rows])
    is_right = rows["predictions"] == labels
    assert pooled_class_mean(is_right, labels, min_rows=1) == pytest.approx(results["balanced_accuracy"], abs=1e-15)
    assert pooled_class_mean(is_right, labels, min_rows=999) == pytest.approx(results["accuracy"], abs=1e-15)


def test_small_classes_share_one_mean():
    labels = np.array([0] * 6 + [1] * 5 + [2, 2, 3, 5])
    values = np.array([1.0] * 3 + [0.0] * 3 + [1.0] * 5 + [1.0, 0.0, 0.0, 3.0])
    assert pooled_class_mean(values, labels) == pytest.approx((0.5 + 1.0 + 3 * 4 / 4) / 5)
    assert pooled_class_mean(values, labels, min_rows=1) == pytest.approx((0.5 + 1.0 + 0.5 + 0.0 + 3.0) / 5)
    assert pooled_class_mean(values, labels, min_rows=99) == pytest.approx(values.mean())


def test_recalls_of_the_classes_are_at_hand_until_the_next_round(rows):
    metric = ShotAccuracy(TRAIN_COUNTS)
    metric.add_batch(**rows)
    before = metric.class_recalls()
    results = metric.compute()
    np.testing.assert_array_equal(metric.class_recalls(), before)
    assert np.isnan(before).tolist() == [False] * 10 + [True] * 2
    assert np.nanmean(before) == pytest.approx(results["balanced_accuracy"])
    assert metric.compute() == results
    metric.add_batch(predictions=[0], references=[0])
    assert len(metric) == 1 and metric.compute()["accuracy"] == 1.0


def test_nothing_is_written(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    compute(batches(rows, 100))
    assert list(tmp_path.iterdir()) == []


def test_it_combines_with_others_as_evaluate_does():
    both = evaluate.combine([ShotAccuracy([5, 1]), ShotAccuracy()])
    both.add_batch(predictions=[0, 1], references=[0, 0])
    results = both.compute()
    assert results["shot_accuracy_0_accuracy"] == results["shot_accuracy_1_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"predictions": [0, 12]}, r"`predictions` \(=12 at row 1\) must lie in 0\.\.11"),
        ({"references": [-100, 0]}, r"`references` \(=-100 at row 0\)"),
        ({"predictions": [[0.1, 0.9], [0.5, 0.5]]}, r"`predictions` has shape \(2, 2\)"),
        ({"predictions": [0]}, r"`predictions` has shape \(1,\), but `references` has \(2,\)"),
        ({"confidences": [0.5]}, r"`confidences` has shape \(1,\)"),
        ({"confidences": [0.5, 1.5]}, r"`confidences` \(=1.5 at row 1\) must lie in 0\.\.1"),
        ({"confidences": [float("nan"), 0.5]}, r"`confidences` \(=nan at row 0\)"),
        ({"losses": [1.0, 2.0, 3.0]}, r"`losses` has shape \(3,\)"),
    ],
)
def test_bad_rows_are_named_and_not_added(batch, message):
    metric = ShotAccuracy(TRAIN_COUNTS)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(**{"predictions": [0, 1], "references": [0, 1]} | batch)
    assert len(metric) == 0


def test_bad_settings_are_named():
    row = {"predictions": [0], "references": [2]}
    with pytest.raises(ValueError, match=r"`references` \(=2 at row 0\) must lie in 0\.\.1"):
        ShotAccuracy([5, 5]).compute(**row)
    for counts in ([5, -1], [0.5, 2.0], [[1, 2]]):
        with pytest.raises(ValueError, match=r"`class_counts` \(=.*training rows of each class"):
            ShotAccuracy(counts)
    for bounds in ((100, 20), (-1, 5)):
        with pytest.raises(ValueError, match=r"`shot_bounds` \(="):
            ShotAccuracy(shot_bounds=bounds)
    with pytest.raises(ValueError, match="No rows were added"):
        ShotAccuracy().compute()
    metric = ShotAccuracy()
    metric.add_batch(**row, confidences=[0.5])
    with pytest.raises(ValueError, match=r"This batch has .*'losses'.*the first had .*'confidences'"):
        metric.add_batch(**row, losses=[0.5])
