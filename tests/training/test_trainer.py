"""Laws of a run: one seed is one result, a stop changes nothing, what is fixed stays fixed, and no bad weight is saved."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from slow_cases import rest_slow
from small_run import NoisyRows, make_model, make_trainer, run_program, same, weights
from torch.utils.data import SequentialSampler
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from etf_adapt.data.image_dataset import ImageDataset
from etf_adapt.data.load import load_data
from etf_adapt.errors import DiskFullError
from etf_adapt.heads.in_model import batch_norms, has_dropout
from etf_adapt.models.auto import adapt
from etf_adapt.results import claim as claims
from etf_adapt.results.claim import read_run
from etf_adapt.training import resumable
from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.checkpoints import (
    complete_checkpoint,
    find_damage,
    list_checkpoints,
    read_run_of,
    read_state,
)
from etf_adapt.training.messages import describe_run
from etf_adapt.training.trainer import ETFTrainer


def make_resnet(head):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=10)
    return adapt(TimmWrapperForImageClassification(config), 3, head=head)


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_seed_another(tmp_path):
    results = []
    for number, seed in enumerate((3, 3, 4)):
        trainer = make_trainer(tmp_path / str(number), seed=seed, sampler="balanced")
        trainer.train()
        results.append(weights(trainer))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(
    ("step", "accumulation", "mixup", "realign"),
    rest_slow(
        [
            (9, 2, 0.4, "epochs"),
            (9, 2, 0.0, "steps"),
            (12, 1, 0.0, "steps"),
            (3, 1, 0.4, "epochs"),
            (9, 1, 0.0, "epochs"),
            (12, 1, 0.0, "epochs"),
            (3, 1, 0.0, "steps"),
            (9, 1, 0.4, "steps"),
        ],
        fast=3,
    ),
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, step, accumulation, mixup, realign):
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_total_limit": None,
        "per_device_train_batch_size": 16 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 3,
        "sampler": "sqrt",
        "realign": realign,
        "realign_steps": 4,  # a checkpoint every three steps lies between two alignments
        "mixup": mixup,
        "label_smoothing": 0.1,
    }
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    assert whole.state.max_steps == 18
    for path in list_checkpoints(tmp_path / "run"):
        if int(path.name.split("-")[1]) > step:
            path.rename(path.with_name(f"later-{path.name}"))
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.state.best_global_step == whole.state.best_global_step


@pytest.mark.parametrize("kind", rest_slow(["timm", "paper", "linear", "cosine"], fast=2))
def test_every_head_and_library_resumes_exactly(tmp_path, kind):
    settings = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no", "num_train_epochs": 2}

    def trainer():
        model = make_resnet("linear") if kind == "timm" else make_model(head=kind)
        return make_trainer(tmp_path / "run", model=model, save_total_limit=None, **settings)

    whole = trainer()
    whole.train()
    for step in (8, 12):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"later-{step}")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "sampler": "balanced",
        "num_train_epochs": 2,
    }
    run_program({**settings, "output_dir": str(tmp_path / "whole"), "record": str(tmp_path / "a")})
    run_program({**settings, "output_dir": str(tmp_path / "killed"), "kill_at": 9}, killed=True)
    run_program({**settings, "output_dir": str(tmp_path / "killed"), "resume": True, "record": str(tmp_path / "b")})
    assert same(*(load_file(tmp_path / name / "weights.safetensors") for name in "ab"))
    whole, resumed = (json.loads((tmp_path / name / "0.json").read_text()) for name in "ab")
    assert resumed["rows"] == whole["rows"][8:]
    assert resumed["metrics"] == whole["metrics"]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path / "run", num_train_epochs=3, save_total_limit=None)
    trainer.train()
    (tmp_path / "run" / "checkpoint-18" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "run" / "checkpoint-12" / "model.safetensors").unlink()
    resumed = make_trainer(tmp_path / "run", num_train_epochs=3, save_total_limit=None)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(trainer), weights(resumed))
    assert not any(map(find_damage, list_checkpoints(tmp_path / "run")))


@pytest.mark.slow
def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    # With a learning rate of zero no evaluation is better than the first.
    settings = {"learning_rate": 0.0, "early_stopping_patience": 2, "num_train_epochs": 9, "save_total_limit": None}
    trainer = make_trainer(tmp_path / "run", **settings)
    trainer.train()
    assert trainer.state.epoch == 3
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == 3
    (tmp_path / "run" / "checkpoint-18").rename(tmp_path / "later")
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == 3


def test_of_equally_good_checkpoints_the_latest_is_the_best(tmp_path):
    trainer = make_trainer(tmp_path / "run", early_stopping_patience=9)
    name = "eval_balanced_accuracy_pooled"
    seen = []
    for step, score in enumerate((0.5, 0.9, 0.9, 0.8)):
        trainer.state.global_step = step
        trainer._determine_best_metric({name: score}, None)
        seen.append((trainer.state.best_global_step, trainer.misses))
    assert seen == [(0, 0), (1, 0), (2, 1), (2, 2)]  # an equal one is no progress for early stopping


def test_a_finished_run_trains_no_step_more(tmp_path):
    trainer = make_trainer(
        tmp_path / "run", max_steps=8, save_strategy="steps", save_steps=4, load_best_model_at_end=False
    )
    trainer.train()
    resumed = make_trainer(
        tmp_path / "run", max_steps=8, save_strategy="steps", save_steps=4, load_best_model_at_end=False
    )
    assert resumed.train(resume_from_checkpoint=True).global_step == 8
    assert same(weights(trainer), weights(resumed))


def test_a_run_is_not_resumed_with_another_draw(tmp_path):
    make_trainer(tmp_path / "run", sampler="balanced").train()
    with pytest.raises(ValueError, match=r"sampler 'balanced', and this run has 'instance'"):
        make_trainer(tmp_path / "run").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("a flipped bit", "model.safetensors is damaged or was changed"),
        ("another run", "it belongs to another run"),
        ("removed", "there is no such folder"),
    ],
)
def test_a_best_checkpoint_that_cannot_be_used_is_told_and_the_last_weights_stay(tmp_path, capsys, harm, reason):
    class Harm(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < 18:
                return
            last.append(weights(trainer))
            best = Path(state.best_model_checkpoint)
            if harm == "a flipped bit":
                content = bytearray((best / "model.safetensors").read_bytes())
                content[-1] ^= 1
                (best / "model.safetensors").write_bytes(content)
            elif harm == "another run":
                complete_checkpoint(best, read_state(best), run="another")
            else:
                shutil.rmtree(best)

    last = []
    trainer = make_trainer(tmp_path / "run", callbacks=(Harm(),), save_total_limit=None, num_train_epochs=3)
    scores = iter((0.5, 0.9, 0.7))
    evaluate = trainer._evaluate
    trainer._evaluate = lambda *args: evaluate(*args) | {"eval_balanced_accuracy_pooled": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 12 and same(last[0], weights(trainer))
    said = capsys.readouterr().out
    assert f"checkpoint-12, the best by balanced_accuracy_pooled, cannot be used: {reason}. Step 18 is kept" in said


@pytest.mark.parametrize("where", ["weights", "optimizer", "mark"])
def test_a_full_disk_is_one_line_and_earlier_checkpoints_are_whole(tmp_path, monkeypatch, where):
    trainer = make_trainer(tmp_path / "run", num_train_epochs=3, save_total_limit=None)
    owner, name, error = {
        "weights": (trainer.model, "save_pretrained", OSError(28, "No space left on device")),
        "optimizer": (trainer, "_save_optimizer_and_scheduler", RuntimeError("unexpected pos 64: file write failed")),
        "mark": (resumable.checkpoints, "complete_checkpoint", OSError(122, "Disk quota exceeded")),
    }[where]
    write, calls = getattr(owner, name), iter(range(9))

    def full(*args, **kwargs):
        if next(calls) == 2:
            raise error
        return write(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(DiskFullError, match=r"checkpoint-18 cannot .* [\d,]+ bytes; [\d,]+ are free .*-12 is whole"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6", "checkpoint-12"]
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path / "run"))


def test_a_trainer_holds_its_folder_while_it_trains(tmp_path):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            held.append(tmp_path / "run" in claims._held)

    held = []
    make_trainer(tmp_path / "run", num_train_epochs=1, callbacks=(Watch(),)).train()
    assert set(held) == {True} and tmp_path / "run" not in claims._held
    assert read_run_of(tmp_path / "run" / "checkpoint-6") == read_run(tmp_path / "run")


def test_a_new_run_does_not_touch_an_older_one(tmp_path):
    make_trainer(tmp_path / "run").train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="holds checkpoint-12 of an earlier run"):
        make_trainer(tmp_path / "run").train()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_no_pickle_of_the_arguments_is_left(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "finished"))
    assert not list(tmp_path.rglob("training_args.bin"))
    assert (tmp_path / "finished" / "model.safetensors").is_file()
    assert not list((tmp_path / "finished").glob("*.pt*")) and not list((tmp_path / "finished").glob("*.bin"))


def test_the_log_has_each_epoch_once_after_a_resume(tmp_path):
    trainer = make_trainer(tmp_path / "run", save_total_limit=None)
    trainer.train()
    (tmp_path / "run" / "checkpoint-12").rename(tmp_path / "later")
    make_trainer(tmp_path / "run", save_total_limit=None).train(resume_from_checkpoint=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1.0, 2.0]
    assert all("loss" in line and "eval_balanced_accuracy" in line for line in lines)


def test_the_fixed_head_stays_fixed_and_out_of_the_optimizer(tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run", realign="never")
    trainer.model.requires_grad_(True)
    trainer.train()
    ((path, head),) = trainer.heads.items()
    assert "fixed again" in capsys.readouterr().out and path
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not held & {id(parameter) for parameter in head.parameters()}
    fresh = make_trainer(tmp_path / "other", realign="never")
    fresh.align()
    assert torch.equal(head.weight, next(iter(fresh.heads.values())).weight)


def test_a_trained_head_has_its_own_learning_rate(tmp_path):
    model = make_model(head="linear")
    trainer = make_trainer(tmp_path, model=model, head_learning_rate=0.25, learning_rate=0.125)
    optimizer = trainer.create_optimizer()
    head = {id(parameter) for parameter in next(iter(trainer.heads.values())).parameters()}
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert {rates[key] for key in head} == {(0.25, trainer.args.weight_decay), (0.25, 0.0)}
    assert {rate for key, (rate, _) in rates.items() if key not in head} == {0.125}


@pytest.mark.parametrize(("head", "rate"), [("linear", 1.25), ("cosine", 1.25), ("etf", None), ("paper", None)])
def test_a_trained_head_learns_ten_times_as_fast_unless_told(tmp_path, head, rate):
    trainer = make_trainer(tmp_path, model=make_model(head=head), learning_rate=0.125)
    optimizer = trainer.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == ({0.125} if rate is None else {0.125, rate})
    said = describe_run(trainer)[3]
    assert "learning rate 0.125" in said and ("of the head 1.25" in said) == (rate is not None)


def test_a_frozen_backbone_trains_the_head_alone(tmp_path):
    model = make_model(head="linear")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path / "run", model=model, freeze="backbone")
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    path = next(iter(trainer.heads))
    assert changed == {f"{path}.weight", f"{path}.bias"}
    with pytest.raises(ValueError, match="leaves nothing to train"):
        make_trainer(tmp_path / "none", freeze="backbone").train()


def test_without_epochs_the_head_is_aligned_only_and_the_run_says_so(tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run", freeze="backbone", num_train_epochs=0)
    trainer.train()
    assert trainer.alignment["frame"] == "whitened"
    assert "trained: nothing; the head is set in closed form alone, as etf-adapt refit" in capsys.readouterr().out
    assert trainer.evaluate()["eval_balanced_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("realign", "unnoted", "changed"),
    rest_slow(
        [
            ("steps", {}, [4, 6, 8, 12]),  # every four, and at the ends of epochs
            ("steps", {"mixup": 0.2}, [6, 12]),  # what is read of mixed rows is that of none
            ("never", {}, []),
            ("epochs", {}, [6, 12]),
        ],
        fast=2,
    ),
)
def test_the_head_changes_when_it_is_aligned_again(tmp_path, realign, unnoted, changed):
    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.head = next(iter(trainer.heads.values())).weight.detach().clone()

        def on_step_end(self, args, state, control, **kwargs):
            head = next(iter(trainer.heads.values())).weight.detach().clone()
            if not torch.equal(head, self.head):
                steps.append(state.global_step)
            self.head = head

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            assert {len(rows.features) for rows in trainer._training_logits.rows.values()} <= {88}

    steps, settings = [], {"eval_strategy": "no", "save_strategy": "no", "realign": realign, "realign_steps": 4}
    trainer = make_trainer(tmp_path, callbacks=(Watch(),), **settings, **unnoted)
    trainer.train()
    assert trainer.state.max_steps == 12 and steps == changed


def test_without_dropout_all_but_the_head_is_in_evaluation_mode(tmp_path):
    model = make_trainer(tmp_path).model
    assert {module.training for module in model.train().modules() if "Drop" in type(module).__name__} == {False}
    assert model.training and model.classifier.training
    model.gradient_checkpointing_enable()
    assert any(layer.training for layer in model.train().vit.modules()), "layers that compute activations again"
    assert has_dropout(make_model()) and not has_dropout(make_model(drop=0.0)) and not has_dropout(model)
    model = make_trainer(tmp_path, dropout="model").model
    assert {module.training for module in model.train().modules()} == {True}


@pytest.mark.parametrize("dropout", [None, "model"])
def test_what_training_reads_of_a_row_is_what_evaluation_would_without_dropout(tmp_path, dropout):
    settings = {"eval_strategy": "no", "save_strategy": "no", "learning_rate": 0.0, "realign": "steps", "max_steps": 4}
    trainer = make_trainer(tmp_path, dropout=dropout, **settings)
    trainer.align()
    (rows,) = trainer._training_logits.rows.values()
    before = rows.features.clone()
    trainer.train()
    (rows,) = trainer._training_logits.rows.values()
    assert torch.allclose(rows.features, before, rtol=1e-4, atol=1e-4), "the last alignment is a pass"
    noted = []
    rows.note = lambda ids, features: noted.append((ids, features))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(16)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    ((ids, features),) = noted
    kept = before[torch.searchsorted(rows.row_ids, ids)]
    assert torch.allclose(features, kept, rtol=1e-4, atol=1e-4) is (dropout is None)


@pytest.mark.parametrize(
    ("head", "settings", "when"),
    [
        ({}, {}, "steps"),
        ({}, {"dropout": "model"}, "epochs"),
        ({"drop": 0.0}, {"dropout": "model"}, "steps"),
        ({}, {"realign": "steps"}, "steps"),
        ({}, {"realign": "epochs"}, "epochs"),
        ({}, {"realign": "never"}, "never"),
        ({}, {"frame": "random"}, "never"),
        ({"trainable": True}, {}, "never"),
        ({"head": "cosine"}, {}, "never"),
        ({"head": "paper"}, {}, "never"),
    ],
)
def test_a_fixed_head_that_is_made_from_features_is_aligned_again_in_training(tmp_path, head, settings, when):
    assert make_trainer(tmp_path, model=make_model(**head), **settings).realignment == when


@pytest.mark.parametrize("kind", ["linear", "cosine", "etf"])
def test_a_head_of_any_kind_can_be_refitted_after_training(tmp_path, kind):
    trainer = make_trainer(tmp_path, model=make_model(head=kind), final_frame="means", num_train_epochs=1)
    trainer.train()
    ((_, head),) = trainer.heads.items()
    before = head.weight.detach().clone()
    assert trainer.alignment["frame"] == head.frame == "means"
    trainer.align("means")
    torch.testing.assert_close(head.weight, before)
    assert trainer.evaluate()["eval_balanced_accuracy"] > 0.5


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_what_is_not_finite_ends_the_run_unsaved(tmp_path, where):
    trainer = make_trainer(tmp_path / "run", num_train_epochs=4)
    step = trainer.training_step
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)

    def poisoned(model, inputs, num_items_in_batch=None):
        if trainer.state.global_step == 11:
            if where == "loss":
                inputs = {**inputs, "pixel_values": inputs["pixel_values"] * math.nan}
            else:
                loss = step(model, inputs, num_items_in_batch)
                parameter.grad.fill_(math.inf)
                return loss
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = poisoned
    trainer.args.max_grad_norm = 0.0
    with pytest.raises(FloatingPointError, match=r"not finite|no longer finite"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    assert all(
        bool(torch.isfinite(v).all()) for v in load_file(tmp_path / "run/checkpoint-6/model.safetensors").values()
    )


def test_an_accelerator_is_not_waited_for_at_every_step(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.state.logging_steps, read = 3, {"cpu": [], "meta": []}
    for device, steps in read.items():
        for trainer.state.global_step in range(7):
            if trainer._looks_at(torch.zeros((), device=device)):
                steps.append(trainer.state.global_step)
    assert read == {"cpu": [*range(7)], "meta": [0, 3, 6]}


@pytest.mark.filterwarnings("ignore:The ETF head is a random frame")
@pytest.mark.parametrize("frame", ["random", "whitened"])
def test_two_uneven_classes_are_learned(tmp_path, frame):
    trainer = make_trainer(
        tmp_path / "run", counts=(100, 5), eval_counts=(40, 40), frame=frame, num_train_epochs=6, sampler="balanced"
    )
    before = trainer.evaluate()["eval_balanced_accuracy"] if frame == "random" else None
    trainer.train()
    after = trainer.evaluate()["eval_balanced_accuracy"]
    assert after > 0.85 and (before is None or after > before)


def test_evaluation_counts_each_row_once(tmp_path):
    trainer = make_trainer(tmp_path, eval_counts=(9, 5, 3), per_device_eval_batch_size=4)
    rows = NoisyRows((9, 5, 3), seed=1)
    output = trainer.predict(rows)
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values=rows.images).logits
    np.testing.assert_allclose(output.predictions, logits, atol=1e-6)
    assert output.metrics["test_accuracy"] == np.mean(logits.argmax(-1).numpy() == rows.labels)
    assert math.isclose(
        output.metrics["test_loss"],
        torch.nn.functional.cross_entropy(logits, torch.tensor(rows.labels)).item(),
        rel_tol=1e-5,
    )


def test_what_does_not_fit_is_known_before_training(tmp_path):
    with pytest.raises(ValueError, match="has label 2, but the head has 2 classes: load the model with num_labels=3"):
        make_trainer(tmp_path, model=make_model(2))
    with pytest.raises(ValueError, match="sets the class vectors anew"):
        make_trainer(tmp_path, model=make_model(head="linear"), realign="epochs")
    with pytest.raises(ValueError, match="has no head and loss of etf_adapt"):
        make_trainer(tmp_path, model=ViTForImageClassification(ViTConfig(hidden_size=12, num_hidden_layers=1)))
    with pytest.raises(ValueError, match="has 3 entries: give one for each row"):
        ETFTrainer(
            make_model(), ETFTrainingArguments(str(tmp_path)), train_dataset=NoisyRows((2, 2, 2), 0), labels=[0, 1, 2]
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("head", "asked", "moves"), [("etf", None, False), ("linear", None, True), ("linear", "frozen", False)]
)
def test_statistics_of_batch_norm_stay_under_a_fixed_head(tmp_path, head, asked, moves):
    model = make_resnet(head)
    norm = batch_norms(model)[0]
    fresh = norm.running_mean.clone()
    make_trainer(tmp_path, model=model, batch_norm=asked, max_steps=2, eval_strategy="no", save_strategy="no").train()
    assert torch.equal(norm.running_mean, fresh) != moves


def test_moving_statistics_under_an_aligned_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`batch_norm` \(='train'\) moves the features away"):
        make_trainer(tmp_path, model=make_resnet("etf"), batch_norm="train")
    assert make_trainer(tmp_path, model=make_resnet("etf"), batch_norm="train", frame="random").batch_norm == "train"
    assert make_trainer(tmp_path).batch_norm == "none"


def noisy(image):
    """Transform an image at random; a function of the module, so that workers can be given it."""
    pixels = pil_to_tensor(image).float() / 16
    return pixels + torch.randn(pixels.shape)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    data = load_data("digits", max_train_rows=120)
    trained = []
    for workers in (0, 2):
        model = make_model(10)
        args = ETFTrainingArguments(
            output_dir=str(tmp_path / str(workers)), num_train_epochs=2, per_device_train_batch_size=16, sampler="balanced",
            eval_strategy="no", save_strategy="no", dataloader_num_workers=workers,
            torch_threads=1,
        )  # fmt: skip
        trainer = ETFTrainer(model, args, train_dataset=ImageDataset(data.train, noisy, seed=0))
        trainer.train()
        trained.append(weights(trainer))
    assert same(*trained)


class PadTokens:
    def __call__(self, rows):
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("label", "row_id")}
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        return {
            "input_ids": tokens,
            "attention_mask": (tokens > 0).long(),
            "labels": batch["label"],
            "row_id": batch["row_id"],
        }


def texts(counts, seed):
    """Rows of 3 to 30 tokens, those of class c mostly c + 1."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    rows = [np.where(generator.random(size) < 0.6, label + 1, generator.integers(1, 20, size)).tolist()
            for label, size in zip(labels, generator.integers(3, 31, len(labels)))]  # fmt: skip
    return Dataset.from_dict(
        {"input_ids": rows, "length": [len(row) for row in rows], "label": labels, "row_id": range(len(rows))}
    )


