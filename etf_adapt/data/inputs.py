"""Images or texts to classify, of any source and without labels, as a stream; and their batches.

Nothing here holds more than one batch of images, beside their names, or one window of texts, whatever the number of inputs.
"""

from __future__ import annotations

import mimetypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor, stack
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from etf_adapt.data.digits import open_data_set
from etf_adapt.errors import DataError, check_choice
from etf_adapt.sources.columns import Names, find_inputs
from etf_adapt.sources.folders import BUILDERS, list_files
from etf_adapt.sources.image_checks import as_images
from etf_adapt.sources.opening import is_saved_data_set, logger
from etf_adapt.sources.tables import not_utf8, stream_table

WINDOW_BATCHES = 32  # of texts that are read ahead, so that a batch holds texts of similar length


@dataclass(frozen=True)
class Input:
    """One image, text or pair: its number, from 0, and its name: of an image its file, of a text the text itself."""

    row: int
    name: str
    pair: str | None = None  # the second text

    def describe(self) -> str:
        """Return which input this is, for a message."""
        return f"Input {self.row}" + (f" (`{self.name[:200]}`)" if self.name else "")

    def unreadable(self, reason: str, *, ways: str = "") -> DataError:
        """Return the error that this input cannot be read."""
        return DataError(f"{self.describe()} cannot be read: {reason}. Replace it or take it out{ways}.")


@dataclass(frozen=True)
class Batch:
    """A batch as the model takes it, and inputs that cannot be read, each with the reason."""

    inputs: list[Input]
    tensors: dict[str, Tensor]
    bad: list[tuple[Input, str]] = field(default_factory=list)


def open_inputs(
    source: Any, *, task: str, split: str | None = None, column: Names = None, revision: str | None = None
) -> Iterable[Any]:
    """Open ``inputs`` of `predict`: texts ("text") or images ("image"), of PIL, paths, or stored as `datasets` stores them."""
    if isinstance(source, Dataset):
        return column_of(source, task, column=column)
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source).expanduser()
    kind = BUILDERS.get(path.suffix.lower())
    if split is None and task == "image":
        if path.is_dir() and not is_saved_data_set(path) and (files := image_files(path)):
            return files
        if path.is_file() and kind is None:
            return [path]
    elif split is None:
        if str(source) == "-" or (path.is_file() and path.suffix.lower() == ".txt"):
            if column:
                raise DataError(f"`text_column` (={column}) names columns, and lines of text have none: give a table.")
            return _lines(str(source))
        if path.is_file() and kind == "csv":
            head, rows = stream_table(path)
            names = find_inputs(head, task, column=column)
            return (tuple(row[name] for name in names) for row in rows)
    if str(source) == "-":
        raise DataError("`inputs` (='-') are texts of the standard input, without splits, and need a model of texts.")
    found = open_data_set(str(source), revision=revision, needs_train=False)
    chosen = choose_split(found.splits, split, dataset=str(source))
    return column_of(found.splits[chosen], task, column=column, folder=found.folder)


def choose_split(splits: Mapping[str, Dataset], asked: str | None, *, dataset: str) -> str:
    """Return the split that was asked for; by default test, else validation, else train, and say so."""
    if asked is not None:
        check_choice("split", asked, splits)
        return asked
    chosen = next(split for split in ("test", "validation", "train") if split in splits)
    if len(splits) > 1:
        logger.warning("Split %s of %s is read; it has %s.", chosen, dataset, ", ".join(splits))
    return chosen


def column_of(dataset: Dataset, task: str, *, column: Names, folder: Path | None = None) -> Iterable[Any]:
    """Return the images or texts of a data set, or its pairs of texts; relative paths of images start in ``folder``."""
    names = find_inputs(dataset, task, column=column)
    if task == "text":
        return zip(*(dataset[name] for name in names), strict=True)  # read row by row
    rows = dataset.select_columns(names).rename_columns({} if names == [task] else {names[0]: task})
    return as_images(rows, folder=folder).cast_column("image", Image(decode=False))["image"]  # likewise


def image_files(folder: Path) -> list[Path]:
    """List the images below a folder; a file that looks like one and cannot be read is an error later, not left out."""
    found = list_files(folder)
    kinds = {suffix: mimetypes.guess_type(f"x{suffix}")[0] or "" for suffix in found.passed}
    unread = [file for suffix, files in found.passed.items() if kinds[suffix].startswith("image/") for file in files]
    return sorted([*found.images, *unread])


