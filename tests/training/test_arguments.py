"""Laws of the settings: what would bypass loss, draw or evaluation is mapped or refused before anything is read."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
from transformers import HfArgumentParser, TrainingArguments

from etf_adapt.geometry.closed_form import FRAMES
from etf_adapt.training.arguments import REFUSED, REFUSED_ACCELERATOR, ETFTrainingArguments


def parse(*words):
    (args,) = HfArgumentParser(ETFTrainingArguments).parse_args_into_dataclasses(["--output_dir", "out", *words])
    return args


def other(value):
    return {False: True, True: False, None: True, "end": "every_save"}.get(value, ["loss"]) if value != [] else ["loss"]


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
        (["--mixup", "-1"], r"`mixup` \(=-1.0\) must not be negative"),
        (["--label_smoothing", "1"], r"`label_smoothing` \(=1.0\) must lie in \[0, 1\)"),
        (["--label_smoothing", "0.1", "--label_smoothing_factor", "0.2"], "are one setting"),
        (["--mixup", "0.2", "--per_device_train_batch_size", "7"], "must be even with mixup"),
        (["--head_learning_rate", "0"], "must be positive"),
        (["--early_stopping_patience", "0"], "must be at least 1"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no", "--save_strategy", "no"], "needs evaluations"),
        (["--realign_epochs", "2", "--frame", "random"], "needs a `frame` that is made from features"),
        (["--shot_bounds", "100", "20"], "in rising order"),
        (["--seed", "-1"], "must not be negative"),
    ],
)
def test_values_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_a_misspelt_choice_names_the_nearest():
    with pytest.raises(ValueError, match=r"`sampler` \(='balance'\).*did you mean 'balanced'\?"):
        ETFTrainingArguments(output_dir="out", sampler="balance")
    with pytest.raises(ValueError, match=r"`final_frame` \(='rotated'\) must be one of 'whitened', 'means'"):
        ETFTrainingArguments(output_dir="out", final_frame="rotated")
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
