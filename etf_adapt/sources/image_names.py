"""Columns of a table that name image files, with or without their suffix, as `Image`s."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePath

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Image
from datasets.table import InMemoryTable

from etf_adapt.errors import DataError, quoted
from etf_adapt.sources.folders import IMAGE_SUFFIXES, is_image, list_files, split_of

_ID_COLUMN = re.compile(r"(.*_)?id|.*(image|img|photo|picture|file).*", re.IGNORECASE)
_SAMPLE = 100  # cells by which a column is judged


class ImageNames:
    """Finds the image files below a folder, ``image_root`` where it is given, by the ends of their paths."""

    def __init__(self, folder: Path, image_root: Path | None, images: Sequence[Path] | None = None) -> None:
        self.root = image_root or folder
        self.is_given = image_root is not None
        self.is_listed = self.is_given or images is not None
        self._images = None if self.is_given else images

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for image in list_files(self.root).images if self._images is None else self._images:
            for name in {image.name, image.stem}:
                found.setdefault(name, []).append(image)
        return found

    def find(self, name: str, *, near: Path, split: str) -> str | None:
        """Return the file of a name: a path from ``near``, the table's folder, or the end of one below the root."""
        direct = os.path.join(near, name)
        if os.path.isfile(direct) and is_image(direct):
            return direct
        parts = PurePath(name).parts
        found = [] if not parts else self._by_name.get(parts[-1], [])
        found = [file for file in found if file.parts[-len(parts) : -1] == parts[:-1]]
        if len(found) > 1:  # train_images/1.jpg and test_images/1.jpg
            found = [file for file in found if split in map(split_of, file.relative_to(self.root).parts[:-1])] or found
        if len(found) > 1:
            raise DataError(
                f"`{name}` of split {split} names {quoted(found)}: say with `image_root` in which folder it lies."
            )
        return str(found[0]) if found else None


def read_image_names(dataset: Dataset, names: ImageNames, *, near: Path, split: str) -> Dataset:
    """Make the columns that name image files columns of `Image`s; a name without a file becomes a path from ``near``."""
    near = names.root if names.is_given else near
    table, features = dataset.data.table, dataset.features.copy()
    for position, column in enumerate(dataset.column_names):
        values = table.column(column)
        if not _names_images(values, column, names, near=near, split=split):
            continue
        paths: dict[object, str | None] = {None: None}
        for cell in values.drop_null().unique().to_pylist():
            paths[cell] = names.find(str(cell), near=near, split=split) or os.path.join(near, str(cell))
        features[column] = Image()
        found = pa.array([paths[cell] for cell in values.to_pylist()], pa.string())
        table = table.set_column(position, column, features[column].cast_storage(found))
    if features == dataset.features:
        return dataset
    return Dataset(InMemoryTable(table.replace_schema_metadata(None)), info=DatasetInfo(features=features))


def _names_images(values: pa.ChunkedArray, column: str, names: ImageNames, *, near: Path, split: str) -> bool:
    if not any(is_type(values.type) for is_type in (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)):
        return False
    cells = [str(cell) for cell in values.slice(0, _SAMPLE).to_pylist() if cell not in (None, "")]
    found = (names.find(cell, near=near, split=split) is not None for cell in cells)
    if cells and all(PurePath(cell).suffix.lower() in IMAGE_SUFFIXES for cell in cells):
        return any(found)
    # Names without a suffix are ids, one a row. Beside a table, whose folder is not the data, only likely columns are tried.
    is_id = len(set(cells)) == len(cells) > 1 and (names.is_listed or _ID_COLUMN.fullmatch(column) is not None)
    return is_id and all(found)
