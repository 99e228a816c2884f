"""A column of images: brought into one form and checked by the headers, without decoding."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from etf_adapt.columns import is_string
from etf_adapt.sources import DataError


def as_images(dataset: Dataset, *, folder: Path | None) -> Dataset:
    """Make the only column of a data set, "image", one of `datasets.Image`s that are decoded when read.

    Args:
        dataset: With a column "image" of ``Image``s, image bytes or paths.
        folder: Where relative paths in a column of strings start.

    Returns:
        The rows with ``Image``s; no file is opened.
    """
    if is_string(dataset, "image"):
        paths = [None if path is None else str((folder or Path()) / path) for path in dataset["image"]]
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    return dataset.cast_column("image", Image())


def check_images(dataset: Dataset, *, rows: np.ndarray, split: str) -> None:
    """Read the header of each image and raise at the first that is none.

    An image that breaks off behind its header is found when it is decoded, by `etf_adapt.rows.TransformedRows`.

    Args:
        dataset: All rows of one split, with a column "image" of ``Image``s.
        rows: Ids of the rows to check.
        split: Name of the split, for messages.

    Raises:
        DataError: Names the row, and the file where there is one.
    """
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
