"""Images of a data set as one column, and what their headers tell: none, or pixels that a conversion to RGB destroys."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageMode, UnidentifiedImageError

from etf_adapt.errors import DataError
from etf_adapt.sources.columns import is_string
from etf_adapt.sources.folders import logger

# Neither is mended here: a model would then be trained on other pixels than its users' pipelines make.
_DEEP = (
    "has 16 or 32 bits a channel, and Pillow's conversion to RGB, here and in every stock pipeline, cuts values off at 255: "
    "save it with 8 bits a channel."
)
_TRANSPARENT = (
    "has an alpha channel: conversion to RGB, here and in every stock pipeline, drops it and shows the colours of transparent "
    "pixels. Where they matter, save it on a ground of your choice."
)

_LARGE = "has more pixels than Pillow reads without a warning, and takes long in each epoch: make it smaller."


def as_images(dataset: Dataset, *, folder: Path | None) -> Dataset:
    """Make a column "image" of `Image`s, bytes or paths (relative ones from `folder`) one of `Image`s, decoded when read."""
    if is_string(dataset, "image"):
        paths = [None if path is None else str((folder or Path()) / path) for path in dataset["image"]]
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    return dataset.cast_column("image", Image())


def check_images(dataset: Dataset, *, rows: np.ndarray, split: str, report: Callable[[int], None]) -> None:
    """Read the header of each image of these rows of a split; refuse what cannot be read or converted to 8-bit RGB."""
    # An image that breaks off behind its header is found when it is decoded, by `image_dataset.ImageDataset`.
    stored = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    stored = stored.select(rows, keep_in_memory=True)
    known_format: list[str] | None = None  # of the image before: to try every format costs five times as much
    found: dict[str, list[str]] = {}  # what is wrong, and where
    done = 0
    for batch in stored.with_format("arrow").iter(1000):
        images = pa.concat_arrays(batch.column(0).chunks)
        paths = images.field("path").to_pylist()
        for content, path in zip(images.field("bytes"), paths, strict=True):
            where = f"Row {rows[done]} of split {split}" + (f" (`{path}`)" if path else "")
            done += 1
            if not content.is_valid and path is None:
                raise DataError(f"{where} has no image: fill it or remove the row.")
            try:
                with io.BytesIO(content.as_buffer()) if content.is_valid else open(path, "rb") as stream:
                    image = _open_image(stream, known_format)
            except FileNotFoundError as error:
                raise DataError(
                    f"{where} is no file: add it, remove the row, or name its folder by `image_root`."
                ) from error
            except UnidentifiedImageError as error:
                raise DataError(f"{where} is no image that can be read: replace it or remove the row.") from error
            except Exception as error:  # Pillow's readers raise any class at a damaged file, and some at their limits
                raise DataError(f"{where} cannot be read: {error}. Replace it or remove the row.") from error
            known_format = [str(image.format)]
            if _is_deep(image.mode):
                found.setdefault(_DEEP, []).append(where)
            elif image.has_transparency_data:
                found.setdefault(_TRANSPARENT, []).append(where)
            if PILImage.MAX_IMAGE_PIXELS and image.width * image.height > PILImage.MAX_IMAGE_PIXELS:
                found.setdefault(_LARGE, []).append(where)
        report(done)
    for fault, places in found.items():
        others = f" (and {len(places) - 1} more of this split)" if len(places) > 1 else ""
        if fault == _DEEP:
            raise DataError(f"{places[0]}{others} {fault}")
        logger.warning("%s%s %s", places[0], others, fault)


def _open_image(stream: BinaryIO, expected: list[str] | None) -> PILImage.Image:
    """Read the header of an image; raises an `OSError` where there is none."""
    try:
        return PILImage.open(stream, formats=expected)
    except UnidentifiedImageError:
        stream.seek(0)
        return PILImage.open(stream)


@cache
def _is_deep(mode: str) -> bool:
    return ImageMode.getmode(mode).typestr not in ("|u1", "|b1")
