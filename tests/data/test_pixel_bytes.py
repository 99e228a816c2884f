"""Pixels that are kept as bytes come back to the last bit, or are kept as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as DatasetImage
from PIL import Image
from transformers import ViTImageProcessor

from etf_adapt.data.image_dataset import ImageDataset
from etf_adapt.data.pixel_bytes import PixelBytes
from etf_adapt.data.transforms import image_transforms

TIMM = {
    "input_size": (3, 32, 32),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}
PROCESSORS = {"timm": TIMM, "transformers": ViTImageProcessor(size={"height": 32, "width": 32})}


def noise(seed, shape=(40, 50)):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_pixels_of_a_model_come_back_from_a_quarter_of_the_memory(processor):
    transform = image_transforms(PROCESSORS[processor], train=False)
    kept = PixelBytes(transform)
    images = [
        transform(image) for image in (noise(0), Image.new("RGB", (9, 9)), Image.new("L", (40, 40), 77), noise(1))
    ]
    packed = [kept.pack(pixels) for pixels in images]
    assert all(4 * part.nbytes == pixels.nbytes for part, pixels in zip(packed, images))
    assert all(torch.equal(kept.unpack(part), pixels) for part, pixels in zip(packed, images))


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: torch.rand(3, 8, 8),
        lambda image: torch.full((3, 8, 8), torch.nan),
        lambda image: torch.zeros(3, 8, 8) + 1e-3 * torch.arange(8) ** 2,
    ],
    ids=["random", "nan", "constant"],
)
def test_others_are_kept_as_they_are(transform):
    kept, pixels = PixelBytes(transform), transform(None)
    assert kept.unpack(kept.pack(pixels)) is pixels


def test_rows_are_read_again_as_they_were():
    rows = Dataset.from_dict({"image": [noise(0), noise(1)], "label": [0, 1]}).cast_column("image", DatasetImage())
    data = ImageDataset(rows, image_transforms(TIMM, train=False), keep=True)
    first, again = ([data[row] for row in (0, 1)] for _ in range(2))
    assert {part["pixel_values"].dtype for part in data._kept.values()} == {torch.uint8}
    for one, other in zip(first, again):
        assert torch.equal(one.pop("pixel_values"), other.pop("pixel_values")) and one == other