def _lines(source: str) -> Iterator[str]:
    number = 0
    place: Any = sys.stdin.fileno() if source == "-" else Path(source).expanduser()
    try:
        with open(place, encoding="utf-8-sig", closefd=source != "-") as stream:
            for line in stream:
                number += 1
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise not_utf8(source, error, number) from error


def image_batches(
    images: Iterable[Any], transform: Callable[[PILImage.Image], Tensor], *, batch_size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """Read, transform and batch images in their order."""
    return iter(DataLoader(_ImageBatches(images, transform, batch_size), batch_size=None, num_workers=num_workers))


class _ImageBatches(IterableDataset[Batch]):
    def __init__(self, images: Iterable[Any], transform: Callable[[PILImage.Image], Tensor], batch_size: int) -> None:
        self._images, self._transform, self._batch_size = images, transform, batch_size

    def __iter__(self) -> Iterator[Batch]:
        # Workers hand over their batches in turn: the n-th batch is that of worker n modulo their number.
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return map(self._read, islice(_windows(self._images, self._batch_size), first, None, step))

    def _read(self, window: list[tuple[int, Any]]) -> Batch:
        inputs, pixels, bad = [], [], []
        for row, image in window:
            item = Input(row, _file_name(image))
            try:
                pixels.append(self._transform(_read_image(image)))
                inputs.append(item)
            except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
                bad.append((item, " ".join(str(error).split()) or type(error).__name__))
        return Batch(inputs, {"pixel_values": stack(pixels)} if pixels else {}, bad)


def _windows(values: Iterable[Any], size: int) -> Iterator[list[tuple[int, Any]]]:
    """Yield so many values at once, each with its number."""
    stream = enumerate(values)
    return iter(lambda: list(islice(stream, size)), [])


def _file_name(image: Any) -> str:
    if isinstance(image, (str, Path)):
        return str(image)
    return str((image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)) or "")


def _read_image(image: Any) -> PILImage.Image:
    """Read an image as the data sets do that models are trained on."""
    if isinstance(image, PILImage.Image):
        return ImageOps.exif_transpose(image)
    if image is None:
        raise ValueError("there is no image")
    item: dict[str, Any] = dict(image) if isinstance(image, Mapping) else {"path": str(image), "bytes": None}
    if item["bytes"] is not None or "://" in (item["path"] or "://"):
        return Image().decode_example(item)
    with PILImage.open(item["path"]) as opened:  # `datasets` leaves broken and multi-frame files open (5.2)
        return ImageOps.exif_transpose(opened)


def text_batches(
    texts: Iterable[Any], tokenizer: Any, *, batch_size: int, max_length: int, has_mask: bool = True
) -> Iterator[Batch]:
    """Tokenize and batch texts, or pairs as `tokenize` does; batches of similar length within a window of 32 batches."""
    batch_size = batch_size if has_mask else 1  # without a mask a model, such as FNet, would read padding as text
    for window in _windows(texts, WINDOW_BATCHES * batch_size):
        good = [(Input(row, *parts), parts) for row, text in window if (parts := _parts(text))]
        if len({len(parts) for _, parts in good}) > 1:
            raise DataError("`inputs` mix single texts and pairs of texts: give them apart.")
        columns = [list(texts) for texts in zip(*(parts for _, parts in good), strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length) if good else {}
        lengths = [len(tokens) for tokens in encoded.get("input_ids", ())]
        order = sorted((place for place, length in enumerate(lengths) if length), key=lengths.__getitem__)
        known = {good[place][0].row for place in order}
        yield Batch([], {}, [(Input(row, ""), "the text is empty") for row, _ in window if row not in known])
        names = [name for name in tokenizer.model_input_names if name in encoded]
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = [{name: encoded[name][place] for name in names} for place in part]
            padded = tokenizer.pad(rows, return_attention_mask=has_mask, return_tensors="pt")
            yield Batch([good[place][0] for place in part], dict(padded))


def _parts(text: Any) -> tuple[str, ...]:
    """Return a text, or the two of a pair, as a tuple; an empty one where one of them is empty."""
    parts = tuple(text) if isinstance(text, (tuple, list)) else (text,)
    return parts if len(parts) < 3 and all(isinstance(part, str) and part.strip() for part in parts) else ()
