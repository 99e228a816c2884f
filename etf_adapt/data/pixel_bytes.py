"""Pixels of images in a quarter of their memory, exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image as PILImage
from torch import Tensor


class PixelBytes:
    """Holds pixels (3, height, width) as bytes, where a transform ends in a line through the byte of each, as scaling does.

    What a byte stands for is read from the images themselves, so that they come back to the last bit.
    """

    def __init__(self, transform: Callable[[PILImage.Image], Tensor]) -> None:
        black, white = (transform(PILImage.new("RGB", (64, 64), (value,) * 3)) for value in (0, 255))
        self._black, self._step = black[:, :1, :1], (white - black)[:, :1, :1] / 255
        self._values = torch.full((len(black), 256), torch.nan)  # of each channel's bytes, as far as they have been met

    def pack(self, pixels: Tensor) -> Tensor:
        """Return bytes in the shape of the pixels; the pixels themselves where they cannot be had back."""
        positions = ((pixels - self._black) / self._step).round().clamp(0, 255).nan_to_num()
        found = positions.to(torch.uint8)
        index, flat = found.flatten(1).long(), pixels.flatten(1)
        known = self._values.gather(1, index)
        self._values.scatter_(1, index, torch.where(known.isnan(), flat, known))
        return found if torch.equal(self.unpack(found), pixels) else pixels

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the pixels of what ``pack`` returned."""
        if packed.dtype != torch.uint8:
            return packed
        return self._values.gather(1, packed.flatten(1).long()).view(packed.shape)
