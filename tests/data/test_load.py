"""A data set comes out the same whatever it was stored in, and what is wrong with it is said before training."""

from __future__ import annotations

import io
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets.table import InMemoryTable
from PIL import Image as PILImage

from etf_adapt.data import load
from etf_adapt.data.inputs import open_inputs
from etf_adapt.data.load import load_data
from etf_adapt.data.long_tail import class_counts
from etf_adapt.errors import DataError
from etf_adapt.sources import tables
from etf_adapt.sources.opening import Source

TEXTS = {
    "train": [("a cat", "cat"), ("a dog", "dog"), ("an eel", "eel")] * 20,
    "test": [("one eel", "eel"), ("one cat", "cat")],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def table(rows, **features):
    """Make a text data set of (text, label) rows."""
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    if not features:
        return Dataset.from_dict(columns)
    return Dataset.from_dict(columns, features=Features({"text": Value("string")} | features))


def png(size=(4, 4)):
    stream = io.BytesIO()
    PILImage.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


def image_folder(root, classes):
    """Write `classes`, {folder: number of images}, below a root."""
    for folder, number in classes.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            (root / folder / f"{index}.png").write_bytes(png())
    return str(root)


def saved(tmp_path, **splits):
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def names_of(dataset):
    return [dataset.features["label"].int2str(label) for label in dataset["label"]]


# -- the same rows from every store


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "inside", ["{split}.{suffix}", "data/{split}-00000-of-00001.{suffix}", "{split}/rows.{suffix}"]
)
def test_folder_of_tables(tmp_path, suffix, inside):
    for split, rows in TEXTS.items():
        file = tmp_path / inside.format(split=split, suffix=suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix in ("csv", "tsv"):
            table(rows).to_csv(file, index=False, sep="\t" if suffix == "tsv" else ",")
        elif suffix == "parquet":
            table(rows).to_parquet(file)
        else:
            table(rows).to_json(file, lines=suffix == "jsonl")
    (tmp_path / "README.md").write_text("not a table")
    data = load_data(str(tmp_path), validation_fraction=0)
    assert data.task == "text"
    assert data.label_names == ["cat", "dog", "eel"]
    assert data.validation is None
    for split, rows in TEXTS.items():
        result = getattr(data, split)
        assert list(zip(result["text"], names_of(result), strict=True)) == rows
        assert result.features["label"] == ClassLabel(names=data.label_names)


def test_saved_folder_file_and_pattern_hold_the_same_training_rows(tmp_path):
    sources = [saved(tmp_path, **{split: table(rows) for split, rows in TEXTS.items()})]
    for part in (0, 1):
        table(TEXTS["train"][30 * part : 30 * part + 30]).to_csv(tmp_path / f"train-{part}.csv", index=False)
    sources.append(str(tmp_path / "train-*.csv"))
    table(TEXTS["train"]).to_csv(tmp_path / "all.csv", index=False)
    sources.append(str(tmp_path / "all.csv"))
    table(TEXTS["train"]).save_to_disk(tmp_path / "one_split")
    sources.append(str(tmp_path / "one_split"))
    hashes = set()
    for source in sources:
        data = load_data(source, imbalance_factor=5)
        hashes.add(data.description["row_ids_sha256"]["train"])
        assert data.class_counts.tolist() == [18, 7, 4]
    assert len(hashes) == 1


def test_splits_of_other_names(tmp_path):
    for name in ("train", "dev", "test"):
        table(TEXTS["train"]).to_csv(tmp_path / f"{name}.csv", index=False)
    data = load_data(str(tmp_path))
    assert data.validation.num_rows == 60
    assert data.description["validation_origin"] == "its own split"


@pytest.mark.parametrize(
    ("name", "rows", "num_classes", "smallest"),
    [
        ("cifar100", 20000, 100, 2),
        ("clinc150", 15000, 150, 1),
        ("bccd_cells", 3245, 6, 14),
        ("goemotions_single", 36308, 28, 39),
    ],
)
def test_real_data(shared_data, name, rows, num_classes, smallest):
    data = load_data(str(shared_data / name), imbalance_factor=100, validation_fraction=0)
    everything = load_data(str(shared_data / name), validation_fraction=0)
    assert everything.train.num_rows == rows
    assert len(data.label_names) == num_classes
    assert data.class_counts.min() == smallest
    assert data.class_counts.tolist() == np.bincount(data.train["label"], minlength=num_classes).tolist()
    assert data.test.features == data.train.features
    assert data.test.num_rows == everything.test.num_rows


def test_no_image_is_decoded(shared_data, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "decode_example", refuse)
    data = load_data(str(shared_data / "cifar100"), imbalance_factor=100)
    with pytest.raises(AssertionError, match="decoded"):
        data.train[0]


# -- image folders


def test_image_folder_with_splits(tmp_path):
    root = image_folder(tmp_path, {"train/2": 6, "train/10": 5, "test/10": 3, "test/2": 1})
    data = load_data(root)
    assert data.label_names == ["2", "10"]
    assert data.class_counts.tolist() == [5, 4]
    assert names_of(data.test) == ["2", "10", "10", "10"]
    assert data.train[0]["image"].size == (4, 4)


def test_image_folder_without_splits_takes_the_first_folder_as_the_class(tmp_path):
    root = image_folder(tmp_path, {"cat/black": 2, "cat/white": 2, "dog": 3, ".hidden": 1})
    data = load_data(root, validation_fraction=0)
    assert (data.label_names, data.class_counts.tolist(), data.test) == (["cat", "dog"], [4, 3], None)


def test_a_test_split_with_a_lone_class_keeps_its_label(tmp_path):
    data = load_data(image_folder(tmp_path, {"train/cat": 2, "train/dog": 2, "test/dog": 2}))
    assert names_of(data.test) == ["dog", "dog"]


def test_image_folder_with_metadata(tmp_path):
    image_folder(tmp_path, {"train": 4, "test": 2})
    for split, rows in (("train", 4), ("test", 2)):
        lines = ["file_name,label"] + [f"{row}.png,{'ab'[row % 2]}" for row in range(rows)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    data = load_data(str(tmp_path), validation_fraction=0)
    assert (data.task, data.label_names) == ("image", ["a", "b"])
    assert names_of(data.test) == ["a", "b"]


def test_table_of_image_paths_relative_to_it(tmp_path):
    image_folder(tmp_path, {"pictures": 4})
    (tmp_path / "all.csv").write_text("path,kind\n" + "".join(f"pictures/{row}.png,{row % 2}\n" for row in range(4)))
    for source in (tmp_path / "all.csv", tmp_path):
        data = load_data(str(source), label_column="kind", validation_fraction=0)
        assert (data.task, data.label_names) == ("image", ["0", "1"])
        assert data.train[3]["image"].size == (4, 4)


# -- labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        ([10, 9, -1, 2], ["-1", "2", "9", "10"]),
        ([True, False, True, False], ["False", "True"]),
        (["NA", "None", "null", "x"], ["NA", "None", "null", "x"]),
    ],
)
def test_values_become_class_names_in_a_stable_order(tmp_path, values, names):
    table([("text", value) for value in values]).to_csv(tmp_path / "train.csv", index=False)
    data = load_data(str(tmp_path), validation_fraction=0)
    assert data.label_names == names
    assert names_of(data.train) == [str(value) for value in values]
    assert data.id2label == dict(enumerate(names))


