"""Laws of the settings: what would bypass loss, draw or evaluation is mapped or refused before anything is read."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from slow_cases import rest_slow
from small_run import make_model, make_trainer, same, weights
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from etf_adapt.geometry.closed_form import FRAMES
from etf_adapt.training.arguments import (
    FIXED_ON_RESUME,
    LENGTH,
    REFUSED,
    REFUSED_ACCELERATOR,
    WITHOUT_EFFECT,
    ETFTrainingArguments,
)
from etf_adapt.training.settings import TrainingSettings
from etf_adapt.training.trainer import ETFTrainer


def parse(*words):
    (args,) = HfArgumentParser(ETFTrainingArguments).parse_args_into_dataclasses(["--output_dir", "out", *words])
    return args


def other(value):
    return {False: True, True: False, None: True, "end": "every_save"}.get(value, ["loss"]) if value != [] else ["loss"]


# Fields that mean here what they say by another way, and which.
MAPPED: dict[str, str] = {
    "data_seed": "seeds our sampler",
    "disable_tqdm": "None is no bar but in a terminal",
    "do_eval": "follows `eval_strategy`",
    "greater_is_better": "None is what the metric asks for, and the opposite is refused",
    "label_smoothing_factor": "becomes `label_smoothing`: soft labels for the model's own loss, no cross-entropy",
    "load_best_model_at_end": "off where `eval_strategy` is no",
    "lr_scheduler_kwargs": "`mode` of reduce_lr_on_plateau and greedy follows the metric unless given",
    "train_sampling_strategy": "group_by_length batches rows of similar length within our sampler's draw",
    "use_cpu": "on where there is no device",
}

STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": False}
# Every field that works as transformers' documentation has it, with a value other than its default.
CHANGES_WEIGHTS = {
    "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2, "bf16": True, "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_grad_norm": 0.1, "max_steps": 3, "num_train_epochs": 3,
    "optim": "sgd", "per_device_train_batch_size": 4, "seed": 1, "warmup_steps": 0.5, "weight_decay": 0.5,
    "neftune_noise_alpha": 5.0,
}  # fmt: skip
CHANGES_NO_WEIGHT = {
    "activation_checkpointing": True, "dataloader_pin_memory": False, "debug": "underflow_overflow", "eval_delay": 1.0,
    "eval_on_start": True, "eval_steps": 2, "gradient_checkpointing": True, "include_num_input_tokens_seen": "all",
    "length_column_name": "size", "log_level": "info", "logging_first_step": True, "logging_steps": 3,
    "logging_strategy": "steps", "restore_callback_states_from_checkpoint": True,
    "save_only_model": True, "save_steps": 4, "save_total_limit": None, "skip_memory_metrics": False,
    "torch_empty_cache_steps": 1, "use_cache": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing_kwargs": {"use_reentrant": False},
}  # fmt: skip
TESTED_ELSEWHERE = {
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",  # workers
    "eval_strategy", "metric_for_best_model", "output_dir", "per_device_eval_batch_size", "report_to", "save_strategy",
    "hub_model_id", "hub_private_repo", "hub_revision", "push_to_hub", "resume_from_checkpoint",
    "optim_args", "torch_compile", "torch_compile_backend", "accelerator_config", "fp16",
}  # fmt: skip
BY_ITS_NATURE = {  # read by accelerate, torch or a tracker alone; by several processes, or on other devices
    "dataloader_prefetch_factor", "full_determinism", "tf32", "torch_compile_mode", "optim_target_modules",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "deepspeed", "fsdp", "fsdp_config", "log_level_replica", "log_on_each_node", "save_on_each_node",
    "project", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
}  # fmt: skip
WORKS = (*CHANGES_WEIGHTS, *CHANGES_NO_WEIGHT, *TESTED_ELSEWHERE, *BY_ITS_NATURE)


def test_every_field_of_transformers_is_sorted_once():
    """So that a version of transformers with a further field says so here: try it, then sort it."""
    ours = set(TrainingSettings.__annotations__)
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    sorted_once = [*REFUSED, *WITHOUT_EFFECT, *MAPPED, *WORKS]
    assert fields - set(sorted_once) == set()
    assert len(sorted_once) == len(set(sorted_once)) and not ours - fields & set(sorted_once)
    assert set(FIXED_ON_RESUME) | set(LENGTH) <= fields | ours


def trained(folder, **settings):
    quick = {"counts": (24, 5, 3), "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(folder, drop=0.0, **quick | settings)  # a pass over validation rows draws random numbers
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return weights(trained(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("name", rest_slow(CHANGES_WEIGHTS, fast=8))
def test_settings_of_training_reach_it(name, plain, tmp_path):
    assert not same(weights(trained(tmp_path, **{name: CHANGES_WEIGHTS[name]})), plain)


@pytest.mark.slow
def test_settings_of_logging_saving_and_speed_change_no_weight(plain, tmp_path):
    trainer = trained(tmp_path / "run", **STEPS | CHANGES_NO_WEIGHT)
    assert same(weights(trainer), plain)
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 4, 6, 8]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 3, 6]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 8)}
    assert trainer.state.num_input_tokens_seen > 0
    assert any(name.startswith("train_mem") for entry in history for name in entry)
    with pytest.raises(ValueError, match="was written with `save_only_model` and cannot be resumed"):
        make_trainer(tmp_path / "run", **STEPS).train(resume_from_checkpoint=True)
    logging.set_verbosity_warning()


def test_a_run_begins_with_what_has_no_effect(tmp_path, capsys):
    trained(tmp_path, eval_accumulation_steps=2, max_steps=1)
    assert "without effect: `eval_accumulation_steps` (=2): evaluation keeps no logits" in capsys.readouterr().out


def test_stock_arguments_are_told_apart(tmp_path):
    with pytest.raises(TypeError, match=r"`args` \(a TrainingArguments\) must be ETFTrainingArguments"):
        ETFTrainer(make_model(), TrainingArguments(str(tmp_path / "out")))


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_field_without_effect_says_why_where_it_is_set(name):
    default = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}[name]
    args = ETFTrainingArguments("out", **{name: 3 if type(default) is int else other(default)})
    (line,) = args.without_effect()
    assert f"`{name}`" in line and WITHOUT_EFFECT[name] in line
    assert ETFTrainingArguments("out").without_effect() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "wandb"}, r"`report_to` \(=\['wandb'\]\) cannot be used: .*wandb to be installed"),
        ({"report_to": "tensorbord"}, "`report_to`.* is not supported, only .*tensorboard"),
        ({"optim": "galore_adamw"}, "`optim` .='galore_adamw'.* cannot be used: "),
        ({"optim": "schedule_free_adamw"}, "`optim` .='schedule_free_adamw'.* choose another"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_type` .*min_lr"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.0}}, "`lr_scheduler_type` .='cosine'.*min_lr"),
        ({"metric_for_best_model": "ece", "greater_is_better": True}, "`greater_is_better` .=True. must be False"),
        pytest.param(
            {"fp16": True},
            "`fp16` .=True. needs a GPU",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works here"),
        ),
    ],
)
def test_what_would_fail_in_training_only_is_known_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        ETFTrainingArguments("out", **settings)


@pytest.mark.parametrize(
    ("metric", "is_greater"),
    [
        ("loss", False),
        ("eval_loss", False),
        ("ece", False),
        ("train_logit_nc2", False),
        ("many", True),
        ("eval_accuracy", True),
    ],
)
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_the_metric_says_which_way_is_better_and_the_schedule_follows(metric, is_greater, schedule):
    args = ETFTrainingArguments("out", metric_for_best_model=metric, lr_scheduler_type=schedule, collapse_rows=40)
    assert args.greater_is_better is is_greater
    assert args.lr_scheduler_kwargs == {"mode": "max" if is_greater else "min"}
    args = dataclasses.replace(args, lr_scheduler_kwargs={"mode": "max"})
    assert args.lr_scheduler_kwargs == {"mode": "max"}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refused_field_says_which_value_it_must_have_and_why(name):
    required, why = REFUSED[name]
    with pytest.raises(ValueError) as error:
        ETFTrainingArguments(output_dir="out", **{name: other(required)})
    assert f"`{name}`" in str(error.value) and why in str(error.value)


@pytest.mark.parametrize("name", REFUSED_ACCELERATOR)
def test_each_refused_field_of_the_accelerator_too(name):
    required, _ = REFUSED_ACCELERATOR[name]
    with pytest.raises(ValueError, match=f"accelerator_config.{name}"):
        ETFTrainingArguments(output_dir="out", accelerator_config={name: other(required)})


def test_refused_fields_are_fields_and_our_defaults_pass():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(REFUSED) <= names
    ETFTrainingArguments(output_dir="out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixup", "-1"], r"`mixup` \(=-1.0\) must be at least 0"),
        (["--freeze", "layer.(0"], r"`freeze` \(='layer.\(0'\) is no regular expression"),
        (["--label_smoothing", "1"], r"`label_smoothing` \(=1.0\) must lie in \[0, 1\)"),
        (["--label_smoothing", "0.1", "--label_smoothing_factor", "0.2"], "are one setting"),
        (["--mixup", "0.2", "--per_device_train_batch_size", "7"], "must be even with mixup"),
        (["--head_learning_rate", "0"], "must be positive"),
        (["--early_stopping_patience", "0"], "must be at least 1"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no", "--save_strategy", "no"], "needs evaluations"),
        (["--realign", "epochs", "--frame", "random"], "needs a `frame` that is made from features"),
        (["--shot_bounds", "100", "20"], "in rising order"),
        (["--seed", "-1"], "must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_a_misspelt_choice_names_the_nearest():
    with pytest.raises(ValueError, match=r"`sampler` \(='balance'\).*did you mean 'balanced'\?"):
        ETFTrainingArguments(output_dir="out", sampler="balance")
    with pytest.raises(ValueError, match=r"`final_frame` \(='random'\) must be one of 'whitened', 'means'"):
        ETFTrainingArguments(output_dir="out", final_frame="random")
    for words in (["--sampler", "balance"], ["--train_sampling_strategy", "sequential"]):
        with pytest.raises(SystemExit):
            parse(*words)


def test_every_frame_is_a_choice():
    assert set(get_args(get_type_hints(ETFTrainingArguments)["frame"])) == set(FRAMES)


def test_every_field_says_what_it_is_for():
    assert all(entry.metadata.get("help") for entry in dataclasses.fields(ETFTrainingArguments) if entry.init)


def test_stock_label_smoothing_is_ours():
    args = parse("--label_smoothing_factor", "0.2")
    assert (args.label_smoothing, args.label_smoothing_factor) == (0.2, 0.0)
    copy = dataclasses.replace(args)
    assert (copy.label_smoothing, copy.label_smoothing_factor) == (0.2, 0.0)


def test_flags_are_parsed_as_transformers_users_type_them():
    args = parse(
        "--sampler", "sqrt", "--learning_rate", "3e-4", "--max_steps", "7", "--no_load_best_model_at_end",
        "--batch_norm", "frozen", "--shot_bounds", "5", "50", "--lr_scheduler_type", "linear", "--optim", "sgd",
    )  # fmt: skip
    assert (args.sampler, args.learning_rate, args.max_steps, args.batch_norm) == ("sqrt", 3e-4, 7, "frozen")
    assert args.load_best_model_at_end is False and args.shot_bounds == [5, 50]
    assert parse().batch_norm is None
