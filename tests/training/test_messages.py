"""Laws of the advice: said where it holds, silent where it does not, by formulas checked against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from small_run import make_trainer

from etf_adapt.geometry.leave_one_out import PENALTIES
from etf_adapt.results.advice import _standard_error, advise
from etf_adapt.training.messages import describe_alignment

GOOD = {
    "frame": "whitened",
    "rows": 200,
    "penalties": (1.0,),
    "balanced_accuracy": 0.8,
}
SKEWED = [100, 40, 20]


def test_nothing_is_said_where_nothing_speaks_against_it():
    assert advise(GOOD, class_counts=SKEWED, in_features=8, validation_counts=[900, 900, 900]) == []
    assert advise(GOOD, class_counts=SKEWED, in_features=8) == []


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("nearly even (1.5 : 1)", {"class_counts": [15, 10, 12]}),
        ("3 classes do not fit 1 dimensions", {"in_features": 1}),
        ("2 classes have a single training row", {"class_counts": [100, 1, 1]}),
        ("1 class has a single training row", {"class_counts": [100, 1, 2]}),
        ("the smallest penalty", {"result": {**GOOD, "penalties": (PENALTIES[0],)}}),
        ("the greatest penalty", {"result": {**GOOD, "penalties": (PENALTIES[-1],)}}),
        ("about ±", {"validation_counts": [90, 10, 0]}),
    ],
)
def test_each_finding_alone(words, changed):
    settings = {"result": GOOD, "class_counts": SKEWED, "in_features": 8, "validation_counts": [900] * 3} | changed
    (said,) = advise(settings.pop("result"), **settings)
    assert words in said


def test_a_penalty_that_was_given_is_not_called_the_best():
    given = {**GOOD, "penalties": (PENALTIES[0],), "balanced_accuracy": None}
    assert advise(given, class_counts=SKEWED, in_features=8) == []


def test_the_standard_error_is_that_of_repeated_draws():
    rows, accuracy = np.array([40, 10, 5, 2]), 0.7
    draws = np.random.default_rng(0).binomial(rows, accuracy, size=(200_000, 4)) / rows
    assert _standard_error(accuracy, rows) == pytest.approx(draws.mean(axis=1).std(), rel=0.01)
    assert _standard_error(accuracy, [*rows, 0]) == _standard_error(accuracy, rows), (
        "a class without rows has no recall"
    )
    assert _standard_error(None, rows) == _standard_error(accuracy, None) == _standard_error(accuracy, [0]) == 0.0


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (GOOD, "penalty 1; leave-one-out balanced accuracy 80.0, chance 33.3"),
        ({**GOOD, "balanced_accuracy": None, "penalties": (None,)}, "on 200 rows"),
        ({**GOOD, "balanced_accuracy": None}, "on 200 rows, penalty 1"),
    ],
)
def test_what_an_alignment_did(result, said):
    assert describe_alignment(result, num_classes=3).endswith(said)


def test_a_run_says_it_before_its_first_step(tmp_path, capsys):
    trainer = make_trainer(tmp_path, counts=(40, 9, 1), num_train_epochs=1)
    trainer.train()
    said = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(said) if line.startswith("aligned: "))
    assert "whitened frame" in said[start] and "leave-one-out balanced accuracy" in said[start]
    assert any(line.startswith("advice: 1 class has a single training row") for line in said[start:])
    assert not any(line.startswith(("epoch ", "advice: ")) for line in said[:start])
