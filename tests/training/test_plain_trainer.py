"""Laws of our models in transformers' own Trainer: accumulation, resuming, the best checkpoint and shards are exact."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cases import rest_slow
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_utils import load_sharded_checkpoint

from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.auto import ETFForImageClassification, adapt

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ROWS, CLASSES = 24, 3


def vit(**head):
    """Its weights have other names on disk than in memory."""
    config = ViTConfig(**SIZES, image_size=8, patch_size=4, hidden_dropout_prob=0.1)
    return adapt(ViTForImageClassification(config), CLASSES, **head)


def cnn(**head):
    name = "timm/test_resnet.r160_in1k"
    return ETFForImageClassification.from_pretrained(name, num_labels=CLASSES, pretrained=False, **head)


def bert(**head):
    return adapt(BertForSequenceClassification(BertConfig(**SIZES, vocab_size=20)), CLASSES, **head)


def mixtral(**head):
    """Its experts are one tensor in memory and one a layer, expert and matrix on disk."""
    sizes = {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 20, "pad_token_id": 0}
    return adapt(MixtralForSequenceClassification(MixtralConfig(**SIZES, **sizes)), CLASSES, **head)


MAKERS = {"vit": vit, "cnn": cnn, "bert": bert, "mixtral": mixtral}
HEADS = [("cnn", "etf"), ("vit", "paper"), ("vit", "etf"), ("bert", "etf"), ("mixtral", "etf"), ("vit", "cosine")]


def rows(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    if name in ("vit", "cnn"):
        inputs = torch.randn(ROWS, 3, 8, 8, generator=generator) if name == "vit" else None
        inputs = torch.randn(ROWS, 3, 32, 32, generator=generator) if inputs is None else inputs
        key = "pixel_values"
    else:
        inputs, key = torch.randint(1, 20, (ROWS, 7), generator=generator), "input_ids"
    return [{key: row, "labels": int(label)} for row, label in zip(inputs, labels)]


def make_trainer(model, name, folder, *, callbacks=(), compute_metrics=None, **settings):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "seed": 5,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=rows(name),
        eval_dataset=rows(name, seed=1),
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
    )


def train(trainer, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ETF head is a random frame")
        trainer.train(*args, **kwargs)
    return weights(trainer.model)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def logits(model, name):
    inputs = rows(name, seed=1)
    key = next(iter(inputs[0]))
    return model.eval()(**{key: torch.stack([row[key] for row in inputs])}).logits


@pytest.mark.parametrize("name", rest_slow(["vit", "bert", "mixtral"], fast=1))
def test_accumulated_batches_are_one_big_batch(name, tmp_path):
    results = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = MAKERS[name]()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        before = weights(model)
        trainer = make_trainer(
            model, name, tmp_path, **settings, num_train_epochs=1, max_grad_norm=0.0, learning_rate=0.1
        )
        results.append(train(trainer))
        assert trainer.state.global_step == ROWS // 8 and not same(before, results[-1])
    for key, tensor in results[0].items():
        torch.testing.assert_close(results[1][key], tensor, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(("name", "head"), rest_slow(HEADS, fast=2))
def test_a_run_resumed_in_mid_epoch_ends_as_the_uninterrupted_one(name, head, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    model = MAKERS[name](head=head)
    whole = make_trainer(model, name, tmp_path, **settings)
    final = train(whole)
    assert whole.state.max_steps == 12
    checkpoint = tmp_path / "checkpoint-4"
    torch.manual_seed(77)
    other = MAKERS[name](head=head, seed=1)  # other weights, other frame: all must come from the checkpoint
    assert not same(weights(other), final)
    resumed = make_trainer(other, name, tmp_path / "again", **settings)
    assert same(train(resumed, resume_from_checkpoint=str(checkpoint)), final)
    assert resumed.state.global_step == 12
    fixed = head_modules(other)
    trainable = head == "cosine"
    assert all(module.weight.requires_grad == trainable for module in fixed.values())


class Record(TrainerCallback):
    """Keep the weights and logits that each evaluation saw."""

    def __init__(self, name):
        self.name, self.weights, self.logits = name, [], []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        training = model.training
        self.weights.append(weights(model))
        self.logits.append(logits(model, self.name))
        model.train(training)


@pytest.mark.parametrize(("name", "head"), rest_slow(HEADS, fast=2))
def test_the_best_checkpoint_comes_back_exactly(name, head, tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    record = Record(name)
    trainer = make_trainer(
        MAKERS[name](head=head),
        name,
        tmp_path,
        callbacks=[record],
        compute_metrics=lambda _: {"score": next(scores)},
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    final = train(trainer)
    assert trainer.state.best_global_step == 6 and len(record.weights) == 4
    assert same(final, record.weights[1]) and not same(final, record.weights[3])
    assert torch.equal(logits(trainer.model, name), record.logits[1])


@pytest.mark.parametrize("name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "mixtral"))])
def test_sharded_checkpoints_are_loaded_exactly(name, tmp_path):
    model = MAKERS[name]()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.manual_seed(77)
    other = MAKERS[name](seed=1)
    load_sharded_checkpoint(other, str(tmp_path), strict=False)
    assert same(weights(other), weights(model))
    assert torch.equal(logits(other, name), logits(model, name))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vit", "etf"),
        ("vit", "paper"),
        ("mixtral", "etf"),
    ],
)
def test_shards_come_in_any_order_and_split_anything(name, head, tmp_path):
    model = MAKERS[name](head=head)
    model.save_pretrained(tmp_path / "checkpoint-1")
    shards = list(load_file(tmp_path / "checkpoint-1" / "model.safetensors").items())
    parts_first = sorted(shards, key=lambda shard: ("experts" not in shard[0], shard[0]))
    for order in (parts_first, parts_first[::-1], shards[1::2] + shards[::2]):
        other = MAKERS[name](head=head, seed=1)
        for shard in order:
            other.load_state_dict(dict([shard]), strict=False)
        assert same(weights(other), weights(model))
        logits(other, name)


@pytest.mark.slow
def test_a_run_resumes_from_a_sharded_checkpoint(tmp_path, monkeypatch):
    save = ViTForImageClassification.save_pretrained
    monkeypatch.setattr(
        ViTForImageClassification,
        "save_pretrained",
        lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": "8KB"}),
    )
    settings = {"save_strategy": "steps", "save_steps": 4}
    final = train(make_trainer(vit(), "vit", tmp_path, **settings))
    checkpoint = tmp_path / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    torch.manual_seed(77)
    resumed = make_trainer(vit(seed=1), "vit", tmp_path / "again", **settings)
    assert same(train(resumed, resume_from_checkpoint=str(checkpoint)), final)


@pytest.mark.parametrize("name", rest_slow(MAKERS, fast=2))
def test_a_checkpoint_that_lacks_weights_is_not_trained_on(name, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    train(make_trainer(MAKERS[name](), name, tmp_path, **settings))
    file = Path(tmp_path, "checkpoint-4", "model.safetensors")
    state = load_file(file)
    heads = ("classifier.", "score.", "fc.")
    lost = sorted(key for key in state if not key.startswith(heads))[2]
    del state[lost]
    save_file(state, file, metadata={"format": "pt"})
    model = MAKERS[name]()
    trainer = make_trainer(model, name, tmp_path / "again", **{**settings, "max_steps": 8})
    with pytest.raises(RuntimeError, match=r"lack \d+ of this model's"):
        train(trainer, resume_from_checkpoint=str(file.parent))
    assert not list(Path(tmp_path, "again").glob("checkpoint-*"))


def test_evaluation_gives_the_loss_of_the_model(tmp_path):
    model = vit()
    found = make_trainer(model, "vit", tmp_path, per_device_eval_batch_size=ROWS).evaluate()["eval_loss"]
    labels = torch.tensor([row["labels"] for row in rows("vit", seed=1)])
    expected = model.compute_loss_from_logits(logits(model, "vit"), labels)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_of_trainer_does_not_pass_in_silence(tmp_path):
    trainer = make_trainer(vit(head="linear"), "vit", tmp_path, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        trainer.train()
