"""The figures of a comparison: the paired bootstrap, rows packed and unpacked, epochs needed, and who is compared to whom."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from comparison import (
    best_of,
    epochs_to_reach,
    format_difference,
    mean_and_deviation,
    pack_rows,
    paired_bootstrap,
    summarize,
    unpack_rows,
)


def random_case(*, seeds: int = 3, rows: int = 60, classes: int = 4, seed: int = 0):
    """Return what two methods had right, and uneven labels that have each class."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(classes, size=rows - classes) ** 2 // classes])
    return generator.random((seeds, rows)) < 0.8, generator.random((seeds, rows)) < 0.6, labels


def balanced_accuracy(correct, labels) -> float:
    return float(np.mean([np.mean(correct[:, labels == label]) for label in np.unique(labels)]))


def slow_bootstrap(a, b, labels, *, resamples: int, seed: int = 1):
    """Draw rows and seeds one by one, as the definition says."""
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        seeds = generator.integers(len(a), size=len(a))
        rows = np.concatenate(
            [generator.choice(members := np.flatnonzero(labels == label), len(members)) for label in np.unique(labels)]
        )
        pair = [balanced_accuracy(correct[seeds][:, rows], labels[rows]) for correct in (a, b)]
        drawn.append(pair[0] - pair[1])
    return np.quantile(drawn, [0.025, 0.975])


class TestPairedBootstrap:
    def test_the_difference_is_that_of_the_balanced_accuracies(self):
        a, b, labels = random_case()
        difference, low, high = paired_bootstrap(a, b, labels, resamples=100)
        assert difference == pytest.approx(balanced_accuracy(a, labels) - balanced_accuracy(b, labels), abs=1e-12)
        assert low < difference < high

    def test_against_itself_nothing_is_uncertain(self):
        a, _, labels = random_case()
        assert paired_bootstrap(a, a, labels) == (0.0, 0.0, 0.0)

    def test_exchanged_it_turns_round(self):
        a, b, labels = random_case()
        value, low, high = paired_bootstrap(a, b, labels)
        assert paired_bootstrap(b, a, labels) == pytest.approx((-value, -high, -low), abs=1e-12)

    @pytest.mark.parametrize("seeds", [1, 3])
    def test_it_agrees_with_drawing_one_by_one(self, seeds):
        a, b, labels = random_case(seeds=seeds, rows=40)
        _, *fast = paired_bootstrap(a, b, labels, resamples=20_000)
        slow = slow_bootstrap(a, b, labels, resamples=3000)
        assert fast == pytest.approx(slow, abs=0.015), "quantiles of 3,000 draws are known to about 0.006"

    def test_seeds_that_disagree_widen_it(self):
        labels = np.zeros(400, dtype=np.int64)
        b = np.tile(np.arange(400) % 2 == 0, (2, 1))
        same = np.tile(np.arange(400) % 4 != 1, (2, 1))  # 25 points better with each seed
        one_of_two = np.stack(
            [np.ones(400, dtype=bool), b[0]]
        )  # 50 points better with the first, level with the second
        _, low, high = paired_bootstrap(same, b, labels)
        assert high - low < 0.1
        _, low, high = paired_bootstrap(one_of_two, b, labels)
        assert low == 0.0 and high > 0.45

    def test_it_covers_a_known_difference_as_often_as_it_says(self):
        generator = np.random.default_rng(0)
        labels = np.repeat(np.arange(3), (20, 60, 100))
        covered = 0
        for trial in range(200):
            x, y = generator.random((2, 1, 180))
            a, b = x < 0.8, (x < 0.8) & (y < 0.75)  # right on 80 % and on 60 % of each class, on the same rows
            _, low, high = paired_bootstrap(a, b, labels, resamples=400, seed=trial)
            covered += low <= 0.2 <= high
        assert 0.89 <= covered / 200 <= 0.99

    def test_classes_count_alike_whatever_their_size_and_name(self):
        labels = np.array([7] * 90 + [-2] * 10)
        a, b = labels[None] == 7, labels[None] == -2
        assert paired_bootstrap(a, b, labels) == (0.0, 0.0, 0.0), "each is right on one class of two"

    def test_five_thousand_rows_take_little_time(self):
        a, b, labels = random_case(rows=5000, classes=150)
        start = time.process_time()
        paired_bootstrap(a, b, labels, resamples=2000)
        assert time.process_time() - start < 4

    def test_memory_does_not_grow_with_the_resamples(self):
        a, b, labels = random_case(seeds=10, rows=1000, classes=1)  # nearly every row is a group of its own
        tracemalloc.start()
        paired_bootstrap(a, b, labels)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40e6, "10,000 resamples of 1,000 rows at once would be 80 MB"

    def test_shapes_that_do_not_fit_are_refused(self):
        a, b, labels = random_case()
        for wrong in ((a[:, 1:], b, labels), (a, b, labels[1:]), (a[:0], b[:0], labels)):
            with pytest.raises(ValueError, match=r"one shape \(seeds, rows\)"):
                paired_bootstrap(*wrong)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 4500])
