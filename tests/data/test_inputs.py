"""Laws of inputs without labels: what of a folder is read, and that padding is never read as text."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from small_models import processor

from etf_adapt.data.inputs import WINDOW_BATCHES, image_batches, image_files, text_batches
from etf_adapt.data.transforms import image_transforms


def test_what_looks_like_an_image_is_read_or_a_named_error(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/.hidden.png", "__MACOSX/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("logo.svg", "table.csv", "a/notes.txt"):
        (tmp_path / name).write_text("<svg/>")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (batch,) = image_batches(image_files(tmp_path), image_transforms(processor("vit"), train=False), batch_size=9)
    assert [(item.row, item.name) for item in batch.inputs] == [
        (0, str(tmp_path / "a/c.JPG")),
        (1, str(tmp_path / "b.png")),
    ]
    assert [item.name for item, _ in batch.bad] == [str(tmp_path / "logo.svg")]


@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_is_masked_or_not_there(has_mask):
    texts = ["a", "a tree a", "tree tree", "a a a a"]
    batches = [
        batch
        for batch in text_batches(texts, processor("bert"), batch_size=3, max_length=9, has_mask=has_mask)
        if batch.inputs
    ]
    for batch in batches:
        is_padding = batch.tensors["input_ids"] == processor("bert").pad_token_id
        mask = batch.tensors.get("attention_mask", torch.ones_like(is_padding))
        assert torch.equal(is_padding, mask == 0)
    assert (
        sorted(item.row for batch in batches for item in batch.inputs) == [0, 1, 2, 3]
        and (len(batches) == 4) != has_mask
    )


def test_batches_hold_texts_of_similar_length():
    texts = ["a " * (1 + number % 17) for number in range(4 * WINDOW_BATCHES)]
    batches = [batch for batch in text_batches(texts, processor("bert"), batch_size=4, max_length=99) if batch.inputs]
    padding = sum(int((batch.tensors["attention_mask"] == 0).sum()) for batch in batches)
    assert len(batches) == WINDOW_BATCHES and padding < 0.1 * sum(
        batch.tensors["input_ids"].numel() for batch in batches
    )


def test_workers_read_each_image_once_and_keep_the_order(tmp_path):
    for number in range(7):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    transform = image_transforms(processor("vit"), train=False)
    batches = image_batches(image_files(tmp_path), transform, batch_size=2, num_workers=2)
    assert [[item.row for item in batch.inputs] for batch in batches] == [[0, 1], [2, 3], [4, 5], [6]]
