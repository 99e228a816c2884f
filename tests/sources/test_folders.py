"""Laws of folders: what Pillow reads is read, once; what is not is counted and named; a name is only a name."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from etf_adapt.data.load import load_data
from etf_adapt.errors import DataError
from etf_adapt.results.run_folder import ARGUMENTS_FILE
from etf_adapt.sources.folders import IMAGE_SUFFIXES, RUN_FILE, list_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(root: Path, *files: str) -> Path:
    """Write a small picture to each file below a root, in PNG unless the suffix says otherwise."""
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions().get(file.suffix.lower(), "PNG")
        Image.new("L" if kind in ("PPM",) else "RGB", (8, 8)).save(file, kind)
    return root


def classes(root: Path, **options) -> dict[str, int]:
    """Return the training rows of each class."""
    data = load_data(str(root), validation_fraction=0, **options)
    assert data.task == "image"
    return dict(zip(data.label_names, data.class_counts.tolist(), strict=True))


# -- what is read


def test_suffixes_are_those_of_datasets_and_pillow():
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    header_alone = {".bufr", ".grib", ".mpeg", ".mpg", ".wmf", ".emf"}
    assert set(ImageFolder.EXTENSIONS) - IMAGE_SUFFIXES == header_alone
    assert {".jfif", ".jp2", ".tga", ".webp"} <= IMAGE_SUFFIXES and ".pdf" not in IMAGE_SUFFIXES


def test_images_of_any_suffix_and_of_none_are_read_and_what_is_skipped_is_counted_and_named(tmp_path, caplog):
    write(tmp_path, "cat/1.jfif", "cat/2.tga", "cat/3.PNG", "cat/4.jp2", "dog/photo", "dog/cell.0001", "dog/5.ppm")
    for name in ("cat/LICENSE", "cat/a.txt", "dog/b.txt", "dog/.DS_Store"):
        (tmp_path / name).write_text("no picture")
    assert classes(tmp_path) == {"cat": 4, "dog": 3}
    lines = [line for line in caplog.messages if line.startswith("Not read")]
    assert len(lines) == 1
    for words in (".txt: 2", "cat/a.txt", "without a suffix: 1", "LICENSE", "hidden: 1"):
        assert words in lines[0]


@pytest.mark.parametrize(
    "name", ["train", "test", "val", "[a]", "*", "?", "a [b] (c)", "{x}", "Ünï", "-x", "a::b", "a%20b"]
)
def test_a_class_may_have_any_name(tmp_path, name):
    files = [f"{kind}/{row}.png" for kind in (name, "bus", "car") for row in range(2)]
    assert classes(write(tmp_path / "flat", *files)) == {name: 2, "bus": 2, "car": 2}
    both = [f"{split}/{file}" for split in ("train", "test") for file in files]
    assert classes(write(tmp_path / "split", *both)) == {name: 2, "bus": 2, "car": 2}
    assert classes(write(tmp_path / name / "[x]*", *files)) == {name: 2, "bus": 2, "car": 2}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_pattern_characters_in_names_of_tables_are_characters(tmp_path, suffix):
    folder = tmp_path / "a[1]*" / "train"
    folder.mkdir(parents=True)
    rows = Dataset.from_dict({"text": ["x", "y"], "label": ["a", "b"]})
    file = folder / f"rows[x]?.{suffix}"
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[suffix](file)
    for source in (file, folder, folder.parent):
        assert load_data(str(source), validation_fraction=0).train["text"][:] == ["x", "y"]


def test_links_are_followed_once(tmp_path, caplog):
    store = write(tmp_path / "store", "1.png", "2.png", "deep/3.png")
    root = write(tmp_path / "data", "cat/1.png", "cat/2.png", "dog/1.png")
    (root / "emu").symlink_to(store)  # elsewhere: a class as any other
    (root / "dog" / "linked.png").symlink_to(store / ".." / "data" / "dog" / "1.png")
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "above").symlink_to(tmp_path)
    (root / "a first").symlink_to(root / "cat")  # sorts before what it leads to
    assert classes(root) == {"cat": 2, "dog": 1, "emu": 3}
    assert "links to what is read already: 4" in caplog.text and "a first" in caplog.text


def test_links_into_a_hidden_store_are_read(tmp_path):
    store = write(tmp_path / ".store", *(f"{row}" for row in range(4)))
    for row in range(4):
        (tmp_path / "ab"[row % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[row % 2] / f"{row}.png").symlink_to(store / str(row))
    assert classes(tmp_path) == {"a": 2, "b": 2}


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"dog/2\.png.* is no file"):
        load_data(str(tmp_path), validation_fraction=0)


def test_folders_of_runs_are_passed_over_and_said_once(tmp_path, caplog):
    assert RUN_FILE == ARGUMENTS_FILE
    write(tmp_path, "cat/1.png", "dog/1.png", "runs/a/recalls.png", "cat/out/b/recalls.png")
    for run in ("runs/a", "cat/out/b"):
        (tmp_path / run / RUN_FILE).write_text("{}")
        (tmp_path / run / "predictions.csv").write_text("row,label\n0,cat\n")
    assert classes(tmp_path) == {"cat": 1, "dog": 1}
    assert caplog.text.count("folders of runs of this library: 2") == 1


# -- layouts


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/1.png", "test/2.png"], "lies in no class folder"),
        (["cat/1.png", "dog/1.png", "3.png"], r"3\.png` lies in no class folder"),
        (["train/cat/1.png", "train/dog/1.png", "extra/1.png"], r"extra/1\.png` lies in no class folder"),
        (["all/cat/1.png", "all/dog/1.png"], "one class folder.*data/all"),
        (
            ["train/cat/1.png", "train/dog/1.png", "train_old/cat/1.png", "train_old/dog/1.png"],
            "may hold the same rows",
        ),
        (["cat/1.png"], "1 class"),
    ],
)
def test_a_layout_that_could_be_read_in_two_ways_is_a_question(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_data(str(write(tmp_path / "data", *files)), validation_fraction=0)


def test_folders_below_the_classes_are_said_to_be_of_them(tmp_path, caplog):
    assert classes(write(tmp_path, "cat/black/1.png", "cat/2.png", "dog/1.png")) == {"cat": 2, "dog": 1}
    assert "cat/black" in caplog.text


TABLE = "text,label\nx,a\ny,b\n"


@pytest.mark.parametrize(
    "names",
    [
        ["train.csv", "train (1).csv"],
        ["train (1).csv", "train (2).csv"],
        ["train.csv", "train_old.csv"],
        ["train.csv", "Copy of train.csv"],
        ["train.csv", "train2.csv"],
        ["train_v1.csv", "train_v2.csv"],
        ["rows.csv", "rows - Copy.csv"],
        ["en/train.csv", "de/train.csv"],
        ["fold1/train.csv", "fold2/train.csv"],
        ["train.csv", "train.tsv"],
    ],
)
def test_copies_versions_and_configurations_are_a_question(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TABLE)
    with pytest.raises(DataError, match="may hold the same rows"):
        load_data(str(tmp_path), validation_fraction=0)
    if Path(names[0]).suffix == Path(names[1]).suffix:
        assert len(load_data(str(tmp_path / "**" / "*.csv"), validation_fraction=0).train) == 4  # named: no question


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.csv", "train-00001-of-00002.csv"],
        ["train-00000-of-00002-6f3b9a.csv", "train-00001-of-00002-9ac1e0.csv"],
        ["train/part1.csv", "train/part2.csv"],
        ["train.csv", "train.csv.bak"],
    ],
)
def test_numbered_parts_are_one_set_and_other_suffixes_are_not_read(tmp_path, names, caplog):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TABLE)
    tables = [name for name in names if name.endswith(".csv")]
    assert len(load_data(str(tmp_path), validation_fraction=0).train) == 2 * len(tables)
    assert ("train.csv.bak" in caplog.text) == (len(tables) == 1)


def test_a_walk_of_many_links_ends(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        for other in "abcdefgh":
            os.symlink(tmp_path, tmp_path / name / other)
    assert len(list_files(tmp_path).folders) == 9
