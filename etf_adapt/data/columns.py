"""Columns of a data set: which hold images, texts and labels, and what they hold."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from etf_adapt.data.long_tail import arrow_column
from etf_adapt.data.sources import IMAGE_SUFFIXES, quoted
from etf_adapt.errors import DataError, nearest_names

LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "class_name", "category", "intent", "y")
IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "image_path", "file_name", "filename", "file", "path")
TEXT_NAMES = ("text", "sentence", "content", "utterance", "review", "comment", "question", "query", "document", "tweet")


@dataclass(frozen=True)
class Columns:
    """The input column, what it holds ("image" or "text"), and the label column."""

    task: str
    input: str
    label: str


def find_columns(
    dataset: Dataset,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Columns:
    """Find the input and the label column by their types and, where that leaves several, by their usual names.

    Label: the only `ClassLabel`, else the first of `LABEL_NAMES`, else the only column left. Input: a column of images (an
    `Image`, image bytes, or paths of image files under a usual name), else a column of strings.
    """
    if image_column and text_column:
        raise DataError(f"`image_column` (={image_column}) and `text_column` (={text_column}) exclude each other.")
    for flag, name in (("image_column", image_column), ("text_column", text_column), ("label_column", label_column)):
        if name is not None and name not in dataset.column_names:
            near = nearest_names(name, dataset.column_names, limit=1)
            hint = f"; nearest: `{near[0]}`" if near else ""
            raise DataError(f"`{flag}` (={name}) is no column: there are {describe_columns(dataset)}{hint}.")

    _require_header(dataset, asked=(image_column, text_column, label_column))
    label = label_column or _choose(
        dataset, LABEL_NAMES, lambda name: isinstance(dataset.features[name], ClassLabel), strict=False
    )
    free = [name for name in dataset.column_names if name != label]
    if image_column and not (_holds_images(dataset, image_column) or is_string(dataset, image_column)):
        raise DataError(f"`image_column` (={image_column}) holds no images: {describe_columns(dataset)}.")
    if text_column and not is_string(dataset, text_column):
        raise DataError(f"`text_column` (={text_column}) holds no strings: {describe_columns(dataset)}.")
    task, chosen = ("image", image_column) if image_column else ("text", text_column)
    if chosen is None:
        inputs = dataset.select_columns(free)
        task, chosen = "image", _choose(inputs, IMAGE_NAMES, lambda name: _holds_images(dataset, name))
    if chosen is None:
        task, chosen = "text", _choose(inputs, TEXT_NAMES, lambda name: is_string(dataset, name))
    if chosen is None:
        raise DataError(
            "There is no or more than one column to classify by: there are "
            f"{describe_columns(dataset)}; name it with `image_column` or `text_column`."
        )
    rest = [name for name in free if name != chosen]
    if label is None and len(rest) == 1:
        label = rest[0]
    if label is None or label == chosen:
        raise DataError(
            f"No column is known to hold the classes: there are {describe_columns(dataset)}; name it with "
            "`label_column`."
        )
    return Columns(task, chosen, label)


def _require_header(dataset: Dataset, *, asked: Sequence[str | None]) -> None:
    """Refuse a table without a line of column names, whose first row would be taken for them."""
    for name in dataset.column_names:
        if name in (*LABEL_NAMES, *IMAGE_NAMES, *TEXT_NAMES, *asked):
            continue
        recurs = is_string(dataset, name) and first_true(pc.equal(arrow_column(dataset, name), name)) is not None
        if recurs or re.fullmatch(r"[-+]?\d+(\.\d+)?", name):
            raise DataError(
                f"Column name `{name}` looks like a cell of the first row: begin the table with a line of column names, such "
                "as text,label; or, if this is one, name the columns by `text_column` or `image_column`, and `label_column`."
            )


def _choose(
    dataset: Dataset, usual_names: Sequence[str], fits: Callable[[str], bool], *, strict: bool = True
) -> str | None:
    """Return the only column that fits, or of several the first by usual name; not strict: usual names alone do too."""
    fitting = [name for name in dataset.column_names if fits(name)]
    if len(fitting) == 1:
        return fitting[0]
    among = fitting if fitting or strict else dataset.column_names
    return next((name for name in usual_names if name in among), None)


def is_string(dataset: Dataset, name: str) -> bool:
    """Return whether a column holds strings."""
    feature = dataset.features[name]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _holds_images(dataset: Dataset, name: str) -> bool:
    feature = dataset.features[name]
    if isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} >= set(feature)):
        return True
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return True
    if not is_string(dataset, name) or name not in IMAGE_NAMES:
        return False
    return Path(dataset[0][name] or "").suffix.lower() in IMAGE_SUFFIXES


def describe_columns(dataset: Dataset) -> str:
    """Return the names and types of the columns as one line of text."""
    types = {
        name: feature.dtype if isinstance(feature, Value) else type(feature).__name__
        for name, feature in dataset.features.items()
    }
    return ", ".join(f"`{name}` ({dtype})" for name, dtype in types.items())


def encode_labels(dataset: Dataset, column: str, *, split: str) -> tuple[np.ndarray, list[str]]:
    """Encode a column of `ClassLabel`s, strings, integers or booleans as labels (rows,) int64; return also the class names.

    The names of a `ClassLabel` keep their order; strings are sorted, integers by value, and False precedes True.
    """
    feature = dataset.features[column]
    values = arrow_column(dataset, column)
    dtype = values.type
    if not (pa.types.is_integer(dtype) or pa.types.is_boolean(dtype) or is_string(dataset, column)):
        missing = pa.types.is_floating(dtype) and pc.any(pc.is_null(values, nan_is_null=True)).as_py()
        why = "some are missing" if missing else "a class is a string, an integer or a boolean, one for each row"
        raise DataError(f"Label column `{column}` of split {split} holds {dtype} values: {why}.")
    absent = pc.is_null(values)
    if isinstance(feature, ClassLabel):
        absent = pc.or_(absent, pc.fill_null(pc.equal(values, -1), False))
    elif is_string(dataset, column):
        absent = pc.or_(absent, pc.fill_null(pc.equal(values, ""), False))
    row = first_true(absent)
    if row is not None:
        raise DataError(f"Row {row} of split {split} has no label in column `{column}`: fill it or remove the row.")

    unique: list[Any] = values.unique().to_pylist()
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
        outside = [value for value in unique if not 0 <= value < len(names)]
        if outside:
            row = first_true(pc.equal(values, outside[0]))
            raise DataError(
                f"Label {outside[0]} in row {row} of split {split} is outside of 0 .. {len(names) - 1}, the range of "
                f"the {len(names)} names of column `{column}`: correct the label or the names."
            )
        return values.to_numpy().astype(np.int64), names
    order = sorted(unique)
    positions = pc.index_in(values, pa.array(order, type=dtype))
    return positions.to_numpy().astype(np.int64), [str(value) for value in order]


def labels_are_hidden(dataset: Dataset, column: str) -> bool:
    """Return whether a split's labels are all -1 or missing, as benchmarks publish the test rows that they score."""
    values = arrow_column(dataset, column)
    if values.null_count == len(values):
        return True
    return pa.types.is_integer(values.type) and bool(pc.all(pc.equal(values, -1)).as_py())


