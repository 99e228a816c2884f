"""Rows of images for a data loader, with augmentation that can be repeated.

Augmentation is a function of the run's seed and of the draw: epoch, place in the epoch and row. It does not depend on
the number of workers or processes, on the batch, or on where a run was stopped and resumed. For this the sampler's
rows carry their draw with them, into whatever process reads them:

    RowDraws(sampler)  ->  RowDraw(row), an int with epoch and place  ->  TransformedRows[RowDraw]  ->  ImageCollator

A class-balanced epoch draws a rare row many times; each draw has a place of its own and so a crop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, get_worker_info

KEPT_BYTES = 2**30
"""Most memory that one ``TransformedRows`` keeps tensors in."""


class RowDraw(int):
    """Is a row id that knows when it was drawn; it passes through batch samplers and into workers as the int it is.

    Args:
        row: The row id.
        epoch: Of the draw, from 0.
        place: Position of the draw within the epoch, from 0.

    Example:
        >>> draw = RowDraw(7, epoch=1, place=2)
        >>> draw == 7, draw.epoch, draw.place
        (True, 1, 2)
    """

    epoch: int
    place: int

    def __new__(cls, row: int, epoch: int = 0, place: int = 0) -> RowDraw:
        """Make the row id; `int` takes its value here and not in `__init__`."""
        draw = super().__new__(cls, row)
        draw.epoch = epoch
        draw.place = place
        return draw


class RowDraws(Sampler[int]):
    """Yields the rows of a sampler as `RowDraw`s.

    It stands between the sampler of global batches and the loader: as each process walks the whole order and keeps its
    share of it, and a resumed run walks over what it has done, places are the same in all of them.

    Args:
        sampler: Of row ids; its `set_epoch`, where it has one, is called by this one's.

    Example:
        >>> [(int(draw), draw.place) for draw in RowDraws([4, 4, 2])]
        [(4, 0), (4, 1), (2, 2)]
    """

    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next pass is."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        for place, row in enumerate(self.sampler):
            yield RowDraw(row, epoch, place)

    def __len__(self) -> int:
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"`sampler` (={type(self.sampler).__name__}) has no length.")
        return len(self.sampler)


class TransformedRows(TorchDataset[dict[str, Any]]):
    """Reads, decodes and transforms the rows of a data set of images one by one.

    Args:
        dataset: With a column of `datasets.Image`s and one of integer labels.
        transform: From an image to a tensor, such as `image_transforms` makes. What it draws from torch's generator is
            a function of `seed` and the `RowDraw` that the row was asked by; a plain int stands for a draw of its own,
            always the same. The generator itself is left as it was.
        seed: Of the run, at least 0.
        image_column: Name of the column of images.
        label_column: Name of the column of labels.
        keep: Whether the tensors of rows asked for by plain ints stay in memory, as long as they take at most
            ``KEPT_BYTES``: for rows that are read again and again without augmentation. Not in a loader's workers.

    Raises:
        ValueError: An image cannot be decoded; the row and its file are named.

    Example:
        >>> from etf_adapt.data.load import load_data
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> rows = TransformedRows(load_data("digits").train, pil_to_tensor)
        >>> rows[3]["pixel_values"].shape, rows[3]["labels"], rows[3]["row_id"]
        (torch.Size([3, 8, 8]), 0, 3)
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[PILImage.Image], Tensor],
        *,
        seed: int = 0,
        image_column: str = "image",
        label_column: str = "label",
        keep: bool = False,
    ) -> None:
        self.dataset = dataset.select_columns([image_column, label_column])
        self.transform = transform
        self.seed = seed
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None
        self._image_column = image_column
        self._label_column = label_column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kept = None if isinstance(index, RowDraw) else self._kept
        draw = index if isinstance(index, RowDraw) else RowDraw(index)
        row = int(draw)
        if kept is not None and row in kept:
            return dict(kept[row])
        try:
            values = self.dataset[row]
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise at a damaged file
            raise ValueError(f"{self._where(row)} cannot be decoded: {error}. Replace it or remove the row.") from error
        with _seeded(self.seed, draw.epoch, draw.place, row):
            pixel_values = self.transform(values[self._image_column])
        found = {"pixel_values": pixel_values, "labels": values[self._label_column], "row_id": row}
        # What a worker keeps is gone with it, after one pass.
        if kept is not None and get_worker_info() is None and (len(kept) + 1) * pixel_values.nbytes <= KEPT_BYTES:
            kept[row] = dict(found)
        return found

    def _where(self, row: int) -> str:
        stored = self.dataset.cast_column(self._image_column, Image(decode=False))[row][self._image_column]
        return f"The image of row {row}" + (f" (`{stored['path']}`)" if stored["path"] else "")


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator by a key for a while; `torch.manual_seed` would seed every GPU as well."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ImageCollator:
    """Makes a batch of what `TransformedRows` gives.

    Returns:
        "pixel_values" (batch, 3, height, width) float32, "labels" (batch,) int64, "row_id" (batch,) int64: the rows'
        numbers in their split, not for the model.

    Example:
        >>> row = {"pixel_values": torch.zeros(3, 8, 8), "labels": 4, "row_id": 17}
        >>> {name: tuple(values.shape) for name, values in ImageCollator()([row, row]).items()}
        {'pixel_values': (2, 3, 8, 8), 'labels': (2,), 'row_id': (2,)}
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these rows."""
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "row_id": torch.tensor([row["row_id"] for row in rows]),
        }
