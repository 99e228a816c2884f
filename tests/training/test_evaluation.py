"""Laws of the passes over held-out rows: each row once, nothing kept but a few numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.auto import adapt
from etf_adapt.training.evaluation import fit_temperature, predict_rows, tau_normalize


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


def test_tau_normalisation_takes_the_lengths_of_rows_away():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = adapt(ViTForImageClassification(config).eval(), 3, head="linear")
    images = torch.randn(60, 3, 8, 8)
    ((_, head),) = head_modules(model).items()
    with torch.no_grad():
        directions = F.normalize(head.weight, dim=1)
        features = model(pixel_values=images, output_hidden_states=True).hidden_states[-1][:, 0]
        features = model.vit.layernorm(features)
        labels = (features @ directions.T).argmax(dim=1)  # right without the lengths
        head.weight.copy_(directions * torch.tensor([[9.0], [3.0], [1.0]]))
        head.bias.copy_(torch.tensor([5.0, 0.0, -5.0]))
    rows = [{"pixel_values": images, "labels": labels, "row_id": torch.arange(60)}]
    before = (predict_rows(model, rows).predictions == labels.numpy()).mean()
    tau = tau_normalize(model, rows)
    assert before < 0.9 and (predict_rows(model, rows).predictions == labels.numpy()).mean() == 1.0
    assert 0.5 < tau <= 1.0 and not head_modules(model)["classifier"].bias.any()
    torch.testing.assert_close(F.normalize(head.weight, dim=1), directions)


def test_the_temperature_is_that_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(2000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    assert fit_temperature(Scores(), batches(5.0 * logits, labels, torch.arange(2000))) == pytest.approx(0.2, rel=0.05)
