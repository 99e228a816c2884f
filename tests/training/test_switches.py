"""Switches of transformers and timm that change speed or memory, and nothing else."""

from __future__ import annotations

import pytest
import torch
from export_onnx import example_inputs
from small_run import make_model, make_trainer, weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.adapters import add_adapters
from etf_adapt.models.auto import ETFForSequenceClassification, adapt

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
TEXT_MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "decoder": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)),
}


def trained(folder, **settings):
    trainer = make_trainer(folder, num_train_epochs=2, **settings)
    trainer.train()
    return weights(trainer)


def test_gradient_checkpointing_gives_the_same_weights_bit_for_bit(tmp_path):
    plain = trained(tmp_path / "plain")
    checkpointed = trained(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


def test_gradient_checkpointing_reaches_adapters_over_a_fixed_backbone(tmp_path):
    pytest.importorskip("peft", reason="needs the package of `.[peft]`")
    results = []
    for number, settings in enumerate(({}, {"gradient_checkpointing": True})):
        model = make_model()
        add_adapters(model, {"peft_type": "LORA", "r": 2})
        results.append(trained(tmp_path / str(number), model=model, **settings))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in results[0].items())


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_gradient_checkpointing_of_texts_gives_the_same_gradients(name):
    gradients = []
    for is_on in (False, True):
        torch.manual_seed(0)
        model = adapt(TEXT_MODELS[name](), 3, loss="dot_regression").train()
        if is_on:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)  # dropout
        with pytest.warns(UserWarning, match="random frame"):
            model(**example_inputs(model), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][key] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][key])


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("pooling", ["stock", "mean"])
def test_attention_implementations_agree(name, pooling, tmp_path):
    torch.manual_seed(0)
    TEXT_MODELS[name]().base_model.save_pretrained(tmp_path)
    logits = {}
    for attention in ("eager", "sdpa"):
        model = ETFForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, pooling=pooling, attn_implementation=attention
        ).eval()
        batch = example_inputs(model, rows=6)
        batch["attention_mask"][:3, 9:] = 0
        align_head(model, [{**batch, "labels": torch.arange(6) % 3}], frame="means")
        inner = model.encoder if pooling == "mean" else model
        assert inner.config._attn_implementation == attention
        logits[attention] = model(**batch).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=1e-4)


COMPILED = {
    **TEXT_MODELS,
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**{**SIZES, "vocab_size": None}, image_size=8, patch_size=4, hidden_dropout_prob=0.0)
    ),
    "timm cnn": lambda: TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=10)),
}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vit", "etf"),
        pytest.param("bert", "cosine", marks=pytest.mark.slow),
        pytest.param("decoder", "etf", marks=pytest.mark.slow),
        pytest.param("timm cnn", "etf", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_one_graph_with_the_same_loss_and_gradients(name, head):
    torch.manual_seed(0)
    model = adapt(COMPILED[name](), 3, head=head, loss="margin_dot_regression", class_counts=[9, 3, 1]).eval()
    batch = {**example_inputs(model, rows=6), "labels": torch.arange(6) % 3}
    align_head(model, [batch], frame="means")
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = run(**batch)
        output.loss.backward()
        results.append([output.logits, output.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 3
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_run_ends_as_the_plain_one(backend, tmp_path):
    settings = {"realign": "epochs", "leave_one_out": True}
    plain = trained(tmp_path / "plain", model=make_model(drop=0.0), **settings)
    torch._dynamo.reset()  # or what another test has compiled is taken
    torch._dynamo.utils.counters.clear()
    compiled = trained(
        tmp_path / "compiled",
        model=make_model(drop=0.0),
        torch_compile=True,
        torch_compile_backend=backend,
        **settings,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name.removeprefix("_orig_mod.")], tensor, atol=1e-4, rtol=1e-3)


def test_channels_last_agrees():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        config = TimmWrapperConfig(architecture="test_resnet", num_labels=10)
        model = adapt(TimmWrapperForImageClassification(config), 3, loss="dot_regression")
        model = model.to(memory_format=memory_format)
        batch = example_inputs(model, rows=6)
        images = batch["pixel_values"].to(memory_format=memory_format)
        align_head(model, [{"pixel_values": images, "labels": torch.arange(6) % 3}], frame="means")
        output = model.eval()(pixel_values=images, labels=torch.arange(6) % 3)
        output.loss.backward()
        stem = model.timm_model.stem.conv1 if hasattr(model.timm_model, "stem") else model.timm_model.conv1
        results.append((output.logits, next(stem.parameters()).grad))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other.contiguous(), atol=1e-4, rtol=1e-3)


def test_bfloat16_autocast_keeps_the_weights_in_float32_and_the_head_exact(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, realign="never")
    trainer.align()
    (head,) = head_modules(trainer.model).values()
    before = head.weight.detach().clone(), head.bias.detach().clone()
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert torch.equal(head.weight, before[0]) and torch.equal(head.bias, before[1])
    in_float32 = make_trainer(tmp_path / "float32", realign="never")
    in_float32.align()
    in_float32.train()
    losses = [next(entry["loss"] for entry in run.state.log_history) for run in (trainer, in_float32)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05
    scores = [run.evaluate()["eval_balanced_accuracy"] for run in (trainer, in_float32)]
    assert abs(scores[0] - scores[1]) <= 0.15  # three of 21 rows
