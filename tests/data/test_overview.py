"""Laws of the overview: it names what was read and what was left, and is a few lines at any size."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from etf_adapt.data.load import load_data
from etf_adapt.data.overview import describe_data


@pytest.fixture
def folder(tmp_path):
    header = "id\tsentence\tsource\tlabel"
    lines = [f"{row}\ttext {row}\tweb\t{'ab'[row % 3 == 0]}" for row in range(60)]
    for name, number in (("train-0", 40), ("train-1", 20), ("dev", 6)):
        (tmp_path / f"{name}.tsv").write_text("\n".join([header, *lines[:number]]))
    return str(tmp_path)


def test_files_columns_classes_and_splits_are_named(folder):
    text = describe_data(load_data(folder, max_train_rows=30).description)
    assert text.splitlines() == [
        f"data: {folder} (files): 3 files, `dev.tsv`, `train-0.tsv`, `train-1.tsv`",
        "data: text `sentence`, label `label`; left out: `id`, `source`",
        "data: 2 classes: `a`, `b`; training rows 10 (`b`) to 20 (`a`)",
        "data: train: 30 rows, of 60 in split train",
        "data: validation: 6 rows, of 6 in split validation",
    ]


def test_the_origin_of_rows_and_the_rule_of_a_choice_are_told(tmp_path):
    rows = {"text": [f"text {row}" for row in range(60)], "topic": ["x", "y"] * 30, "label": [0, 1] * 30}
    DatasetDict({"whole": Dataset.from_dict(rows, split="whole")}).save_to_disk(tmp_path / "saved")
    text = describe_data(load_data(str(tmp_path / "saved"), imbalance_factor=3).description)
    assert "`label` is the label for its name; --label_column takes another column" in text
    assert "train: 36 rows, of 60 in split whole, made long-tailed by a factor of 3" in text
    assert "validation: 4 rows, cut from train after the long tail, stratified" in text


def test_it_stays_short(tmp_path):
    lines = "".join(f"text {row},class {row % 2000}\n" for row in range(4000))
    (tmp_path / "rows.csv").write_text(f"text,label\n{lines}")
    text = describe_data(load_data(str(tmp_path / "rows.csv"), validation_fraction=0).description)
    assert "2,000 classes: `class 0`, " in text and text.count("`class") == 12 and len(text) < 600