def test_rows_come_back_as_they_were_packed(rows):
    correct = np.random.default_rng(rows).random(rows) < 0.5
    packed = pack_rows(correct)
    assert len(packed) <= 4 * (rows // 24 + 1) and np.array_equal(unpack_rows(packed, rows), correct)
    with pytest.raises(ValueError, match=f"not those of {rows + 8} rows"):
        unpack_rows(packed, rows + 8)


class TestEpochsToReach:
    HISTORY = ((0, 0.9), (1, 0.5), (2, 0.7), (3, 0.6), (4, 0.8))

    def test_alignment_alone_is_not_counted(self):
        assert epochs_to_reach(self.HISTORY, 0.0) == 1

    def test_equal_is_reached(self):
        assert epochs_to_reach(self.HISTORY, 0.7) == 2 and epochs_to_reach(self.HISTORY, 0.8) == 4

    def test_never_is_none(self):
        assert epochs_to_reach(self.HISTORY, 0.81) is None and epochs_to_reach([], 0.0) is None


def test_deviation_is_that_of_a_sample():
    assert mean_and_deviation([0.1, 0.2, 0.6]) == pytest.approx((0.3, np.std([0.1, 0.2, 0.6], ddof=1)))
    assert mean_and_deviation([0.1, None]) is None and mean_and_deviation([]) is None


def test_only_an_interval_above_zero_is_bold():
    assert "**" in format_difference((0.1, 0.01, 0.2))
    assert "**" not in format_difference((0.1, 0.0, 0.2)) and "**" not in format_difference((-0.1, -0.2, -0.01))


LABELS = np.repeat([0, 1], 20)


def test_the_best_of_runs_has_the_least_log_loss_and_of_equals_is_the_last():
    def run(accuracy, loss):
        return {"all_results": {"eval_balanced_accuracy": accuracy, "eval_balanced_loss": loss}}

    assert best_of([run(1.0, 0.3), run(0.9, 0.1), run(1.0, 0.1), run(0.9, 0.2)]) == 2
    assert best_of([run(0.9, 0.1), run(1.0, None), run(1.0, 0.3)]) == 1, "runs of earlier versions"


def table_row(name: str, kind: str, *, validation: list[float], right: int, resumed: bool = False):
    """Return a row whose runs had so many test rows of each class right."""
    correct = np.tile(np.arange(20) < right, 2)
    runs = [
        {
            "all_results": {
                "eval_balanced_accuracy": score,
                "test_balanced_accuracy": right / 20,
                "train_runtime": 5.0,
            },
            "history": [(0, 1.0), (1, 0.4), (2, score)],
            "resumed": resumed,
            "correct": correct,
        }
        for score in validation
    ]
    return {"name": name, "kind": kind, "runs": runs}


class TestSummary:
    def test_the_best_baseline_is_chosen_in_validation_and_is_a_baseline(self):
        rows = [
            table_row("linear_ce", "baseline", validation=[0.5, 0.5], right=19),
            table_row("cosine", "baseline", validation=[0.6, 0.5], right=10),
            table_row("etf", "family", validation=[0.9, 0.9], right=15),
        ]
        summary = summarize(rows, LABELS)
        assert summary["best_baseline"] == "cosine" and summary["not_ranked"] is None
        differences = [row["difference"][0] for row in summary["rows"]]
        assert differences == pytest.approx([0.45, 0.0, 0.25])
        assert summary["rows"][1]["difference"] == (0.0, 0.0, 0.0)

    def test_the_lead_of_the_untuned_default_is_told_over_each_other_method(self):
        rows = [
            table_row("linear_ce", "baseline", validation=[0.5, 0.5], right=19),
            table_row("etf_untuned", "family", validation=[0.9, 0.9], right=15),
            table_row("etf", "family", validation=[0.9, 0.9], right=14),
        ]
        leads = [row["lead"] for row in summarize(rows, LABELS)["rows"]]
        assert leads[1] is None and [lead[0] for lead in leads if lead] == pytest.approx([-0.2, 0.05])
        assert summarize(rows[::2], LABELS)["rows"][0]["lead"] is None

    def test_the_score_after_the_first_epoch_is_told(self):
        row = table_row("linear_ce", "baseline", validation=[0.5, 0.5], right=19)
        assert summarize([row], LABELS)["rows"][0]["first_epoch"] == (0.4, 0.0)

    def test_one_seed_is_not_ranked(self):
        rows = [table_row(name, "baseline", validation=[0.5], right=10) for name in ("linear_ce", "cosine")]
        summary = summarize(rows, LABELS)
        assert summary["best_baseline"] is None and "one seed" in summary["not_ranked"]
        assert [row["difference"] for row in summary["rows"]] == [None, None]
        assert summary["rows"][0]["scores"]["balanced_accuracy"] == (0.5, None)

    def test_without_a_baseline_nothing_is_ranked(self):
        summary = summarize([table_row("etf", "family", validation=[0.5, 0.6], right=10)], LABELS)
        assert "no baseline" in summary["not_ranked"] and summary["target"] is None
        assert summary["rows"][0]["epochs"] == [None, None]

    def test_epochs_count_to_the_last_score_of_the_reference(self):
        rows = [
            table_row("linear_ce", "baseline", validation=[0.4, 0.6], right=10),
            table_row("etf", "family", validation=[0.5, 0.45], right=10),
        ]
        summary = summarize(rows, LABELS)
        assert summary["target"] == 0.5
        assert [row["epochs"] for row in summary["rows"]] == [[None, 2], [2, None]]

    def test_resumed_runs_are_not_timed(self):
        row = table_row("etf", "family", validation=[0.5, 0.6], right=10)
        row["runs"][0] = row["runs"][0] | {"resumed": True, "all_results": {"train_runtime": 0.1}}
        assert summarize([row], LABELS)["rows"][0]["train_seconds"] == (5.0, None)
        resumed = table_row("etf", "family", validation=[0.5, 0.6], right=10, resumed=True)
        assert summarize([resumed], LABELS)["rows"][0]["train_seconds"] is None
