"""Laws of tables that name images: they are found below the folder, with or without suffix, or the way on is told."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from etf_adapt.data.load import load_data
from etf_adapt.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, *, rows: int = 4, first: int = 0, suffix: str = ".png") -> None:
    """Write squares, each as wide as its number, so that a row can be told from another."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(first, first + rows):
        Image.new("RGB", (row + 1, 4)).save(folder / f"{row}{suffix}", "PNG")


def table(file: Path, names: list[str], header: str = "name,kind") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(header + "\n" + "".join(f"{name},{'ab'[row % 2]}\n" for row, name in enumerate(names)))
    return file


def widths(source: Path, split: str = "train", **options) -> list[int]:
    data = load_data(str(source), validation_fraction=0, **options)
    assert data.task == "image"
    return [image.size[0] for image in getattr(data, split)["image"]]


@pytest.mark.parametrize("names", ["{}.png", "deep/{}.png", "pictures/deep/{}.png", "{}", "deep/{}"])
@pytest.mark.parametrize("header", ["image_id,label", "file,kind"])
def test_images_are_found_in_folders_below(tmp_path, names, header):
    write(tmp_path / "pictures" / "deep")
    file = table(tmp_path / "train.csv", [names.format(row) for row in (2, 0, 3, 1)], header)
    assert widths(tmp_path) == widths(file) == [3, 1, 4, 2]


def test_ids_in_a_column_of_any_name_are_found_in_a_folder_that_is_the_data(tmp_path):
    write(tmp_path / "images")
    file = table(tmp_path / "labels.csv", ["2", "0", "3", "1"], "id,breed")
    assert widths(tmp_path) == widths(file) == [3, 1, 4, 2]
    table(file, ["2", "0", "3", "1"], "key,breed")
    assert widths(tmp_path) == [3, 1, 4, 2]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_of_each_folder_names_the_images_beside_it(tmp_path, kind):
    for split, first in (("train", 0), ("test", 4)):
        for part in (0, 1):
            folder = tmp_path / split / f"part{part}"
            write(folder, rows=2, first=0 if split == "train" else first + part)
            rows = Dataset.from_dict({"file_name": [f"{(0 if split == 'train' else first + part) + i}.png" for i in (0, 1)],
                                      "label": ["a", "b"]})  # fmt: skip
            {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](folder / f"metadata.{kind}")
    assert widths(tmp_path) == [1, 2, 1, 2]
    assert widths(tmp_path, "test") == [5, 6, 6, 7]


def test_the_same_name_is_taken_from_the_folder_of_the_split_or_is_a_question(tmp_path):
    write(tmp_path / "train_images")
    write(tmp_path / "test_images", rows=2)
    table(tmp_path / "train.csv", ["3.png", "1.png"])
    table(tmp_path / "test.csv", ["1.png", "0.png"])
    assert (widths(tmp_path), widths(tmp_path, "test")) == ([4, 2], [2, 1])
    (tmp_path / "train_images").rename(tmp_path / "some")
    write(tmp_path / "other")
    with pytest.raises(DataError, match=r"`3\.png` of split train names .*`image_root`"):
        load_data(str(tmp_path / "train.csv"))
    assert widths(tmp_path / "train.csv", image_root=str(tmp_path / "other")) == [4, 2]


def test_the_root_of_images_may_lie_elsewhere_and_comes_first(tmp_path):
    write(tmp_path / "far" / "away")
    (tmp_path / "near").mkdir()
    for row in range(4):  # of other sizes
        Image.new("RGB", (9, 9)).save(tmp_path / "near" / f"{row}.png")
    file = table(tmp_path / "near" / "rows.csv", ["3.png", "1.png"], "id,kind")
    for source in (file, file.parent):
        assert widths(source, image_root=str(tmp_path / "far")) == [4, 2]
    with pytest.raises(FileNotFoundError, match=r"`image_root` .*nearest: .*far"):
        load_data(str(file), image_root=str(tmp_path / "faar"))


def test_an_image_that_is_missing_is_named_with_the_way_on(tmp_path):
    write(tmp_path / "images")
    file = table(tmp_path / "train.csv", ["0.png", "1.png", "gone.png", "2.png"])
    with pytest.raises(DataError, match=r"Row 2 of split train .*gone\.png.*`image_root`"):
        load_data(str(file))


def test_texts_labels_and_numbers_that_resemble_names_are_none(tmp_path):
    write(tmp_path / "icons", rows=2)
    Image.new("RGB", (4, 4)).save(tmp_path / "icons" / "cat.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "icons" / "dog.png")
    lines = [f"some text of {row},{('cat', 'dog')[row % 2]},{row % 2}\n" for row in range(8)]
    (tmp_path / "train.csv").write_text("text,label,fold\n.,cat,0\n/,dog,1\n" + "".join(lines))
    assert load_data(str(tmp_path), validation_fraction=0).task == "text"


def test_class_folders_beside_a_table_that_names_their_images_are_a_question(tmp_path, caplog):
    write(tmp_path / "part1", rows=2)
    write(tmp_path / "part2", rows=2, first=2)
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / "names.csv").write_text("class,long name\npart1,The first\npart2,The second\n")
    assert load_data(str(tmp_path), validation_fraction=0).label_names == ["part1", "part2"]
    assert "names.csv" in caplog.text and "settings.json" in caplog.text
    file = table(tmp_path / "skin.csv", ["2", "0", "3", "1"], "image_id,dx")
    with pytest.raises(DataError, match=r"class folders, and a table.*skin\.csv"):
        load_data(str(tmp_path))
    assert widths(file) == [3, 1, 4, 2]


def test_metadata_that_name_no_image_are_an_error_and_no_texts(tmp_path):
    write(tmp_path / "cat")
    write(tmp_path / "dog")
    table(tmp_path / "metadata.csv", ["Ann", "Bob", "Cid", "Dee"], "patient,label")
    with pytest.raises(DataError, match=r"metadata\.csv` names no image"):
        load_data(str(tmp_path))