def test_class_labels_keep_their_order_and_splits_meet_by_name(tmp_path):
    train = table([("x", 0), ("y", 1), ("z", 2)] * 2, label=ClassLabel(names=["z", "b", "a"]))
    test = table([("x", 0), ("y", 1)], label=ClassLabel(names=["a", "z"]))
    strings = table([("x", "b")])
    data = load_data(saved(tmp_path, train=train, test=test, validation=strings))
    assert data.label_names == ["z", "b", "a"]
    assert names_of(data.train) == ["z", "b", "a"] * 2
    assert names_of(data.test) == ["a", "z"]
    assert names_of(data.validation) == ["b"]


def test_a_split_with_hidden_labels_is_left_out(tmp_path):
    label = ClassLabel(names=["a", "b"])
    hidden = table([("x", -1), ("y", -1)], label=label)
    data = load_data(saved(tmp_path, train=table([("x", 0), ("y", 1)] * 5, label=label), test=hidden))
    assert data.test is None


# -- the order of cuts


def test_validation_is_cut_after_the_long_tail_and_no_class_loses_its_last_row(tmp_path):
    rows = table([(f"text {row}", row % 4) for row in range(400)])
    data = load_data(saved(tmp_path, train=rows), imbalance_factor=100)
    validation = np.bincount(data.validation["label"], minlength=4)
    assert (data.class_counts + validation).tolist() == [100, 21, 4, 1]
    assert validation.tolist() == [10, 2, 0, 0]
    assert not set(data.train["text"]) & set(data.validation["text"])


