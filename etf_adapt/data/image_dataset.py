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

from etf_adapt.errors import RowError

KEPT_BYTES = 2**30  # most memory for the images of a data set
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
    the same draw); the generator itself is left as it was. Rows become batches by the collators that torch and `Trainer` use
    by default.

    Args:
        dataset: Rows with the columns ``image`` and ``label``, as those of ``load_data``.
        transform: From an image of Pillow to a tensor, as ``image_transforms`` makes it.
        seed: Seed of what the transform draws.
        keep: Whether decoded images are kept in memory where all of them fit in 1 GiB.
        images_of: Another one of the same rows, whose decoded images are these too.

    Example:
        >>> from etf_adapt import image_transforms, load_data
        >>> rows = ImageDataset(load_data("digits").test, image_transforms({"input_size": (3, 32, 32)}, train=False))
        >>> rows[0]["pixel_values"].shape, rows[0]["row_id"]
        (torch.Size([3, 32, 32]), 0)
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
        self._decoded: dict[int, dict[str, Any]] = {} if images_of is None else images_of._decoded

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def row_bytes(self) -> int:
        """Bytes of the pixels of a row."""
        return int(self[0]["pixel_values"].nbytes) if len(self) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = index if isinstance(index, RowDraw) else RowDraw(index)
        row = int(draw)
        values = self._decoded[row] if row in self._decoded else self._decode(row)
        key = np.random.SeedSequence((self.seed, draw.epoch, draw.place, row)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(key[0]))  # `torch.manual_seed` would seed every GPU as well
            pixel_values = self.transform(values["image"])
        return {"pixel_values": pixel_values, "labels": values["label"], "row_id": row}

    def _decode(self, row: int) -> dict[str, Any]:
        try:
            values: dict[str, Any] = self.dataset[row]
        except Exception as error:  # Pillow's readers raise any class at a damaged file, and some at their limits
            raise RowError(f"{self._where(row)} cannot be decoded: {error}. Replace it or remove the row.") from error
        if self.keep and get_worker_info() is None:  # what a worker keeps is gone with it, after one pass
            num_bytes = _PIXEL_BYTES * values["image"].width * values["image"].height
            if num_bytes * len(self) <= KEPT_BYTES:  # a part of photographs would save little
                self._decoded[row] = values
        return values

    def _where(self, row: int) -> str:
        stored = self.dataset.cast_column("image", Image(decode=False))[row]["image"]
        return f"The image of row {row}" + (f" (`{stored['path']}`)" if stored["path"] else "")
