"""Laws of adapters: they alone are trained, the head stays what it is, and what is saved is a stock folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from export_onnx import example_inputs
from small_run import make_model, make_trainer, weights
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.inference.predictions import load_stock
from etf_adapt.models.adapters import add_adapters, has_adapters, merge_adapters
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.swap import swap_head
from etf_adapt.training.parameters import fix_parameters

pytest.importorskip("peft", reason="needs the package of `.[peft]`")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
SMALL = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def timm_model(name, **head):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=10, model_args={"img_size": 64} if "vit" in name else {})
    return adapt(TimmWrapperForImageClassification(config), 3, **head)


def mean_pooled(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "encoder")
    return ETFForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3, pooling="mean")


GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "pad_token_id": 0}
MODELS = {
    "vit": lambda _: make_model(head="linear"),
    "timm vit": lambda _: timm_model("test_vit"),
    "timm cnn": lambda _: timm_model("test_resnet"),
    "bert": lambda _: adapt(BertForSequenceClassification(BertConfig(**SIZES)), 3, head="cosine"),
    "decoder": lambda _: adapt(LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)), 3),
    "gpt2": lambda _: adapt(GPT2ForSequenceClassification(GPT2Config(**GPT2)), 3),
    "mean of tokens": mean_pooled,
}


def move(model):
    """Give the adapters weights that do something: LoRA begins with an update of zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_alone_are_trained_and_a_merge_keeps_the_logits(name, tmp_path):
    model = MODELS[name](tmp_path).eval()
    batch = example_inputs(model)
    before, heads = model(**batch).logits, head_modules(model)
    paths = add_adapters(model, SMALL)
    assert has_adapters(model) and torch.equal(model(**batch).logits, before), "LoRA begins where the model is"
    assert head_modules(model) == heads and not set(paths) & set(heads)
    kind = nn.Conv2d if name == "timm cnn" else (nn.Linear, nn.Module)
    assert all(isinstance(model.get_submodule(path).get_base_layer(), kind) for path in paths)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    of_heads = {key for key in trained if key.startswith(tuple(heads))}
    assert trained - of_heads == {key for key, _ in model.named_parameters() if "lora_" in key}
    assert bool(of_heads) == any(head.trainable for head in heads.values())
    assert not any("pooler" in path for path in paths) or name == "bert"
    move(model)
    moved = model(**batch).logits
    assert not torch.allclose(moved, before, atol=1e-3)
    assert merge_adapters(model) == paths and not has_adapters(model) and not hasattr(model, "peft_config")
    torch.testing.assert_close(model(**batch).logits, moved, atol=1e-5, rtol=1e-4)
    assert merge_adapters(model) == []


@pytest.mark.parametrize("name", ["vit", "timm vit", "bert", "decoder"])
def test_the_recipes_file_reaches_the_two_or_three_layers_of_each_mlp(name, tmp_path):
    model = MODELS[name](tmp_path)
    inside = [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "attention" not in path
    ]
    mlp = {path for path in inside if re.search(r"\.mlp\.|\.intermediate\.|layer\.\d\.output", path)}
    assert set(add_adapters(model, Path(__file__).parents[2] / "recipes/adapters/mlp.json")) == mlp and mlp