def test_texts_are_batched_by_length_and_learned(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = adapt(BertForSequenceClassification(BertConfig(**sizes, vocab_size=20)), 3)
    args = ETFTrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=3e-3,
        torch_threads=1,
    )
    train = texts((80, 30, 10), 0)
    trainer = ETFTrainer(
        model, args, train_dataset=train, eval_dataset=texts((20, 20, 20), 1), data_collator=PadTokens()
    )
    padded = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    assert len(set(padded)) > 5 and np.mean(padded) < 20
    evaluated = [batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader()]
    aligned = [batch["input_ids"].shape[1] for batch in trainer.rows_loader(trainer.alignment_dataset)]
    assert np.mean(evaluated) < 20 and np.mean(aligned) < 20
    trainer.train()
    assert trainer.state.best_metric > 0.7
    by_length = trainer.evaluate()
    numbered = trainer.eval_dataset
    trainer.eval_dataset = numbered.remove_columns("length")
    in_order = trainer.evaluate()
    assert in_order["eval_balanced_accuracy"] == by_length["eval_balanced_accuracy"]
    assert in_order["eval_loss"] == pytest.approx(by_length["eval_loss"], rel=1e-5)
    trainer.eval_dataset = numbered.remove_columns("row_id")  # what numbers rows as they come needs their order
    assert isinstance(trainer._get_eval_sampler(trainer.eval_dataset), SequentialSampler)


def test_the_draw_counts_the_whole_batch(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=8, sampler="balanced")
    loader = trainer.get_train_dataloader()
    assert len(loader) * 8 == len(trainer._train_sampler) == 96  # 88 rows, in whole batches of 24
    drawn = trainer.train_labels[np.concatenate([batch["row_id"] for batch in loader])]
    assert np.bincount(drawn).tolist() == [32, 32, 32]


def test_smoothing_in_soft_labels_is_the_models_own_loss(tmp_path):
    trainer = make_trainer(tmp_path, label_smoothing=0.3)
    images, labels = (
        torch.stack([trainer.train_dataset[row]["pixel_values"] for row in range(4)]),
        torch.tensor([0, 1, 2, 0]),
    )
    batch = {"pixel_values": images, "labels": labels, "row_id": torch.arange(4)}
    model = trainer.model.eval()
    soft = torch.full((4, 3), 0.1) + 0.7 * torch.eye(3)[labels]
    expected = model.compute_loss_from_logits(model(pixel_values=images).logits, soft)
    assert torch.allclose(trainer.compute_loss(model, dict(batch)), expected)
