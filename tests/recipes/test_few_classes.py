"""Laws of drawing a few classes of a data set: their rows are theirs, in order, under their own names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, load_dataset

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import few_classes

NAMES = ["ash", "birch", "cedar", "date", "elm"]


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("train", 20), ("test", 10)):
        labels = [row % 5 for row in range(rows)]
        data = Dataset.from_dict(
            {"text": [f"{NAMES[label]} {row}" for row, label in enumerate(labels)], "label": labels}
        )
        (tmp_path / "all").mkdir(exist_ok=True)
        data.cast_column("label", ClassLabel(names=NAMES)).to_parquet(str(tmp_path / "all" / f"{split}.parquet"))
    return tmp_path


def draw(folder, classes, seed):
    few_classes.main(["--dataset", str(folder / "all"), "--classes", str(classes), "--seed", str(seed),
                      "--output", str(folder / "few")])  # fmt: skip
    return load_dataset(str(folder / "few"), cache_dir=str(folder / "cache"))


def test_the_rows_are_those_of_the_classes_in_order_and_every_split_has_the_same_names(folder):
    splits = draw(folder, 2, seed=1)
    names = splits["train"].features["label"].names
    assert names == splits["test"].features["label"].names and len(names) == 2
    assert names == sorted(names, key=NAMES.index)
    for split, rows in (("train", 20), ("test", 10)):
        expected = [(f"{NAMES[row % 5]} {row}", NAMES[row % 5]) for row in range(rows) if NAMES[row % 5] in names]
        found = splits[split]
        assert [(text, names[label]) for text, label in zip(found["text"], found["label"])] == expected


@pytest.mark.parametrize("classes", [1, 6])
def test_numbers_of_classes_that_there_are_not_are_refused(folder, classes, capsys):
    with pytest.raises(SystemExit):
        draw(folder, classes, seed=0)
    assert f"--classes (={classes}) must be 2 to 5" in capsys.readouterr().err
