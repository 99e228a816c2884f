"""Evaluation is the processor to the last bit; training differs from it by crop and mirror alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PILImage
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.v2.functional import pil_to_tensor

from etf_adapt.data.transforms import image_transforms

TIMM = {"input_size": (3, 48, 48), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
TIMM |= {"crop_pct": 0.9, "crop_mode": "center"}
PROCESSORS = {
    "height and width": transformers.ViTImageProcessor(size={"height": 40, "width": 40}),
    "Pillow": transformers.ViTImageProcessorPil(size={"height": 40, "width": 40}),
    "resize and crop": transformers.DeiTImageProcessor(
        size={"height": 48, "width": 48}, crop_size={"height": 40, "width": 40}
    ),
    "shortest edge": transformers.CLIPImageProcessor(size={"shortest_edge": 44}, crop_size={"height": 40, "width": 40}),
    "crop share": transformers.ConvNextImageProcessor(size={"shortest_edge": 40}),
    "own crop rule": transformers.LevitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
    ),
    "channel order": transformers.MobileViTImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}, do_flip_channel_order=True
    ),
    "rescale offset": transformers.EfficientNetImageProcessor(size={"height": 40, "width": 40}, rescale_offset=True),
}


def photograph(size=(90, 60), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def coordinates(size):
    """Return an image whose red is the column and whose green is the row, both 0 .. 255 over the side."""
    width, height = size
    column, row = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PILImage.fromarray(np.stack([column, row, np.zeros_like(row)], -1).round().astype(np.uint8))


def raw_config(size):
    """Return a timm configuration whose output is the pixels in 0 .. 1."""
    return TIMM | {"input_size": (3, size, size), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}


def kept_areas(transform, image, draws=60):
    """Return the share of the image's area that each random crop keeps."""
    areas = []
    for _ in range(draws):
        red, green = transform(image)[:2]
        areas.append(((red.max() - red.min()) * (green.max() - green.min())).item())
    return np.array(areas)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(90, 60), (30, 31), (40, 40)])
def test_evaluation_is_the_processor(name, size):
    processor, image = PROCESSORS[name], photograph(size)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    for options in ({"train": False}, {"train": True, "augment": False}):
        assert torch.equal(image_transforms(processor, **options)(image), expected)


def test_evaluation_is_the_processor_of_a_real_model(shared_models):
    processor = transformers.AutoImageProcessor.from_pretrained(shared_models / "vit_tiny_patch16_224.hf")
    image = photograph((200, 150))
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(image_transforms(processor, train=False)(image), expected)
    assert image_transforms(processor, train=True)(image).shape == expected.shape == (3, 224, 224)


@pytest.mark.parametrize("image_size", [None, 64])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_evaluation_is_timms(image_size, crop_mode):
    config = TIMM | {"crop_mode": crop_mode}
    size = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    expected = create_transform(**resolve_data_config(size, pretrained_cfg=config), is_training=False)(photograph())
    assert torch.equal(image_transforms(config, train=False, image_size=image_size)(photograph()), expected)


def test_transformers_processor_of_a_timm_model_is_timms():
    wrapped = transformers.TimmWrapperImageProcessor(pretrained_cfg=TIMM)
    image = photograph()
    assert torch.equal(image_transforms(wrapped, train=False)(image), image_transforms(TIMM, train=False)(image))


@pytest.mark.parametrize("name", [*PROCESSORS, "timm"])
def test_training_finishes_as_evaluation_does(name):
    processor = PROCESSORS.get(name, TIMM)
    pipeline = image_transforms(processor, train=False)
    colour = PILImage.new("RGB", (90, 90), (30, 100, 220))  # one colour is the same however it is cropped
    assert torch.allclose(image_transforms(processor, train=True)(colour), pipeline(colour), atol=1e-5)
    pixels = pil_to_tensor(photograph(pipeline.size))
    unsized = photograph(pipeline.size)
    if name in ("height and width", "Pillow", "rescale offset"):  # which only resize, here to the size that is there
        assert torch.equal(pipeline.finish(pixels), pipeline(unsized))


@pytest.mark.parametrize("name", [*PROCESSORS, "timm"])
@pytest.mark.parametrize("train", [True, False])
def test_image_size(name, train):
    transform = image_transforms(PROCESSORS.get(name, TIMM), train=train, image_size=56)
    for size in ((90, 60), (20, 30)):
        assert transform(photograph(size)).shape == (3, 56, 56)


def test_image_size_keeps_the_share_that_the_crop_takes():
    larger = transformers.DeiTImageProcessor(size={"height": 96, "width": 96}, crop_size={"height": 80, "width": 80})
    expected = larger(images=photograph(), return_tensors="pt")["pixel_values"][0]
    transform = image_transforms(PROCESSORS["resize and crop"], train=False, image_size=80)
    assert torch.equal(transform(photograph()), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
@pytest.mark.parametrize("processor", [PROCESSORS["height and width"], TIMM], ids=["transformers", "timm"])
def test_images_of_any_mode_are_read_as_rgb(mode, processor, recwarn):
    image = photograph(mode=mode)
    if mode == "P":
        image.info["transparency"] = b"\x00\xff"
    for train in (True, False):
        transform = image_transforms(processor, train=train, allow_flip=False)
        torch.manual_seed(0)
        result = transform(image)
        torch.manual_seed(0)
        assert torch.equal(
            result, transform(image.convert("RGBA").convert("RGB") if mode == "P" else image.convert("RGB"))
        )
    assert not [warning for warning in recwarn if "ransparency" in str(warning.message)]


def test_small_images_keep_most_of_their_area():
    transform = image_transforms(raw_config(64), train=True)
    small, half = kept_areas(transform, coordinates((31, 40))), kept_areas(transform, coordinates((32, 40)))
    assert 0.75 < small.min() < 0.9
    assert 0.2 < half.min() < 0.5
    assert half.max() > 0.75


@pytest.mark.parametrize(("allow_flip", "mirrored"), [(True, {True, False}), (False, {False})])
def test_images_are_mirrored_only_where_allowed(allow_flip, mirrored):
    transform = image_transforms(raw_config(32), train=True, allow_flip=allow_flip)
    image = coordinates((64, 64))
    assert {(red[0, 0] > red[0, -1]).item() for red, *_ in (transform(image) for _ in range(20))} == mirrored


def test_augmentation_draws_from_torchs_generator_alone():
    transform = image_transforms(TIMM, train=True)
    torch.manual_seed(5)
    first = [transform(photograph()) for _ in range(3)]
    torch.manual_seed(5)
    again = [transform(photograph()) for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("processor", [PROCESSORS["height and width"], TIMM], ids=["transformers", "timm"])
def test_transforms_reach_workers(processor):
    transform = pickle.loads(pickle.dumps(image_transforms(processor, train=True)))
    assert transform(photograph()).dtype == torch.float32


@pytest.mark.parametrize(
    ("processor", "image_size", "message"),
    [
        (TIMM, 0, r"`image_size` \(=0\)"),
        (transformers.CLIPImageProcessor(do_center_crop=False), None, "a batch needs one size"),
        (transformers.PerceiverImageProcessor(), 64, r"`image_size` \(=64\) does not fit"),
    ],
)
def test_sizes_that_no_batch_can_have(processor, image_size, message):
    with pytest.raises(ValueError, match=message):
        image_transforms(processor, train=False, image_size=image_size)
