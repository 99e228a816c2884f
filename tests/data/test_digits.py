"""The embedded digits: the same rows at every run, long-tailed by default."""

from __future__ import annotations

import numpy as np
import pytest

from etf_adapt.data.load import load_data


def test_digits():
    data = load_data("digits")
    assert (data.task, data.allow_flip) == ("image", False)
    assert data.label_names == [str(digit) for digit in range(10)]
    assert data.train[0]["image"].mode == "RGB"
    assert data.test.num_rows == 599
    assert data.class_counts.min() == 5
    assert data.description["imbalance_factor"] == data.class_counts.max() / data.class_counts.min() > 20
    assert data.description["rows_in_source"]["train"] + data.test.num_rows == 1797


def test_digits_without_the_long_tail():
    data = load_data("digits", imbalance_factor=1, validation_fraction=0)
    assert data.train.num_rows + data.test.num_rows == 1797
    assert np.bincount(data.test["label"]).tolist() == pytest.approx([599 / 10] * 10, abs=2)


def test_the_seed_chooses_training_rows_and_never_test_rows():
    first, again, other = (load_data("digits", seed=seed).description["row_ids_sha256"] for seed in (0, 0, 1))
    assert first == again
    assert first["train"] != other["train"]
    assert first["validation"] != other["validation"]
    assert load_data("digits", seed=0).test["label"][:] == load_data("digits", seed=1).test["label"][:]
