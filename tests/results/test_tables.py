"""Scores by name and as a table."""

from __future__ import annotations

from etf_adapt.results import tables


def test_results_are_flat_and_name_every_score_of_both_splits():
    results = tables.flat_results({"train_runtime": 1.0}, {"accuracy": 0.5}, None)
    assert {f"{split}_{score}" for split in ("eval", "test") for score in tables.SCORES} <= set(results)
    assert results["eval_accuracy"] == 0.5 and results["test_accuracy"] is None and results["train_runtime"] == 1.0


def test_groups_and_thirds_each_hold_every_class_once():
    table = tables.shot_table({}, [500, 100, 60, 20, 5], [3, 3, 3, 3, 3])
    assert [row[2] for row in table] == [1, 3, 1, 2, 1, 2, 5, 5]
    assert sum(row[3] for row in table[:3]) == sum(row[3] for row in table[3:6]) == 15


def test_an_empty_group_is_a_dash():
    table = tables.shot_table({"many": None}, [50, 50], [1, 1])
    assert tables.shot_table({"few": 0.5, "balanced_accuracy": 0.7}, [200, 8], [10, 10])[2] == (
        "few",
        "< 20",
        1,
        10,
        0.5,
    )
    assert (tables.percent(0.1234), tables.percent(None)) == ("12.3", "-")
    assert "many" in (line := tables.format_table(table).splitlines()[1]) and line.endswith(" -")
