"""Laws of the alignment: closed form of the features that the model's own head reads, whatever the batches."""

from __future__ import annotations

import pytest
import timm
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from etf_adapt.data.batches import raised_everywhere
from etf_adapt.errors import DataError
from etf_adapt.geometry.closed_form import FRAMES, MEAN_FRAMES, closed_form_vectors
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.auto import adapt
from etf_adapt.models.swap import swap_head

COUNTS = (14, 6, 3)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "image_size": 64,
    "patch_size": 16,
}


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    images = torch.randn(3, 3, 64, 64, generator=generator)[labels]
    images = images + 0.7 * torch.randn(len(labels), 3, 64, 64, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return images[order], labels[order]


def batches(rows, size):
    images, labels = rows
    return [{"x": images[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(labels), size)]


def model_with_head(name="test_resnet", **options):
    torch.manual_seed(0)
    sizes = {} if "resnet" in name else {"img_size": 64}
    return swap_head(timm.create_model(name, num_classes=10, **sizes), 3, **options)


def vectors_of(model):
    return [head.class_vectors() for head in head_modules(model).values()]


def test_a_model_that_knew_no_class_counts_knows_them_afterwards(rows):
    images, labels = rows
    model = adapt(ViTForImageClassification(ViTConfig(**SIZES)), 3)
    logits = torch.randn(4, 3)
    even = model.compute_loss_from_logits(logits, torch.tensor([0, 1, 2, 2]))
    align_head(model, [{"pixel_values": images, "labels": labels}])
    assert model.etf_settings["class_counts"] == [*COUNTS]
    assert model.compute_loss_from_logits(logits, torch.tensor([0, 1, 2, 2])) != even


def numbered(rows, size):
    return [
        {**batch, "row_id": 100 + torch.arange(start, start + len(batch["labels"]))}
        for batch, start in zip(batches(rows, size), range(0, len(rows[1]), size), strict=True)
    ]


@pytest.mark.parametrize("frame", MEAN_FRAMES)
def test_the_rows_are_returned_with_the_form_in_units_of_the_head(rows, frame):
    model = model_with_head()
    (seen,) = align_head(model, numbered(rows, 5), frame=frame).rows_seen
    (before,) = vectors_of(model)
    assert seen.row_ids.tolist() == [100 + row for row in range(len(rows[1]))]
    assert torch.equal(seen.labels, rows[1])
    seen.note(seen.row_ids, seen.features)
    (head,) = head_modules(model).values()
    assert seen.realign(head)
    for again, first in zip(vectors_of(model)[0], before, strict=True):
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_cosine_head_are_not_left_out(rows):
    model = model_with_head(kind="cosine")
    assert align_head(model, numbered(rows, 5)).rows_seen == (None,)


def test_a_class_of_one_row_is_set_to_it(rows):
    images, labels = rows
    first = [int((labels == label).nonzero()[0]) for label in range(3)]
    model = model_with_head()
    (batch,) = numbered((images[first], labels[first]), 3)
    align_head(model, [batch])
    assert model.eval()(batch["x"]).argmax(dim=1).tolist() == [0, 1, 2]


def test_rows_without_numbers_and_those_of_other_frames_are_not_kept(rows):
    assert align_head(model_with_head(), batches(rows, 5)).rows_seen == (None,)
    assert align_head(model_with_head(), numbered(rows, 5), frame="random").rows_seen == (None,)


@pytest.mark.parametrize("frame", FRAMES)
def test_the_head_is_the_closed_form_of_its_features_with_norm_one(rows, frame):
    model = model_with_head()
    result = align_head(model, batches(rows, 5), frame=frame)
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(rows[0]), pre_logits=True)
        _, norms = vertex_products(model(rows[0]))
    statistics = ClassStatistics.of(features, rows[1], 3)
    penalty = result.penalties[0]
    weight, bias = closed_form_vectors(statistics, frame, penalty=penalty, generator=torch.Generator().manual_seed(0))
    ours = torch.cat([vectors_of(model)[0][0], vectors_of(model)[0][1].unsqueeze(1)], dim=1)
    expected = torch.cat([weight, bias.unsqueeze(1)], dim=1)
    torch.testing.assert_close(ours / ours.norm(), expected / expected.norm(), atol=1e-5, rtol=1e-4)
    assert norms.mean().item() == pytest.approx(1.0, rel=1e-4)
    assert result.rows == 23 and result.frame == frame == head_modules(model).popitem()[1].frame


def test_batches_and_known_counts_make_no_difference(rows):
    results = []
    for size, counts in ((23, None), (4, COUNTS)):
        model = model_with_head()
        align_head(model, batches(rows, size), class_counts=counts, penalty=0.3)
        results.append(vectors_of(model)[0][0])
    assert (results[0] - results[1]).norm() < 1e-4 * results[0].norm()


def forms_of(rows):
    images, labels = rows
    columns = {"x": images.numpy(), "label": labels.tolist(), "name": ["row"] * len(labels)}
    yield "mappings", batches(rows, 6), None
    yield "pairs", DataLoader(TensorDataset(images, labels), batch_size=6), labels
    yield "rows of pairs", TensorDataset(images, labels), None
    yield "rows of a data set", Dataset.from_dict(columns), Dataset.from_dict(columns)
    yield "rows and a collator", [*zip(images, labels)], labels.tolist()


def test_the_form_of_the_data_makes_no_difference(rows):
    def collate(group):
        images, labels = zip(*group)
        return {"x": torch.stack(images), "labels": torch.stack(labels)}

    found = {}
    for form, data, counts in forms_of(rows):
        model, collator = model_with_head(), collate if "collator" in form else None
        align_head(model, data, class_counts=counts, collator=collator, penalty=0.3)
        found[form] = vectors_of(model)[0][0]
    for form, weight in found.items():
        assert (weight - found["mappings"]).norm() < 1e-4 * weight.norm(), form


def test_data_that_are_gone_after_one_pass_need_the_counts(rows):
    with pytest.raises(DataError, match="gone after one pass"):
        align_head(model_with_head(), iter(batches(rows, 6)))
    assert align_head(model_with_head(), iter(batches(rows, 6)), class_counts=rows[1]).rows == 23


def test_labels_beyond_the_heads_classes_are_told(rows):
    with pytest.raises(ValueError, match=r"`labels` \(=3 at row 0\) must lie in 0..2"):
        align_head(model_with_head(), [{"x": rows[0][:2], "labels": torch.tensor([3, 0])}])


def test_mode_gradients_running_statistics_and_random_state_are_left_alone(rows):
    model = model_with_head().train()
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state = torch.get_rng_state()
    align_head(model, batches(rows, 6))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(head.weight.requires_grad for head in head_modules(model).values())


def test_the_norm_is_one_in_training_mode_where_dropout_enlarges_it(rows):
    model = model_with_head("test_vit", kind="etf")
    model.head_drop = nn.Dropout(0.5)
    align_head(model, batches(rows, 23), frame="means")
    model.train()
    torch.manual_seed(5)
    with torch.no_grad():
        trained = torch.stack([vertex_products(model(rows[0]))[1].mean() for _ in range(20)]).mean()
        evaluated = vertex_products(model.eval()(rows[0]))[1].mean()
    assert trained.item() == pytest.approx(1.0, abs=0.1)
    assert evaluated < trained


def test_several_heads_are_aligned_each_on_its_own_input(rows):
    model = model_with_head("deit_tiny_distilled_patch16_224")
    result = align_head(model, batches(rows, 23))
    first, second = vectors_of(model)
    assert len(result.penalties) == 2 and not torch.equal(first[0], second[0])
    model.eval()
    with torch.no_grad():
        logits = model(rows[0])
    assert vertex_products(logits)[1].mean().item() == pytest.approx(1.0, rel=1e-3)
    assert (logits.argmax(dim=1) == rows[1]).float().mean() > 0.9


def test_a_data_loader_and_its_batches_give_the_same(rows):
    items = [{"x": image, "labels": label} for image, label in zip(*rows, strict=True)]
    results = []
    for data in (DataLoader(items, batch_size=6), batches(rows, 6)):
        model = model_with_head()
        align_head(model, data)
        results.append(vectors_of(model)[0][0])
    assert torch.equal(results[0], results[1])


def test_a_cosine_head_starts_from_the_class_means(rows):
    model = model_with_head(kind="cosine")
    align_head(model, batches(rows, 23))
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(rows[0]), pre_logits=True)
    means = ClassStatistics.of(features, rows[1], 3).means
    torch.testing.assert_close(vectors_of(model)[0][0], means, atol=1e-5, rtol=1e-4)


