"""Laws of columns: they are found by type and name, and classes are numbered the same whatever they are stored as."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from etf_adapt.data.columns import encode_labels, find_columns
from etf_adapt.errors import DataError


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"words": ["x"], "mood": ["m"], "text": ["y"], "label": [0]}, {}, ("text", "text", "label")),
        ({"headline": ["x"], "target": [1]}, {}, ("text", "headline", "target")),
        ({"sentence": ["x"], "mood": ["m"]}, {}, ("text", "sentence", "mood")),
        ({"a": ["x"], "b": ["y"]}, {"text_column": "b", "label_column": "a"}, ("text", "b", "a")),
        ({"id": [7], "img": [b"..."], "caption": ["c"], "class": ["k"]}, {}, ("image", "img", "class")),
        ({"shot": [{"bytes": b"", "path": "p"}], "intent": ["k"]}, {}, ("image", "shot", "intent")),
        ({"image": ["a.JPG"], "label": [0]}, {}, ("image", "image", "label")),
        ({"image": ["a.JPG"], "text": ["t"], "label": [0]}, {"text_column": "text"}, ("text", "text", "label")),
    ],
)
def test_columns_are_found(columns, options, expected):
    found = find_columns(Dataset.from_dict(columns), **options)
    assert (found.task, found.input, found.label) == expected


def test_of_several_class_labels_the_usual_name_is_taken():
    features = Features({"text": Value("string"), "coarse_label": ClassLabel(2), "fine_label": ClassLabel(3)})
    rows = Dataset.from_dict({"text": ["x"], "coarse_label": [0], "fine_label": [1]}, features=features)
    assert find_columns(rows).label == "fine_label"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["x"], "label": [0]}, {"label_column": "labell"}, r"`label_column` \(=labell\).*nearest: `label`"),
        ({"text": ["x"], "label": [0]}, {"image_column": "text", "text_column": "text"}, "exclude each other"),
        ({"text": ["x"], "label": [0]}, {"image_column": "label"}, r"`label` \(int64\)"),
        ({"text": ["x"], "label": [0]}, {"text_column": "label"}, "holds no strings"),
        ({"a": ["x"], "b": ["x"], "label": [0]}, {}, r"`a` \(string\), `b` \(string\).*`text_column`"),
        ({"text": ["x"], "a": [0], "b": [0]}, {}, "`label_column`"),
        ({"text": ["x"]}, {}, "`label_column`"),
        ({"x": [1.0], "label": [0]}, {}, "`image_column`"),
    ],
)
def test_columns_that_cannot_be_found(columns, options, message):
    with pytest.raises(DataError, match=message):
        find_columns(Dataset.from_dict(columns), **options)


@pytest.mark.parametrize(
    ("dtype", "values", "names"),
    [
        ("string", ["x", "é", "x"], ["x", "é"]),
        ("large_string", ["b", "c", "b"], ["b", "c"]),
        ("int64", [9, 10, 9], ["9", "10"]),
        ("uint8", [3, 7, 3], ["3", "7"]),
        ("bool", [False, True, False], ["False", "True"]),
    ],
)
def test_classes_are_numbered_in_order_of_their_values(dtype, values, names):
    rows = Dataset.from_dict({"kind": values}, features=Features({"kind": Value(dtype)}))
    labels, found = encode_labels(rows, "kind", split="train")
    assert labels.tolist() == [0, 1, 0] and labels.dtype == "int64" and found == names
    labels, found = encode_labels(rows.select([1, 2]), "kind", split="train")
    assert labels.tolist() == [1, 0] and found == names
