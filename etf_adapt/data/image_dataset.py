"""Rows of images for a data loader, with augmentation that can be repeated.

Augmentation is a function of the seed and of the draw: epoch, place in the epoch and row. It does not depend on the number
of workers or processes, on the batch, or on where a run was stopped and resumed. For this the sampler's rows carry their
draw with them, into whatever process reads them:

    RowDraws(sampler)  ->  RowDraw(row), an int with epoch and place  ->  ImageDataset[RowDraw]

A class-balanced epoch draws a rare row many times; each draw has a place of its own and so a crop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, get_worker_info

from etf_adapt.data.pixel_bytes import PixelBytes
from etf_adapt.errors import RowError

KEPT_BYTES = 2**30  # most memory in which one ``ImageDataset`` keeps rows
_PIXEL_BYTES = 4  # in Pillow


class RowDraw(int):
    """A row id with the epoch of its draw and its place in it, from 0; batch samplers and workers pass it on as an int."""

    epoch: int
    place: int

    def __new__(cls, row: int, epoch: int = 0, place: int = 0) -> RowDraw:
        """Make the row id; `int` takes its value here and not in `__init__`."""
        draw = super().__new__(cls, row)
        draw.epoch = epoch
        draw.place = place
        return draw


# It stands between the sampler of global batches and the loader: as each process walks the whole order and keeps its share
# of it, and a resumed run walks over what it has done, places are the same in all of them.
class RowDraws(Sampler[int]):
    """Yields the rows of a sampler as `RowDraw`s, and passes `set_epoch` on to it."""

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
        return len(self.sampler)  # type: ignore[arg-type]


class ImageDataset(TorchDataset[dict[str, Any]]):
    """Reads, decodes and transforms the rows of a data set of images one by one.

    What `transform` draws from torch's generator is a function of `seed` and the `RowDraw` asked for (of a plain int, always
    the same draw); the generator itself is left as it was. `keep` keeps in memory what is read again: the tensors of plain
    ints, and the decoded images of draws. `images_of` is another of the same rows: the two keep decoded images together, and
    no tensors where all images fit. Rows become batches by the collators that torch and `Trainer` use by default.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[PILImage.Image], Tensor],
        *,
        seed: int = 0,
        keep: bool = False,
        images_of: ImageDataset | None = None,
    ) -> None:
        self.dataset = dataset.select_columns(["image", "label"])
        self.transform = transform
        self.seed = seed
        self.keep = keep
        self._kept: dict[int, dict[str, Any]] = {}  # rows as they are returned
        self._decoded: dict[int, dict[str, Any]] = {}  # rows of the data set
        self._room = KEPT_BYTES
        self._keeper = images_of or self  # of decoded images
        self._bytes: PixelBytes | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        is_drawn = isinstance(index, RowDraw)
        draw = index if isinstance(index, RowDraw) else RowDraw(index)
        row = int(draw)
        if row in self._kept and not is_drawn:
            packed = self._kept[row]["pixel_values"]
            return self._kept[row] | {"pixel_values": packed if self._bytes is None else self._bytes.unpack(packed)}
        decoded = self._keeper._decoded
        values = decoded[row] if row in decoded else self._decode(row)
        key = np.random.SeedSequence((self.seed, draw.epoch, draw.place, row)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(key[0]))  # `torch.manual_seed` would seed every GPU as well
            pixel_values = self.transform(values["image"])
        found = {"pixel_values": pixel_values, "labels": values["label"], "row_id": row}
        if self.keep and get_worker_info() is None:  # what a worker keeps is gone with it, after one pass
            num_bytes = _PIXEL_BYTES * values["image"].width * values["image"].height
            all_fit = num_bytes * len(self) <= KEPT_BYTES  # a part of photographs would save little
            if all_fit and (is_drawn or self._keeper is not self):
                self._keeper._hold(decoded, row, values, num_bytes)
            elif not is_drawn:
                packed = self._pack(pixel_values)
                self._hold(self._kept, row, found | {"pixel_values": packed}, packed.nbytes)
        return found

    def _hold(self, held: dict[int, dict[str, Any]], row: int, values: dict[str, Any], num_bytes: int) -> None:
        """Keep a row, while there is room."""
        if row not in held and num_bytes <= self._room:
            held[row] = values
            self._room -= num_bytes

    def _decode(self, row: int) -> dict[str, Any]:
        try:
            values: dict[str, Any] = self.dataset[row]
        except Exception as error:  # Pillow's readers raise any class at a damaged file, and some at their limits
            raise RowError(f"{self._where(row)} cannot be decoded: {error}. Replace it or remove the row.") from error
        return values

    def _pack(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 3 or pixels.dtype != torch.float32:
            return pixels
        if self._bytes is None:
            self._bytes = PixelBytes(self.transform)
        return self._bytes.pack(pixels)

    def _where(self, row: int) -> str:
        stored = self.dataset.cast_column("image", Image(decode=False))[row]["image"]
        return f"The image of row {row}" + (f" (`{stored['path']}`)" if stored["path"] else "")