def test_plain_timm_models_have_them_too():
    model = swap_head(timm.create_model("test_vit", img_size=64), 3)
    paths = add_adapters(model)
    assert "head" not in paths and "blocks.0.attn.qkv" in paths
    assert isinstance(model.head, ClassifierHead) and not model.head.weight.requires_grad


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "lora", "r": 2, "use_dora": True},
        {"peft_type": "LOHA", "r": 2},
        {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
        {"peft_type": "C3A", "block_size": 4, "target_modules": ["q_proj"]},
        {"peft_type": "IA3", "target_modules": ["q_proj", "fc1"], "feedforward_modules": ["fc1"]},
    ],
    ids=["dora", "loha", "all-linear", "without exclusions", "ia3"],
)
def test_other_configurations_are_taken_from_a_file(config, tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    model = make_model(drop=0.0).eval()
    batch, before = example_inputs(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = add_adapters(model, tmp_path / "adapter.json")
    assert paths and "classifier" not in paths
    logits = model(**batch).logits
    merge_adapters(model)
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-4)
    assert model.state_dict().keys() == before.keys()


def test_a_configuration_that_peft_has_written_trains_again(tmp_path):
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True)
    written.save_pretrained(tmp_path)
    model = make_model()
    add_adapters(model, tmp_path / "adapter_config.json")
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_adapters_over_half_precision_are_trained_in_float32():
    model = make_model().bfloat16()
    add_adapters(model, SMALL)
    assert fix_parameters(model) == []
    dtypes = {("lora_" in name): parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_adapters_of_a_frozen_backbone_are_refused():
    model = make_model(head="linear")
    add_adapters(model, SMALL)
    with pytest.raises(ValueError, match=r"`freeze` \(='backbone'\) would fix the adapters' layers"):
        fix_parameters(model, freeze="backbone")


def test_a_run_does_not_go_on_with_other_adapters(tmp_path):
    make_run(tmp_path).train()
    for settings in ({**SMALL, "r": 4}, None):
        model = make_model()
        if settings:
            add_adapters(model, settings)
        with pytest.raises(ValueError, match="trained parameters"):
            make_trainer(tmp_path, model=model).train(resume_from_checkpoint=True)


def make_run(folder, **settings):
    model = make_model()
    add_adapters(model, SMALL)
    return make_trainer(folder, model=model, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
                        save_total_limit=None, load_best_model_at_end=False, **settings)  # fmt: skip


def test_a_run_trains_nothing_else_resumes_exactly_and_leaves_a_stock_folder(tmp_path):
    whole = make_run(tmp_path / "whole")
    before = weights(whole)
    whole.train()
    after = weights(whole)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "lora_" in name} | {"classifier.weight", "classifier.bias"}, "aligned"
    assert whole.heads["classifier"].frame == "whitened"
    resumed = make_run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(resumed).items())

    model = whole.model.eval()
    batch = example_inputs(model)
    model.save_pretrained(tmp_path / "out")
    assert has_adapters(model), "saving changes nothing"
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    back = ETFForImageClassification.from_pretrained(tmp_path / "out")
    for other in (stock, back):
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)
    assert back.etf_settings["head"]["frame"] == "whitened" and not back.etf_settings["adapters"]
    for load in (ETFForImageClassification.from_pretrained, lambda folder: load_stock(folder, "image")):
        with pytest.raises(ValueError, match="training checkpoint with adapters"):
            load(tmp_path / "whole" / "checkpoint-3")
    with pytest.raises(ValueError, match="no stock class has this classifier"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "whole" / "checkpoint-3")


def test_the_best_checkpoint_comes_back(tmp_path):
    model = make_model()
    add_adapters(model, SMALL)
    trainer = make_trainer(tmp_path, model=model, num_train_epochs=3)
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_balanced_accuracy_pooled"] == pytest.approx(best)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("loar", "neither 'lora' nor a JSON file"),
        ({**SMALL, "modules_to_save": ["classifier"]}, "`modules_to_save`"),
        ({**SMALL, "target_modules": ["classifier"]}, "no configuration for this model"),
        ({**SMALL, "target_modules": ["no_such_layer"]}, "no configuration for this model"),
        ({"peft_type": "LURA"}, "no configuration for this model"),
        ({**SMALL, "target_modules": ["q_proj", "layernorm_before"]}, "no configuration for this model"),
        ({"r": 4}, "names no `peft_type`"),
        ({**SMALL, "rank": 3}, "no configuration for this model"),
    ],
    ids=["name", "modules_to_save", "head", "layer", "kind", "half way", "no kind", "argument"],
)
def test_what_cannot_be_is_refused_in_one_message(config, words):
    model = make_model()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        add_adapters(model, config)
    assert not has_adapters(model) and list(head_modules(model)) == ["classifier"]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 2}'])
def test_a_file_that_is_no_configuration_is_refused(text, tmp_path):
    (tmp_path / "adapter.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter\.json"):
        add_adapters(make_model(), tmp_path / "adapter.json")


def test_models_without_our_head_and_adapters_twice_are_refused():
    with pytest.raises(ValueError, match="no head"):
        add_adapters(timm.create_model("test_vit"))
    model = make_model()
    add_adapters(model)
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(model)
