"""Laws of the export: another runtime gives the model's logits for any number of rows, or no file is left."""

from __future__ import annotations

import export_onnx as export
import numpy as np
import pytest
import torch
from export_onnx import example_inputs, export_onnx
from slow_cases import rest_slow
from small_run import make_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages of `.[onnx]`")
pytest.importorskip("onnxscript", reason="needs the packages of `.[onnx]`")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}


def timm_model(name, head="etf"):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=10, model_args={"img_size": 64} if "vit" in name else {})
    return adapt(TimmWrapperForImageClassification(config), 3, head=head)


def mean_pooled(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "encoder")
    return ETFForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3, pooling="mean")


MODELS = {
    "vit": lambda _: make_model(),
    "timm vit": lambda _: timm_model("test_vit"),
    "timm cnn": lambda _: timm_model("test_resnet", "cosine"),
    "bert": lambda _: adapt(BertForSequenceClassification(BertConfig(**SIZES)), 3),
    "decoder": lambda _: adapt(LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)), 3),
    "mean of tokens": mean_pooled,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "timm vit"])  # a finished folder, below
def test_another_runtime_gives_the_logits_of_any_number_of_rows(name, tmp_path):
    model = MODELS[name](tmp_path).train()
    file = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert model.training
    model.eval()
    session = onnxruntime.InferenceSession(str(file))
    for rows in (1, 5):
        batch = example_inputs(model, rows=rows)
        if "attention_mask" in batch:
            batch = {name: value[:, :9] for name, value in batch.items()}
            batch["attention_mask"][0, 6:] = 0
        (found,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
        expected = model(**batch).logits.detach().numpy()
        assert found.shape == (rows, 3)
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.slow
def test_a_finished_folder_is_exported_as_stock_libraries_load_it(tmp_path):
    model = timm_model("test_vit", "cosine")
    model.save_pretrained(tmp_path / "out")
    file = export_onnx(tmp_path / "out", tmp_path / "model.onnx", task="image")
    batch = example_inputs(model)
    (found,) = onnxruntime.InferenceSession(str(file)).run(None, {"pixel_values": batch["pixel_values"].numpy()})
    assert (found.argmax(axis=1) == model.eval()(**batch).logits.argmax(dim=1).numpy()).all()


@pytest.mark.slow
def test_a_file_with_other_logits_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="other logits"):
        export_onnx(make_model(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.hf", "mobilenetv2_100.timm"])
def test_real_image_backbones(name, shared_models, tmp_path):
    model = ETFForImageClassification.from_pretrained(shared_models / name, num_labels=5)
    assert export_onnx(model, tmp_path / "model.onnx").stat().st_size > 5_000_000  # it has compared the logits


@pytest.mark.slow
def test_a_real_text_encoder(minilm, tmp_path):
    model = ETFForSequenceClassification.from_pretrained(minilm, num_labels=5, pooling="mean")
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    batch = dict(model.processor(["one", "and one with more words"], padding=True, return_tensors="np"))
    assert {value.name for value in session.get_inputs()} == set(batch)
    (found,) = session.run(None, batch)
    expected = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        export_onnx(make_model().bfloat16(), tmp_path / "model.onnx")
    with pytest.raises(TypeError, match="Linear"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"`task` \(=None\)"):
        export_onnx(tmp_path, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="single row"):
        export_onnx(make_model(), tmp_path / "model.onnx", example={"pixel_values": torch.zeros(1, 3, 8, 8)})


@pytest.mark.parametrize("name", MODELS)
def test_inputs_are_made_up_that_the_model_takes(name, tmp_path):
    model = MODELS[name](tmp_path).eval()
    batch = example_inputs(model, rows=4)
    assert model(**batch).logits.shape == (4, 3)


@pytest.mark.parametrize("name", rest_slow(["bert", "timm cnn", "mean of tokens"], fast=1))
def test_torch_exports_it_with_a_free_batch_size(name, tmp_path):
    model = MODELS[name](tmp_path).eval()
    batch = example_inputs(model)
    shapes = {name: {0: torch.export.Dim("batch")} for name in batch}
    program = torch.export.export(model, (), batch, dynamic_shapes=shapes)
    other = example_inputs(model, rows=5)
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, atol=1e-5, rtol=1e-5)