def test_models_without_our_head_and_paper_heads_are_refused(rows):
    with pytest.raises(ValueError, match="swap_head"):
        align_head(timm.create_model("test_resnet", num_classes=3), batches(rows, 5))
    with pytest.raises(ValueError, match="paper"):
        align_head(model_with_head(kind="paper"), batches(rows, 5))
    with pytest.raises(ValueError, match="Class 2 has no row"):
        align_head(model_with_head(), [{"x": rows[0][:4], "labels": torch.tensor([0, 0, 1, 1])}])


def test_an_alignment_forgets_the_calibration_of_the_rows_before_it(rows):
    model = adapt(ViTForImageClassification(ViTConfig(**SIZES)), 3)
    model.set_calibration(5.0)
    data = [{"pixel_values": batch["x"], "labels": batch["labels"]} for batch in batches(rows, 23)]
    align_head(model, data, frame="means")
    assert model.etf_settings["logit_scale"] == 1.0


def test_an_error_in_the_rows_of_one_process_is_raised_on_all(monkeypatch):
    monkeypatch.setattr("etf_adapt.data.batches.gather_object", lambda messages: [*messages, "`a.jpg` is broken"])
    with pytest.raises(DataError, match=r"`a\.jpg` is broken"), raised_everywhere():
        pass
    monkeypatch.setattr("etf_adapt.data.batches.gather_object", lambda messages: [None, *messages])
    with pytest.raises(DataError, match=r"`b\.jpg` is broken"), raised_everywhere():
        raise DataError("`b.jpg` is broken")
