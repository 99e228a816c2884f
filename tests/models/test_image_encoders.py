"""Laws of image encoders without a classification class: their pooled output is read, and the folder by two other libraries."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from export_onnx import export_onnx
from PIL import Image
from slow_cases import rest_slow
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
)

from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.in_model import head_modules, read_features
from etf_adapt.inference.predictions import load_stock
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification
from etf_adapt.models.pooling import PooledOutputForImageClassification

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
ENCODERS = {
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, patch_size=16)),
    "dinov3 convnext": lambda: DINOv3ConvNextModel(
        DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 24], depths=[1, 1, 1, 1])
    ),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT, patch_size=16)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VIT, patch_size=16)),
}
NAMES = {0: "a", 1: "b", 2: "c"}


def save_encoder(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    ENCODERS[kind]().save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def images(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def load(folder: Path, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no class for image classification")
        return ETFForImageClassification.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_feature_is_the_pooled_output(kind, tmp_path):
    model = load(save_encoder(tmp_path, kind), num_labels=3)
    expected = AutoModel.from_pretrained(tmp_path).eval()(pixel_values=images()).pooler_output
    (features,) = read_features(model, {"pixel_values": images()})
    assert torch.equal(features, expected)
    assert torch.equal(model(images()).logits, head_modules(model)["classifier"](expected))


@pytest.mark.parametrize("kind", rest_slow(ENCODERS, fast=2))
@pytest.mark.parametrize("head", ["etf", "cosine"])
def test_a_folder_comes_back_and_so_does_a_checkpoint(kind, head, tmp_path):
    model = load(save_encoder(tmp_path / "encoder", kind), id2label=NAMES, head=head)
    align_head(model, [{"pixel_values": images(), "labels": torch.arange(6) % 3}])
    if head == "etf":
        model.set_calibration(2.0)
    logits = model(images()).logits
    for folder in (tmp_path / "out", tmp_path / "checkpoint-7"):
        model.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back = load(folder)
        assert back.etf_settings["pooling"] == "pooler_output" and dict(back.config.id2label) == NAMES
        if head == "cosine" and folder.name == "out":
            assert back.etf_settings["head"]["folded"]
            assert torch.equal(back(images()).logits.argmax(dim=1), logits.argmax(dim=1))
        else:
            assert torch.equal(back(images()).logits, logits)
    stock = load_stock(tmp_path / "out", "image")
    assert type(stock) is PooledOutputForImageClassification
    assert torch.equal(stock(images()).logits, load(tmp_path / "out")(images()).logits)


def test_the_encoder_of_a_folder_is_read_by_transformers_without_a_word(tmp_path, caplog):
    model = load(save_encoder(tmp_path / "encoder", "dinov3"), num_labels=3)
    model.save_pretrained(tmp_path / "out")
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        encoder = AutoModel.from_pretrained(tmp_path / "out")
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(encoder) is DINOv3ViTModel
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])


@pytest.mark.parametrize("kind", ["dinov3", "siglip"])
def test_sentence_transformers_gives_the_logits(kind, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    model = load(save_encoder(tmp_path / "encoder", kind), id2label=NAMES)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    photos = [Image.fromarray(picture) for picture in pixels]
    batch = dict(model.processor(photos, return_tensors="pt"))
    align_head(model, [{**batch, "labels": torch.arange(3)}])
    model.set_calibration(3.0, [0.5, 0.0, -0.5])
    model.save_pretrained(tmp_path / "out")
    other = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert other[0].auto_model.config.id2label == NAMES
    torch.testing.assert_close(
        other.encode(photos, convert_to_tensor=True), model(**batch).logits, atol=1e-5, rtol=1e-5
    )


def test_what_reads_the_result_is_said_once_with_timms_way_to_a_stock_checkpoint(tmp_path):
    folder = save_encoder(tmp_path / "encoder", "dinov3")
    with pytest.warns(UserWarning, match=r"sentence-transformers.*timm has it too .*dinov3"):
        model = ETFForImageClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ETFForImageClassification.from_pretrained(tmp_path / "out")


def test_encoders_without_a_pooled_output_and_of_texts_are_refused(tmp_path):
    ViTMAEModel(ViTMAEConfig(**VIT, patch_size=16)).save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match=r"'vit_mae' model.*no pooled output of images alone"):
        load(tmp_path / "mae", num_labels=3)
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
              ).save_pretrained(tmp_path / "bert")  # fmt: skip
    with pytest.raises(ValueError, match="ETFForSequenceClassification for texts"):
        load(tmp_path / "bert", num_labels=3)
    with pytest.raises(ValueError, match=r"pooling='mean' for an encoder of texts"):
        ETFForSequenceClassification.from_pretrained(save_encoder(tmp_path / "v", "dinov3"), num_labels=3)


@pytest.mark.slow
def test_one_is_exported(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the packages of `.[onnx]`")
    model = load(save_encoder(tmp_path / "encoder", "dinov3"), num_labels=3)
    model.save_pretrained(tmp_path / "out")
    assert export_onnx(tmp_path / "out", tmp_path / "model.onnx", task="image").is_file()


def test_a_folder_says_how_it_is_read(tmp_path):
    load(save_encoder(tmp_path / "encoder", "dinov3"), num_labels=3).save_pretrained(tmp_path / "out")
    assert [part["path"] for part in json.loads((tmp_path / "out" / "modules.json").read_text())] == ["", "1_Dense"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["etf_adapt"]["library"] == "sentence_transformers"
