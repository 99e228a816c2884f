"""Laws of the passes over held-out rows: each row once, nothing kept but a few numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_run import make_model
from torch import nn

from etf_adapt.inference.predictions import calibrate, predict_rows


class Scores(nn.Module):
    """A model whose logits are its input."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


def batches(logits, labels, ids):
    return [
        {"x": logits[part], "labels": labels[part], "row_id": ids[part]} for part in torch.arange(len(ids)).split(4)
    ]


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, 3, generator=generator), torch.randint(3, (11,), generator=generator)


def test_rows_come_back_in_order_with_their_numbers(rows):
    logits, labels = rows
    shuffled = torch.randperm(11)
    result = predict_rows(Scores(), batches(logits[shuffled], labels[shuffled], shuffled), num_rows=11)
    assert result.row_ids.tolist() == list(range(11))
    assert result.labels.tolist() == labels.tolist()
    assert result.predictions.tolist() == logits.argmax(dim=1).tolist()
    torch.testing.assert_close(torch.from_numpy(result.confidences), logits.softmax(dim=1).amax(dim=1))
    torch.testing.assert_close(torch.from_numpy(result.losses), F.cross_entropy(logits, labels, reduction="none"))


def test_predictions_without_the_offsets_that_were_folded_in(rows):
    logits, labels = rows
    offsets = torch.tensor([0.0, 3.0, -1.0])
    result = predict_rows(Scores(), batches(logits + offsets, labels, torch.arange(11)), offsets=offsets.tolist())
    assert result.unadjusted.tolist() == logits.argmax(dim=1).tolist() != result.predictions.tolist()
    assert predict_rows(Scores(), batches(logits, labels, torch.arange(11))).unadjusted.tolist() == (
        logits.argmax(dim=1).tolist()
    )


def test_rows_repeated_to_fill_a_batch_count_once(rows):
    logits, labels = rows
    ids = torch.cat([torch.arange(11), torch.tensor([0])])
    result = predict_rows(Scores(), batches(logits[ids], labels[ids], ids), num_rows=11)
    assert len(result.row_ids) == 11


def test_a_missing_row_is_an_error(rows):
    logits, labels = rows
    with pytest.raises(RuntimeError, match="10 of 11"):
        predict_rows(Scores(), batches(logits[:10], labels[:10], torch.arange(10)), num_rows=11)


def test_the_mode_of_the_model_is_left_alone(rows):
    model = Scores().train()
    predict_rows(model, batches(*rows, torch.arange(11)))
    assert model.training


@pytest.mark.parametrize("class_counts", [None, [9, 3, 1]])
def test_calibration_calls_the_model_once_and_folds_in_what_it_returns(class_counts):
    model = make_model().eval()
    images, labels = torch.randn(11, 3, 8, 8), torch.arange(11) % 3
    rows = [
        {"pixel_values": images[part], "labels": labels[part], "row_id": part} for part in torch.arange(11).split(4)
    ]
    before, calls = model(images).logits, []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    factor, strength = calibrate(model, rows, class_counts)
    hook.remove()
    assert len(calls) == len(rows) and (strength == 0.0 if class_counts is None else strength >= 0.0)
    offsets = 0.0 if class_counts is None else strength * (torch.tensor(class_counts) / 13.0).log()
    torch.testing.assert_close(model(images).logits, factor * before - offsets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(calibrate(model, rows, class_counts)), torch.tensor([factor, strength]))
