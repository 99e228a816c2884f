"""Images to tensors, as the model's own image processor or timm data config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

# Share of the area that a random crop keeps. From the 0.08 of training from scratch, it was raised for fine-tuning, where a
# crop that has lost its object costs a rare class one of its few rows.
AREA = (0.25, 1.0)
# The same for images smaller than half of the model's size, which a deep crop would leave with a few pixels.
SMALL_AREA = (0.8, 1.0)


def image_transforms(
    processor: Any, *, train: bool, image_size: int | None = None, augment: bool = True, allow_flip: bool = True
) -> Callable[[PILImage.Image], Tensor]:
    """Make the transform from an image of any mode to the model's input, so that training and serving cannot differ.

    For evaluation it is transformers' `processor` itself, or timm's transform for a data config of timm. For training
    the image is cropped at random to a share of its area and an aspect ratio in 3/4 .. 4/3, resized, mirrored in half of the
    cases where `allow_flip`, and scaled and normalised by that same processor.

    Args:
        processor: Image processor of transformers, or timm's data config, such as ``model.config.pretrained_cfg``.
        train: Whether the images are training rows.
        image_size: Pixels a side, at least 1; by default the processor's.
        augment: Whether training rows are cropped and mirrored.
        allow_flip: Whether a mirrored image still shows its class.

    Returns:
        A picklable function from an image of Pillow to a tensor (3, height, width), float32.

    Raises:
        ValueError: The processor gives images of several sizes, or not of the size that was asked for.

    Example:
        >>> transform = image_transforms({"input_size": (3, 32, 32)}, train=False)
        >>> transform(PILImage.new("L", (50, 40))).shape
        torch.Size([3, 32, 32])
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"`image_size` (={image_size}) must be at least 1: it is a length in pixels.")
    processor = getattr(processor, "image_processor", processor)
    config = getattr(processor, "data_config", processor)  # of transformers' TimmWrapperImageProcessor
    from_timm = isinstance(config, Mapping)
    pipeline = _TimmPipeline(config, image_size) if from_timm else _ProcessorPipeline(processor, image_size)
    return _RandomCrop(pipeline, allow_flip) if train and augment else pipeline


class _ProcessorPipeline:
    """Calls an image processor of transformers, so that training, evaluation and serving cannot differ."""

    def __init__(self, processor: Any, image_size: int | None) -> None:
        self._processor = processor
        self._options = {} if image_size is None else _sizes(processor, image_size)
        square, wide = (self(PILImage.new("RGB", shape)) for shape in ((64, 64), (96, 64)))
        if square.ndim != 3 or square.shape != wide.shape:
            raise ValueError(
                f"`processor` (={type(processor).__name__}) gives {tuple(square.shape)} for a square image and "
                f"{tuple(wide.shape)} for a wide one, but a batch needs one size: give a processor that crops or "
                "resizes to a fixed height and width."
            )
        self.size = (square.shape[1], square.shape[2])
        if image_size is not None and self.size != (image_size, image_size):
            raise ValueError(
                f"`image_size` (={image_size}) does not fit `processor` (={type(processor).__name__}), which gives "
                f"{self.size} then: set the sizes in the processor's own configuration."
            )
        resample = getattr(processor, "resample", None)
        resample = PILImage.Resampling.BILINEAR if resample is None else resample
        if not isinstance(resample, InterpolationMode):
            resample = InterpolationMode(PILImage.Resampling(resample).name.lower())
        self.interpolation = resample

    def __call__(self, image: PILImage.Image) -> Tensor:
        return self._processor(images=_rgb(image), return_tensors="pt", **self._options)["pixel_values"][0]

    def finish(self, pixels: Tensor) -> Tensor:
        """Scale and normalise uint8 pixels (3, height, width) that are `size` already."""
        options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
        return self._processor(images=pixels, return_tensors="pt", **options)["pixel_values"][0]


def _sizes(processor: Any, image_size: int) -> dict[str, dict[str, int]]:
    """Return a processor's size and crop size at another image size, in the proportion that they have."""
    size = {side: length for side, length in dict(processor.size).items() if length is not None}
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    if crop is None:
        return {"size": {side: image_size for side in size}}
    square = {"height": image_size, "width": image_size}
    scale = image_size / dict(crop)["height"]
    return {"size": {side: round(length * scale) for side, length in size.items()}, "crop_size": square}


class _TimmPipeline:
    """Runs timm's evaluation transform for a data config."""

    def __init__(self, config: Mapping[str, Any], image_size: int | None) -> None:
        from timm.data import create_transform, resolve_data_config
        from timm.data.transforms import str_to_interp_mode

        size = {} if image_size is None else {"input_size": (3, image_size, image_size)}
        resolved = resolve_data_config(size, pretrained_cfg=dict(config))
        self.size = tuple(resolved["input_size"][1:])
        self.interpolation = str_to_interp_mode(resolved["interpolation"])
        self._whole = create_transform(**resolved, is_training=False)
        self._mean = torch.tensor(resolved["mean"]).view(-1, 1, 1) * 255
        self._std = torch.tensor(resolved["std"]).view(-1, 1, 1) * 255

    def __call__(self, image: PILImage.Image) -> Tensor:
        return self._whole(_rgb(image))

    def finish(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).sub_(self._mean).div_(self._std)


class _RandomCrop:
    """Crops, resizes and mirrors at random, then finishes as the pipeline does."""

    def __init__(self, pipeline: _ProcessorPipeline | _TimmPipeline, allow_flip: bool) -> None:
        self._pipeline = pipeline
        self._crop, self._small_crop = (
            v2.RandomResizedCrop(pipeline.size, scale=area, interpolation=pipeline.interpolation, antialias=True)
            for area in (AREA, SMALL_AREA)
        )
        self._flip = v2.RandomHorizontalFlip() if allow_flip else torch.nn.Identity()

    def __call__(self, image: PILImage.Image) -> Tensor:
        small = 2 * min(image.size) < min(self._pipeline.size)
        # On tensors: half the time of Pillow for a small image, a quarter for a photograph.
        pixels = v2.functional.pil_to_tensor(_rgb(image))
        return self._pipeline.finish(self._flip((self._small_crop if small else self._crop)(pixels)))


def _rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of the direct way, and gives the same colours
    return image if image.mode == "RGB" else image.convert("RGB")