def test_validation_before_the_long_tail_is_balanced(tmp_path):
    rows = table([(f"text {row}", label) for row, label in enumerate(np.repeat(range(4), [210, 100, 87, 3]))])
    data = load_data(saved(tmp_path, train=rows), imbalance_factor=200, validation_before_long_tail=True)
    assert np.bincount(data.validation["label"]).tolist() == [10, 10, 10, 2]
    assert data.class_counts.tolist() == [200, 34, 5, 1]
    assert not set(data.train["text"]) & set(data.validation["text"])


def test_test_and_given_validation_rows_are_left_as_they_are(tmp_path):
    splits = {
        name: table([(f"{name} {row}", row % 2) for row in range(20)]) for name in ("train", "validation", "test")
    }
    data = load_data(saved(tmp_path, **splits), imbalance_factor=10, max_train_rows=6)
    assert (data.validation.num_rows, data.test.num_rows) == (20, 20)
    assert data.class_counts.tolist() == [5, 1]


def test_the_description_tells_what_was_done(tmp_path):
    description = load_data(saved(tmp_path, train=table(TEXTS["train"])), imbalance_factor=4, seed=3).description
    assert description["rows"] == {"train": 31, "validation": 4}
    assert description["rows_in_source"] == {"train": 60}
    assert description["long_tail"] == {
        "imbalance_factor": 4.0,
        "profile": "exponential",
        "class_order": "label",
        "seed": 3,
    }
    taken = {"input": "text", "pair": None, "label": "label", "left_out": (), "rules": ()}
    assert description["columns"] == taken and description["files"] == {"number": 0, "first": []}
    assert set(description["row_ids_sha256"]) == {"train", "validation"}


# -- pairs and size


def test_a_pair_is_read_as_two_texts(tmp_path):
    lines = [f"{row}\tquestion {row}\tanswer {row}\t{'ab'[row % 2]}" for row in range(20)]
    (tmp_path / "train.tsv").write_text("\n".join(["id\tquestion\tsentence\tlabel", *lines]))
    data = load_data(str(tmp_path), text_column=("sentence", "question"), validation_fraction=0.2)
    assert data.train.column_names == data.validation.column_names == ["text", "text_pair", "label"]
    pairs = [(row["text"].split(), row["text_pair"].split()) for row in data.train]
    assert all((a, b, n) == ("answer", "question", m) for (a, n), (b, m) in pairs)
    assert (data.task, data.description["columns"]["pair"]) == ("text", "question")
    (tmp_path / "test.tsv").write_text("question\tsentence\tlabel\n \tx\ta\n")
    with pytest.raises(DataError, match="Row 0 of split test has an empty text pair"):
        load_data(str(tmp_path), text_column=["sentence", "question"])
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nx\ta\n")
    with pytest.raises(DataError, match="Column `question` is missing in split test"):
        load_data(str(tmp_path), text_column=["sentence", "question"])


def large_table(label):
    """Make a table of more than 2 GiB of text, which repeats a buffer of 16 MiB."""
    texts = pa.array([f"{row} {'x' * 2**20}" for row in range(16)])
    chunks = 2**31 // texts.nbytes + 2
    labels = pa.array([label(row) for row in range(16)])
    return pa.table({"text": pa.chunked_array([texts] * chunks), "label": pa.chunked_array([labels] * chunks)})


