"""Laws of columns: they are found by type and name, and classes are numbered the same whatever they are stored as."""

from __future__ import annotations

import re

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from etf_adapt.errors import DataError
from etf_adapt.sources.columns import encode_labels, find_columns


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


def test_columns_are_found_without_reading_another_column():
    features = Features({"image": Image(), "file_name": Value("string"), "label": Value("string")})
    rows = {"image": [{"bytes": b"no image", "path": None}], "file_name": ["a.jpg"], "label": ["k"]}
    assert find_columns(Dataset.from_dict(rows, features=features)).input == "image"
    assert find_columns(Dataset.from_dict(rows, features=features), image_column="file_name").input == "file_name"


def test_of_several_class_labels_the_usual_name_is_taken():
    features = Features({"text": Value("string"), "coarse_label": ClassLabel(2), "fine_label": ClassLabel(3)})
    rows = Dataset.from_dict({"text": ["x"], "coarse_label": [0], "fine_label": [1]}, features=features)
    assert find_columns(rows).label == "fine_label"


KINDS = {
    "text": ([f"text {row}" for row in range(12)], Value("string")),
    "class": (["a", "b", "c"] * 4, Value("string")),
    "ids": ([f"n{row}" for row in range(12)], Value("string")),
    "number": (list(range(12)), Value("int64")),
    "code": ([0, 1, 2] * 4, Value("int64")),
    "gaps": (["a", None, "b"] * 4, Value("string")),
    "names": ([0, 1, 2] * 4, ClassLabel(3)),
    "score": ([0.5] * 12, Value("float64")),
    "image": ([{"bytes": b"...", "path": None}] * 12, Image()),
}


def table(description):
    """Make a table of "name:kind" words."""
    kinds = dict(word.split(":") for word in description.split())
    columns = {name: KINDS[kind][0] for name, kind in kinds.items()}
    return Dataset.from_dict(columns, features=Features({name: KINDS[kind][1] for name, kind in kinds.items()}))


@pytest.mark.parametrize(
    ("description", "chosen", "rules"),
    [
        ("sentence:text label:names idx:number", "sentence label", 0),  # sst2, CoLA
        ("text:text label:names", "text label", 0),  # emotion, ag_news, imdb, banking77, rotten tomatoes
        ("text:text intent:names", "text intent", 0),  # clinc
        ("text:text labels:code id:ids", "text labels", 0),
        ("text:text coarse_label:names fine_label:names", "text fine_label", 1),  # trec
        ("img:image fine_label:names coarse_label:names", "img fine_label", 1),  # cifar100
        ("text:text label:code label_text:class", "text label", 2),
        ("id:number keyword:gaps location:gaps text:text target:code", "text target", 1),  # Kaggle's disaster tweets
        ("review:text sentiment:class", "review sentiment", 0),
        ("Text:text Label:class", "Text Label", 0),
        ("title:text text:text label:class", "text label", 1),
        ("sentence:text source:class label:class", "sentence label", 0),
        ("image:image caption:text label:names", "image label", 1),
        ("id:number headline:text category:class", "headline category", 0),
        ("guid:ids review:text mood:class", "review mood", 0),
        ("text:text stance:class label:code", "text label", 2),
        ("text:text topic:class kind:names", "text kind", 2),
        ("text:text target:class date:class", "text target", 0),
        ("url:text label:code", "url label", 0),
        ("text:text class_id:code", "text class_id", 0),
    ],
)
def test_common_tables_are_read_and_a_choice_among_several_is_a_rule_that_is_told(description, chosen, rules):
    found = find_columns(table(description))
    assert f"{found.input} {found.label}" == chosen and len(found.rules) == rules
    assert all(re.search(r"--(text|label|image)_column", rule) for rule in found.rules)
    assert {found.input, found.label, *found.left_out} == {word.split(":")[0] for word in description.split()}


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (
            "index:number question:text sentence:text label:names",
            "`question`, `sentence` .*--text_column question sent",
        ),
        ("question:class sentence:text label:class", "`question`, `sentence` each hold texts"),
        ("sentence1:text sentence2:text label:names idx:number", "--text_column sentence1 sentence2"),
        ("premise:text hypothesis:text label:names", "--text_column premise hypothesis"),
        ("text_a:text text_b:text label:class", "--text_column text_a text_b"),
        ("title:text content:text label:names", "--text_column title content"),  # of which no name speaks of the whole
        ("body:text extra:text label:names", "--text_column body extra"),
        ("tweet:text target:class stance:class", "`target`, `stance` could each be the label.*--label_column"),
        ("Tweet:text Target:class Stance:class", "`Target`, `Stance` could each be the label"),
        ("text:text label:code category:class", "`label`, `category` could each be the label"),
        ("text:text scenario:names intent:names", "`intent`, `scenario` could each be the label"),
        ("text:text x:code z:class", "`x`, `z` could each be the label"),
        ("photo_a:image photo_b:image label:names", "`photo_a`, `photo_b` each hold images.*--image_column"),
    ],
)
def test_a_choice_between_equals_is_asked_for(description, words):
    with pytest.raises(DataError, match=words):
        find_columns(table(description))


def test_two_text_columns_that_are_named_are_a_pair():
    found = find_columns(table("question:text sentence:text label:names"), text_column=["sentence", "question"])
    assert (found.input, found.pair, found.label, found.left_out) == ("sentence", "question", "label", ())
    assert find_columns(table("text:text label:names"), text_column=["text"]).pair is None
    for wrong in (["text", "text"], ["text", "label", "more"]):
        with pytest.raises(DataError, match="must name one column, or the two columns of pairs"):
            find_columns(table("text:text label:class more:text"), text_column=wrong)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["x"], "label": [0]}, {"label_column": "labell"}, r"`label_column` \(=labell\).*nearest: `label`"),
        ({"text": ["x"], "label": [0]}, {"image_column": "text", "text_column": "text"}, "exclude each other"),
        ({"text": ["x"], "label": [0]}, {"image_column": "label"}, r"`label` \(int64\)"),
        ({"text": ["x"], "label": [0]}, {"text_column": "label"}, "holds no strings"),
        (
            {"a": ["x"], "b": ["x"], "label": [0]},
            {},
            "`a`, `b` each hold texts: name one with `text_column`.*--text_column a b",
        ),
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
