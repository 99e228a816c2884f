"""Rows are chosen by class: seeded, exact in number, never a class's last."""

from __future__ import annotations

import numpy as np
import pytest

from etf_adapt.data.splits import fewer_rows, take_per_class, validation_rows

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(6), [1, 2, 4, 5, 40, 200]))


def counts(rows):
    return np.bincount(LABELS[rows], minlength=6).tolist()


@pytest.mark.parametrize("wanted", [[0, 0, 0, 0, 0, 0], [1, 2, 4, 5, 40, 200], [1, 0, 3, 0, 17, 1]])
def test_as_many_rows_as_wanted_sorted_and_once_each(wanted):
    rows = take_per_class(LABELS, np.array(wanted), seed=0)
    assert counts(rows) == wanted
    assert (np.diff(rows) > 0).all()


def test_the_choice_is_the_seeds():
    wanted = np.array([0, 1, 2, 2, 20, 100])
    first, again, other = (take_per_class(LABELS, wanted, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_more_rows_of_one_seed_hold_the_fewer():
    small, large = (take_per_class(LABELS, np.array([0, 1, 1, 2, n, 2 * n]), seed=0) for n in (10, 30))
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("fraction", "balanced", "expected"),
    [
        (0.1, False, [0, 0, 0, 1, 4, 20]),
        (0.5, False, [0, 1, 2, 3, 20, 100]),
        (0.99, False, [0, 1, 3, 4, 39, 198]),
        (0.1, True, [0, 1, 3, 4, 4, 4]),
        (0.001, True, [0, 1, 1, 1, 1, 1]),
        (0.001, False, [0, 1, 1, 1, 1, 1]),
    ],
)
def test_validation_rows_by_class(fraction, balanced, expected):
    assert counts(validation_rows(LABELS, num_classes=6, fraction=fraction, balanced=balanced)) == expected


@pytest.mark.parametrize("max_rows", [6, 7, 10, 50, 251, 252, 1000])
def test_fewer_rows_are_exact_and_keep_each_class(max_rows):
    kept = np.array(counts(fewer_rows(LABELS, num_classes=6, max_rows=max_rows)))
    assert kept.sum() == min(max_rows, len(LABELS))
    assert kept.min() >= 1
    assert (np.diff(kept) >= 0).all()  # the order of the sizes stays


def test_fewer_rows_keep_the_proportions():
    kept = np.array(counts(fewer_rows(LABELS, num_classes=6, max_rows=126)))
    assert np.abs(kept - np.array([1, 2, 4, 5, 40, 200]) / 2).max() <= 1