@pytest.mark.slow
def test_no_step_joins_the_texts_of_a_split(monkeypatch):
    monkeypatch.setattr(load, "open_data_set", lambda *_, **__: Source("files", {"train": rows, "test": rows}))
    rows = Dataset(InMemoryTable(large_table(lambda row: f"{row % 4}{'y' * 2**20}")), fingerprint="large")
    assert rows.data.nbytes > 2**32
    data = load_data("large", imbalance_factor=10, max_train_rows=500)
    assert data.train.num_rows == 500 and data.test.num_rows == rows.num_rows and len(data.label_names) == 4
    assert data.train[499]["text"].endswith("xx")
    shuffled = rows.shuffle(seed=0, keep_in_memory=True)
    with pytest.raises(ValueError, match="`text` holds string"):
        class_counts(shuffled, label_column="text")


def test_a_file_of_more_than_2_gib_is_opened(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("stands for the file")
    monkeypatch.setattr(tables, "_read_csv", lambda _: large_table(lambda row: row % 4))
    assert tables.read_tables([tmp_path / "train.csv"]).data.nbytes > 2**31


# -- bad input


AB = ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [("x", "a"), ("y", "a")]}, "has 1 class"),
        ({"train": [("x", 0), ("y", 0)], "feature": AB}, "1 of 2 classes have no training rows: `b`"),
        ({"train": [("x", "a"), ("y", None)]}, "Row 1 of split train has no label"),
        ({"train": [("x", "a"), ("y", "")]}, "Row 1 of split train has no label"),
        ({"train": [("x", 0), ("y", 1), ("z", -1)], "feature": AB}, "Row 2 of split train has no label"),
        ({"train": [("x", 0.5), ("y", 1.5)]}, "holds double values"),
        ({"train": [("x", [0]), ("y", [1])]}, "holds list<.*one for each row"),
        ({"train": [("x", "a"), ("  ", "b")]}, "Row 1 of split train has an empty text"),
        ({"train": [("x", "a"), (None, "b")]}, "Row 1 of split train has an empty text"),
        ({"train": [("x", "a"), ("y", "b")], "test": [("z", "a"), ("z", "c")]}, "`c`, first in row 1"),
        ({"train": [("x", "a"), ("y", "b")], "test": [("z", "a"), ("", "b")]}, "Row 1 of split test has an empty text"),
    ],
)
def test_bad_rows(tmp_path, splits, message):
    feature = {"label": splits.pop("feature")} if "feature" in splits else {}
    with pytest.raises(DataError, match=message):
        load_data(
            saved(tmp_path, **{name: table(rows, **feature) for name, rows in splits.items()}), validation_fraction=0
        )


