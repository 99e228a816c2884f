"""Laws of layers before the head that a model's file holds no weights for: they are known, and never left random."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from etf_adapt.training.feature_cache import cache_features
from export_onnx import example_inputs
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.adapters import add_adapters
from etf_adapt.models.auto import ETFForSequenceClassification
from etf_adapt.models.weights import new_weights
from etf_adapt.training.parameters import fix_parameters

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
ENCODERS = {
    "roberta": (lambda: RobertaModel(RobertaConfig(**SIZES)), "classifier.dense"),
    "deberta": (lambda: DebertaV2Model(DebertaV2Config(**SIZES)), "pooler.dense"),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=40)),
        "pre_classifier",
    ),
}


def load(folder, kind, **options):
    torch.manual_seed(0)
    ENCODERS[kind][0]().save_pretrained(folder)
    return ETFForSequenceClassification.from_pretrained(folder, num_labels=3, **options)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", ENCODERS)
def test_they_are_those_that_the_file_lacks_without_the_head(kind, tmp_path):
    model = load(tmp_path / "encoder", kind)
    layer = ENCODERS[kind][1]
    assert set(new_weights(model)) == {f"{layer}.weight", f"{layer}.bias"}
    model.save_pretrained(tmp_path / "saved")
    again = ETFForSequenceClassification.from_pretrained(tmp_path / "saved")
    other = ETFForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3, pooling="mean")
    assert not new_weights(again) and not new_weights(other)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("head", ["etf", "linear"])
def test_they_are_trained_as_a_whole_beside_adapters_and_over_a_frozen_backbone(kind, head, tmp_path):
    model = load(tmp_path, kind, head=head)
    new = {f"{ENCODERS[kind][1]}.weight", f"{ENCODERS[kind][1]}.bias"}
    of_head = (
        {f"{path}.{name}" for path in head_modules(model) for name in ("weight", "bias")} if head == "linear" else set()
    )
    frozen = load(tmp_path, kind, head=head)
    fix_parameters(frozen, freeze="backbone")
    assert trained(frozen) == new | of_head

    pytest.importorskip("peft", reason="needs the package of `.[peft]`")
    paths = add_adapters(model, {"peft_type": "LORA", "r": 2})
    assert paths and not any(path.startswith(ENCODERS[kind][1]) for path in paths)
    assert trained(model) == new | of_head | {name for name, _ in model.named_parameters() if "lora_" in name}


def test_nothing_is_new_in_a_classifier_with_other_labels(tmp_path):
    RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=5)).save_pretrained(tmp_path)
    assert not new_weights(ETFForSequenceClassification.from_pretrained(tmp_path, num_labels=3))


def test_kept_features_say_that_they_stay_random(tmp_path):
    model = load(tmp_path, "roberta", head="linear")
    batch = example_inputs(model)
    columns = {name: value.tolist() for name, value in batch.items()} | {"labels": [0, 1], "row_id": [0, 1]}
    data = Dataset.from_dict(columns).with_format("torch")
    with pytest.warns(UserWarning, match=r"2 weights before the head, such as classifier\.dense"):
        cache_features(model, data, torch.utils.data.default_collate)
    fix_parameters(model, freeze="backbone")
    assert trained(model) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_features(model, data, torch.utils.data.default_collate)
