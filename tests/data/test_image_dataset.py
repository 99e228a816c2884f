"""What a row is augmented to follows from seed, epoch and place: not from workers, processes, batches or resumes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import BatchSampler, DataLoader

from etf_adapt.data import image_dataset
from etf_adapt.data.image_dataset import ImageDataset, RowDraw, RowDraws
from etf_adapt.data.sampler import ClassBalancedSampler
from etf_adapt.errors import RowError

ORDER = [0, 1, 0, 2, 0, 3, 1, 0]


def one_number(image):
    return torch.rand(1) + image.size[0]


@pytest.fixture(scope="module")
def images():
    stream = io.BytesIO()
    PILImage.new("RGB", (4, 4)).save(stream, "PNG")
    features = Features({"image": Image(), "label": Value("int64")})
    values = {"image": [{"bytes": stream.getvalue(), "path": None}] * 4, "label": [3, 2, 1, 0]}
    return Dataset.from_dict(values, features=features)


@pytest.fixture
def rows(images):
    return ImageDataset(images, one_number, seed=1)


def draws(epoch, order=ORDER):
    sampler = RowDraws(order)
    sampler.set_epoch(epoch)
    return sampler


def loader(rows, sampler, **options):
    return DataLoader(rows, batch_size=2, sampler=sampler, **options)


def drawn(batches):
    """Return what each row was augmented to, in the order drawn."""
    return torch.cat([batch["pixel_values"] for batch in batches]).flatten().tolist()


def test_a_draw_passes_for_its_row():
    for draw in (RowDraw(3, epoch=2, place=9), pickle.loads(pickle.dumps(RowDraw(3, epoch=2, place=9)))):
        assert [10, 11, 12, 13][draw] == 13
        assert (draw, draw.epoch, draw.place, hash(draw)) == (3, 2, 9, hash(3))
    assert copy.deepcopy(RowDraw(3, 2, 9)).place == 9


def test_batches_hold_labels_and_row_numbers(rows):
    batch = next(iter(loader(rows, [2, 0])))
    assert batch["labels"].tolist() == [1, 3]
    assert batch["row_id"].tolist() == [2, 0]
    assert batch["labels"].dtype == batch["row_id"].dtype == torch.int64


def test_each_draw_is_augmented_anew(rows):
    everything = drawn(loader(rows, draws(0))) + drawn(loader(rows, draws(1)))
    everything += drawn(loader(ImageDataset(rows.dataset, one_number, seed=2), draws(0)))
    assert len(set(everything)) == 3 * len(ORDER)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(rows, persistent):
    sampler = RowDraws(ORDER)
    batches = loader(rows, sampler, num_workers=2, persistent_workers=persistent)
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        assert drawn(batches) == drawn(loader(rows, draws(epoch)))


def test_batch_size_changes_nothing(rows):
    assert drawn(DataLoader(rows, 5, sampler=draws(1))) == drawn(loader(rows, draws(1)))


def test_processes_change_nothing(rows):
    shares = []
    for process in (0, 1):
        shard = BatchSamplerShard(BatchSampler(draws(1), 2, drop_last=False), 2, process)
        shares.append(DataLoader(rows, batch_sampler=shard))
    together = [batch for step in zip(*shares, strict=True) for batch in step]
    assert drawn(together) == drawn(loader(rows, draws(1)))


def test_a_resume_in_mid_epoch_changes_nothing(rows):
    resumed = skip_first_batches(loader(rows, draws(3)), 2)
    assert drawn(resumed) == drawn(loader(rows, draws(3)))[4:]


def test_the_global_generator_is_left_as_it_was(rows):
    before = torch.get_rng_state()
    rows[RowDraw(1, 4, 2)]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_row_number_always_gives_the_same(rows):
    torch.manual_seed(1)
    first = rows[2]["pixel_values"]
    torch.manual_seed(2)
    assert torch.equal(rows[2]["pixel_values"], first)
    assert not torch.equal(rows[3]["pixel_values"], first)


def counting(images, **options):
    calls = []
    transform = lambda image: calls.append(image.size) or torch.rand(1)
    return ImageDataset(images, transform, seed=1, **options), calls


def test_images_are_decoded_once_and_transformed_anew(images, monkeypatch):
    kept, calls = counting(images, keep=True)
    first = [kept[row]["pixel_values"] for row in (RowDraw(2, 0, 0), 0)]
    kept[2]["labels"] = 9
    monkeypatch.setattr(ImageDataset, "_decode", None)  # none is read again
    again = [kept[row]["pixel_values"] for row in (RowDraw(2, 0, 0), 0)]
    assert again == first != [kept[RowDraw(2, 1, 0)]["pixel_values"], kept[0]["pixel_values"]]
    assert kept[2]["labels"] == 1 and len(calls) == 8


def test_workers_keep_nothing(images):
    kept, _ = counting(images, keep=True)
    list(loader(kept, None, num_workers=1))
    list(loader(kept, draws(0), num_workers=1))
    assert kept._decoded == {}


@pytest.mark.parametrize(("room", "expected"), [(4 * 64, [1, 3]), (4 * 64 - 1, [])])
def test_images_are_kept_where_all_fit(images, monkeypatch, room, expected):
    monkeypatch.setattr(image_dataset, "KEPT_BYTES", room)
    kept, _ = counting(images, keep=True)
    for row in (1, RowDraw(3)):
        kept[row]
    assert [*kept._decoded] == expected


def test_two_forms_of_the_same_rows_keep_their_images_once(images, monkeypatch):
    train, _ = counting(images, keep=True)
    plain, calls = counting(images, keep=True, images_of=train)
    first = [plain[row]["pixel_values"] for row in (2, 0)]
    monkeypatch.setattr(ImageDataset, "_decode", None)  # neither is read again
    assert [plain[row]["pixel_values"] for row in (2, 0)] == first and len(calls) == 4
    assert train[RowDraw(2)]["labels"] == 1 and [*train._decoded] == [2, 0]


def test_the_pixels_of_a_row_are_counted(images):
    assert counting(images)[0].row_bytes == 4 and counting(images.select([]))[0].row_bytes == 0


def test_the_epoch_reaches_the_sampler_within():
    sampler = RowDraws(ClassBalancedSampler([0] * 20 + [1], batch_size=2, seed=0))
    alone = ClassBalancedSampler([0] * 20 + [1], batch_size=2, seed=0)
    sampler.set_epoch(3)
    assert list(sampler) != list(alone)
    alone.set_epoch(3)
    assert len(sampler) == len(alone)
    assert list(sampler) == list(alone)
    assert {draw.epoch for draw in sampler} == {3}


def test_a_damaged_image_is_named(tmp_path):
    file = tmp_path / "broken.png"
    stream = io.BytesIO()
    PILImage.effect_noise((64, 64), 50).save(stream, "PNG")
    file.write_bytes(stream.getvalue()[:1000])  # whose header is whole
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [str(file), str(tmp_path / "gone.png")], "label": [0, 1]}, features=features)
    with pytest.raises(ValueError, match=r"row 0 .*broken\.png.* cannot be decoded"):
        ImageDataset(rows, one_number)[0]
    with pytest.raises(ValueError, match=r"row 1 .*gone\.png"):
        ImageDataset(rows, one_number)[1]


def test_limits_of_pillow_in_decoding_are_one_line_with_the_file(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    PILImage.new("L", (64, 64)).save(file)
    rows = Dataset.from_dict({"image": [str(file)], "label": [0]}).cast_column("image", Image())
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 9)
    with pytest.raises(RowError, match=r"row 0 .*large\.png.* cannot be decoded: Image size"):
        ImageDataset(rows, one_number)[0]