def match_labels(labels: np.ndarray, names: Sequence[str], train_names: Sequence[str], *, split: str) -> np.ndarray:
    """Renumber the labels (rows,) of a split, indices to `names`, by train's names."""
    positions = {name: position for position, name in enumerate(train_names)}
    lookup = np.array([positions.get(name, -1) for name in names], dtype=np.int64)
    matched = lookup[labels]
    if (matched < 0).any():
        unknown = [names[label] for label in np.unique(labels[matched < 0])]
        raise DataError(
            f"Split {split} has rows of {len(unknown)} class(es) that train does not know: {quoted(unknown)}, first in row "
            f"{int((matched < 0).argmax())}: add training rows of them, or remove them from {split}."
        )
    return matched


def first_true(mask: pa.Array | pa.ChunkedArray) -> int | None:
    """Return the first row of a mask that is true."""
    row = pc.index(mask, True).as_py()
    return None if row < 0 else row


def as_images(dataset: Dataset, *, folder: Path | None) -> Dataset:
    """Make a column "image" of `Image`s, bytes or paths (relative ones from `folder`) one of `Image`s, decoded when read."""
    if is_string(dataset, "image"):
        paths = [None if path is None else str((folder or Path()) / path) for path in dataset["image"]]
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    return dataset.cast_column("image", Image())


def check_images(dataset: Dataset, *, rows: np.ndarray, split: str) -> None:
    """Read the header of each image of these rows of a split, and name the first row that has none."""
    # An image that breaks off behind its header is found when it is decoded, by `image_dataset.ImageDataset`.
    stored = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    stored = stored.select(rows, keep_in_memory=True)
    known_format: list[str] | None = None  # of the image before: to try every format costs five times as much
    done = 0
    for batch in stored.with_format("arrow").iter(1000):
        images = pa.concat_arrays(batch.column(0).chunks)
        paths = images.field("path").to_pylist()
        for content, path in zip(images.field("bytes"), paths, strict=True):
            where = f"Row {rows[done]} of split {split}" + (f" (`{path}`)" if path else "")
            if not content.is_valid and path is None:
                raise DataError(f"{where} has no image: fill it or remove the row.")
            try:
                with io.BytesIO(content.as_buffer()) if content.is_valid else open(path, "rb") as stream:
                    known_format = [_image_format(stream, known_format)]
            except OSError as error:
                raise DataError(f"{where} is no image that can be read: replace it or remove the row.") from error
            done += 1


def _image_format(stream: BinaryIO, expected: list[str] | None) -> str:
    """Return the format by which Pillow opens a stream; raises an `OSError` where there is none."""
    try:
        image = PILImage.open(stream, formats=expected)
    except UnidentifiedImageError:
        stream.seek(0)
        image = PILImage.open(stream)
    return str(image.format)
