"""Laws of resuming: what is announced, recorded and used is one; what the checkpoint would override is refused."""

from __future__ import annotations

import pytest
from slow_cases import rest_slow
from small_run import make_model, make_trainer, same, weights
from transformers import TrainerCallback

from etf_adapt.models.adapters import add_adapters
from etf_adapt.training.arguments import FIXED_ON_RESUME, LENGTH
from etf_adapt.training.checkpoints import list_checkpoints

OTHER = {
    "learning_rate": 1e-3, "head_learning_rate": 1e-3, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 1},
    "warmup_steps": 3, "max_grad_norm": 0.5, "optim": "sgd", "optim_args": "a=1", "optim_target_modules": "all-linear",
    "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3, "neftune_noise_alpha": 1.0,
    "mixup": 0.1, "cutmix": 0.1, "label_smoothing": 0.1, "batch_norm": "frozen", "frame": "means", "frame_penalty": 0.5,
    "dropout": "model", "realign": "steps", "realign_steps": 3, "leave_one_out": False,
    "metric_for_best_model": "loss", "shot_bounds": [5, 9], "min_validation_rows": 2, "freeze": "backbone",
    "sampler": "sqrt", "train_sampling_strategy": "random", "seed": 1, "per_device_train_batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("begun")
    make_trainer(folder / "run", num_train_epochs=1).train()
    return list_checkpoints(folder / "run")[-1]


@pytest.mark.parametrize("name", OTHER)
def test_a_run_is_not_resumed_with_another_setting(name, begun, tmp_path):
    before = make_trainer(tmp_path / "a", num_train_epochs=1).draw_settings()
    resumed = make_trainer(tmp_path / "b", num_train_epochs=1, **{name: OTHER[name]})
    spoken = {"per_device_train_batch_size": "batch size"}.get(name, name)
    with pytest.raises(
        ValueError, match=f"was written with {spoken} .*, and this run has .* Resume with the same settings"
    ):
        resumed.restore(begun)
    assert {*FIXED_ON_RESUME} < before.keys() and {*FIXED_ON_RESUME} < OTHER.keys()


def test_nor_with_another_model(begun, tmp_path):
    models = {
        "loss": {"loss": "dot_regression"},
        "head": {"head": "linear", "trainable": False},
        "config.hidden_dropout_prob": {"drop": 0.2},
    }
    for name, settings in models.items():
        with pytest.raises(ValueError, match=f"was written with {name} "):
            make_trainer(tmp_path, num_train_epochs=1, model=make_model(**settings)).restore(begun)


def test_weights_of_classes_are_the_same_in_any_sequence(tmp_path):
    loss = {"name": "cross_entropy", "class_weights": (1.0, 2.0, 3.0)}
    settings = {"num_train_epochs": 1}
    make_trainer(tmp_path, model=make_model(head="linear", loss=loss), **settings).train()
    make_trainer(tmp_path, model=make_model(head="linear", loss=loss), **settings).restore(
        list_checkpoints(tmp_path)[-1]
    )


def test_nor_with_other_adapters(tmp_path):
    pytest.importorskip("peft", reason="needs the package of `.[peft]`")

    def trainer(alpha):
        model = make_model()
        add_adapters(model, {"peft_type": "LORA", "r": 2, "lora_alpha": alpha})
        return make_trainer(tmp_path / "run", num_train_epochs=1, model=model)

    trainer(4).train()
    with pytest.raises(ValueError, match="was written with peft lora_alpha 4, and this run has 8"):
        trainer(8).train(resume_from_checkpoint=True)


class Rates(TrainerCallback):
    """Keep the learning rate of each step."""

    def __init__(self):
        self.used = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.used[state.global_step] = optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("schedule", rest_slow(["cosine", "constant", "linear", "constant_with_warmup"], fast=1))
def test_a_longer_run_follows_the_schedule_of_its_length_and_says_so(schedule, tmp_path, capsys):
    settings = {"lr_scheduler_type": schedule, "load_best_model_at_end": False, "realign": "epochs"}
    whole_rates, resumed_rates = Rates(), Rates()
    whole = make_trainer(tmp_path / "whole", num_train_epochs=2, callbacks=(whole_rates,), **settings)
    whole.train()
    make_trainer(tmp_path / "run", num_train_epochs=1, **settings).train()
    resumed = make_trainer(tmp_path / "run", num_train_epochs=2, callbacks=(resumed_rates,), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed_rates.used == {step: whole_rates.used[step] for step in range(6, 12)}
    line = "`num_train_epochs` was 1 and is 2: the learning rate follows the schedule of the new length from here on"
    assert capsys.readouterr().out.count(line) == 1
    assert same(weights(whole), weights(resumed)) == (schedule == "constant")
    assert set(LENGTH) == {"num_train_epochs", "max_steps"}


def test_steps_of_logging_evaluation_and_saving_are_those_of_the_arguments(begun, tmp_path):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "logging_strategy": "steps"}
    often = {"eval_steps": 4, "save_steps": 4, "logging_steps": 4}
    make_trainer(tmp_path / "run", num_train_epochs=1, load_best_model_at_end=False, **steps, **often).train()
    rarely = {"eval_steps": 3, "save_steps": 9, "logging_steps": 5, "save_total_limit": None}
    trainer = make_trainer(tmp_path / "run", num_train_epochs=2, load_best_model_at_end=False, **steps, **rarely)
    trainer.train(resume_from_checkpoint=True)
    later = [entry for entry in trainer.state.log_history if entry["step"] > 6]
    assert [entry["step"] for entry in later if "eval_loss" in entry] == [9, 12]
    assert [entry["step"] for entry in later if "loss" in entry] == [10]
    assert [path.name for path in list_checkpoints(tmp_path / "run")][-2:] == ["checkpoint-9", "checkpoint-12"]