def test_a_label_outside_of_the_names(tmp_path):
    path = saved(tmp_path, train=table([("x", 0), ("y", 1), ("z", 7)]))
    rows = datasets.load_from_disk(path)["train"]
    info = rows.info.copy()
    info.features = Features({"text": Value("string"), "label": AB})
    Dataset(rows.data, info=info).save_to_disk(tmp_path / "bad")  # as a writer that checks nothing would leave it
    with pytest.raises(DataError, match="Label 7 in row 2 of split train"):
        load_data(str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance_factor": 0}, "imbalance_factor"),
        ({"imbalance_factor": -3}, "imbalance_factor"),
        ({"imbalance_factor": 0.01}, "imbalance_factor"),
        ({"imbalance_profile": "linear"}, "profile"),
        ({"class_order": "size"}, "class_order"),
        ({"seed": -1}, "seed"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_a_wrong_option_is_known_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        load_data("/does/not/exist", **options)


def test_max_train_rows_below_the_number_of_classes():
    with pytest.raises(ValueError, match="max_train_rows"):
        load_data("digits", max_train_rows=9)


def test_single_rows_leave_nothing_to_validate_on(tmp_path):
    path = saved(tmp_path, train=table([("x", "a"), ("y", "b")]))
    with pytest.raises(ValueError, match="validation_fraction"):
        load_data(path)
    assert load_data(path, validation_fraction=0).validation is None


def test_a_class_that_only_test_has(tmp_path):
    root = image_folder(tmp_path, {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/emu": 1})
    with pytest.raises(DataError, match="`emu`"):
        load_data(root)


def test_an_empty_class_folder(tmp_path):
    with pytest.raises(DataError, match="no training rows: `emu`"):
        load_data(image_folder(tmp_path, {"cat": 2, "dog": 2, "emu": 0}))


def test_an_image_outside_of_the_class_folders(tmp_path):
    root = Path(image_folder(tmp_path, {"cat": 2, "dog": 2}))
    (root / "stray.png").write_bytes(png())
    with pytest.raises(DataError, match=r"stray\.png"):
        load_data(str(root))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", png()[:20]])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    root = Path(image_folder(tmp_path, {"cat": 3, "dog": 3}))
    (root / "dog" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"Row 4 of split train .*dog/1\.png"):
        load_data(str(root))


def test_bytes_that_are_no_image_are_named_by_their_row_in_the_source(tmp_path):
    images = [{"bytes": png(), "path": None}] * 9 + [{"bytes": b"no image", "path": None}]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    path = saved(tmp_path, train=Dataset.from_dict({"image": images, "label": [0, 1] * 5}, features=features))
    with pytest.raises(DataError, match="Row 9 of split train"):
        load_data(path, max_train_rows=8, validation_fraction=0.5)
    rows = Dataset.from_dict({"image": [images[0], None], "label": [0, 1]}, features=features)
    with pytest.raises(DataError, match="Row 1 of split train has no image"):
        load_data(saved(tmp_path / "none", train=rows), validation_fraction=0)


def test_a_test_split_without_the_label_column(tmp_path):
    table(TEXTS["train"]).to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "test.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match="Column `label` is missing in split test"):
        load_data(str(tmp_path))


def test_paths_that_hold_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no table")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "rows.csv").write_text("text,label\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    image_folder(tmp_path, {"pictures": 2})
    (tmp_path / "pictures" / "metadata.csv").write_text("name,label\n0.png,a\n")
    for name, error, message in [
        ("empt", FileNotFoundError, "nearest: .*empty"),
        ("*.orc", FileNotFoundError, "matches no file"),
        ("empty", DataError, "holds neither"),
        ("notes.txt", DataError, r"\.txt .*\.csv"),
        ("broken.parquet", DataError, r"broken\.parquet` cannot be read"),
        ("saved", DataError, "saved` cannot be read"),
        ("pictures", DataError, "1 class"),
        ("rows.csv", DataError, "has no rows|cannot be read"),
    ]:
        with pytest.raises(error, match=message):
            load_data(str(tmp_path / name))


def test_splits_of_which_none_is_known_are_one_message(tmp_path):
    DatasetDict({name: Dataset.from_dict({"text": ["a"], "label": ["x"]}) for name in ("en", "de")}).save_to_disk(
        str(tmp_path / "saved")
    )
    message = "The splits `en`, `de` are none of train, validation, test: rename them, or give a data set of one split"
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=message):
        open_inputs(str(tmp_path / "saved"), task="text")


def test_a_pattern_is_read_in_a_folder_whose_name_is_one(tmp_path, monkeypatch):
    place = tmp_path / "data[1]"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in ("train-0", "train-1"):
        table(TEXTS["train"]).to_csv(f"{name}.csv", index=False)
    assert load_data("train-*.csv", validation_fraction=0).train.num_rows == 120


def test_files_whose_names_are_of_no_split_are_said_to_be_left_out(tmp_path, caplog):
    for name in ("train", "sample_submission"):
        table(TEXTS["train"]).to_csv(tmp_path / f"{name}.csv", index=False)
    assert load_data(str(tmp_path), validation_fraction=0).train.num_rows == 60
    assert "sample_submission.csv" in caplog.text


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/name:configuration"])
def test_a_hub_that_cannot_be_reached_is_one_message_at_once(monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    load_builder, offline = datasets.load_dataset_builder, []

    def watched(*arguments, **options):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return load_builder(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", watched)
    start = time.monotonic()
    with pytest.raises(DataError, match=f"`dataset` .={name}. .*cannot be reached.*local folder.*digits") as caught:
        load_data(name)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert offline == [True]  # it reads the cache alone, without its own retries
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_cached_hub_data_set_is_read_offline(tmp_path):
    (tmp_path / "name").mkdir()
    table(TEXTS["train"]).to_csv(tmp_path / "name" / "train.csv", index=False)
    datasets.load_dataset(str(tmp_path / "name"))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    (cache / "name").rename(cache / "owner___name")  # where a data set of the Hub lies
    assert load_data("owner/name").label_names == ["cat", "dog", "eel"]
