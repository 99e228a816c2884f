"""What a run writes is complete and private, and files of others are never touched."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import platform

import pytest
from small_card import HOSTILE_NAMES

from etf_adapt import errors
from etf_adapt.results import run_folder
from etf_adapt.results.card import CARD_FILES
from etf_adapt.results.claim import claim, release


def test_an_empty_or_missing_folder_is_free(tmp_path):
    run_folder.check_output_dir(tmp_path)
    run_folder.check_output_dir(tmp_path / "missing")


def test_anything_that_no_run_wrote_is_refused_whatever_is_said(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for say in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(errors.OutputFolderError, match="thesis"):
            run_folder.check_output_dir(tmp_path, **say)


def test_an_earlier_run_is_kept_unless_the_user_says_how_to_go_on(tmp_path):
    run_folder.write_json(tmp_path / run_folder.ARGUMENTS_FILE, {})
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(errors.OutputFolderError, match=r"--resume_from_checkpoint.*--overwrite_output_dir"):
        run_folder.check_output_dir(tmp_path)
    run_folder.check_output_dir(tmp_path, resume=True)
    run_folder.check_output_dir(tmp_path, overwrite=True)


def test_a_run_that_ended_before_its_first_checkpoint_is_no_obstacle(tmp_path):
    run_folder.write_json(tmp_path / run_folder.ARGUMENTS_FILE, {})
    run_folder.check_output_dir(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputFolderError, match="is a file"):
        run_folder.check_output_dir(tmp_path / "file")


def test_replacing_a_run_removes_its_files_and_no_others(tmp_path):
    for name in (
        "model.safetensors",
        "config.json",
        "README.md",
        run_folder.ARGUMENTS_FILE,
        *CARD_FILES,
        "thesis.txt",
    ):
        (tmp_path / name).write_text("")
    run_folder.remove_run_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "thesis.txt"]


def test_nothing_is_removed_where_no_run_was(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    run_folder.remove_run_files(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_what_is_not_finite_is_written_as_null(tmp_path):
    run_folder.write_json(tmp_path / "r.json", {"nan": math.nan, "inf": [math.inf], "one": 1.0})
    assert json.loads((tmp_path / "r.json").read_text()) == {"nan": None, "inf": [None], "one": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_arguments_tell_no_token_and_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @dataclasses.dataclass
    class Arguments:
        model: str = "/home/somebody/models/vit"
        dataset: str = str(tmp_path / "data" / "birds")
        output_dir: str = "out/run"
        hub_token: str = "hf_secret"
        options: dict = dataclasses.field(default_factory=lambda: {"dir": "/home/somebody/x", "api_token": "hf_secret"})

    public = run_folder.public_arguments(Arguments())
    assert public == {"model": "vit", "dataset": "data/birds", "output_dir": "out/run", "options": {"dir": "x"}}


def test_the_command_tells_no_token_and_no_place_of_this_machine():
    assert run_folder.public_value({"lr": 1.0, "token": "hf_x"}) == {"lr": 1.0}
    words = ["--model", "/home/me/vit", "--hub_token", "hf_x", "--seed", "1"]
    assert run_folder.public_command(words) == "etf-adapt finetune --model vit --seed 1"
    argv = [
        "--model",
        "/home/somebody/vit",
        "--data=/home/somebody/d",
        "--hub_token",
        "hf_s",
        "--hub_token=hf_s",
        "--paper",
    ]
    assert run_folder.public_command(argv) == "etf-adapt finetune --model vit --data=d --paper"


def test_what_counts_tokens_is_no_secret_and_flags_behind_a_secret_stay():
    words = [
        "--include_num_input_tokens_seen",
        "--seed",
        "1",
        "--hub-token",
        "--bf16",
        "--hub_token",
        "hf_x",
        "--paper",
    ]
    assert (
        run_folder.public_command(words) == "etf-adapt finetune --include_num_input_tokens_seen --seed 1 --bf16 --paper"
    )
    secrets = dict.fromkeys(("hub_token", "hubToken", "access_tokens", "client_secret", "passwords"), "x")
    assert run_folder.public_value({"max_tokens": 1, "token_type_ids": 2, **secrets}) == {
        "max_tokens": 1,
        "token_type_ids": 2,
    }


def test_the_arguments_and_the_command_of_a_resumed_run_begin_it_anew():
    for flag in ("--resume_from_checkpoint", "--resume", "--resume-from-checkpoint"):
        words = ["--seed", "1", flag, "last", "--bf16"]
        assert run_folder.public_command(words) == "etf-adapt finetune --seed 1 --bf16"

    @dataclasses.dataclass
    class Arguments:
        seed: int = 3
        resume_from_checkpoint: str = "last"

    assert run_folder.recorded_arguments(Arguments()) == {"seed": 3}


def test_the_log_has_one_line_a_step(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_accuracy": 0.5}, {"step": 2, "loss": math.nan}]
    run_folder.write_log(tmp_path / "log.jsonl", history)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0, "eval_accuracy": 0.5}, {"step": 2, "loss": None}]


def test_predictions_keep_class_names_whatever_they_hold(tmp_path):
    rows = range(len(HOSTILE_NAMES))
    file = tmp_path / "predictions.csv"
    run_folder.write_predictions(
        file, row_ids=rows, labels=rows, predictions=rows, confidences=[0.5] * len(rows), label_names=HOSTILE_NAMES
    )
    with open(file, newline="", encoding="utf-8") as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == HOSTILE_NAMES


def test_the_environment_names_versions_and_no_machine():
    found = run_folder.describe_environment()
    assert "torch" in found and platform.node() not in found.values()


def test_loading_lines_are_python(tmp_path):
    lines = run_folder.loading_lines("out/x", "timm", "image").splitlines()
    assert lines == ["from transformers import pipeline", 'classify = pipeline("image-classification", model="out/x")']
    pairs = (("timm", "image"), ("transformers", "image"), ("transformers", "text"), ("sentence_transformers", "text"))
    for library, task in pairs:
        compile(run_folder.loading_lines(tmp_path / 'quo"te', library, task), "lines", "exec")


def test_runs_of_one_name_are_told_apart_by_number_and_the_newest_is_found(tmp_path):
    names = [path.name for path in itertools.islice(run_folder.folders_of_name(tmp_path / "x"), 3)]
    assert names == ["x", "x-2", "x-3"]
    assert run_folder.newest_of_name(tmp_path / "x") == tmp_path / "x"
    for age, name in enumerate(("x-linear", "x-12", "x-2", "x", "y-2")):
        run_folder.write_json(tmp_path / name / run_folder.ARGUMENTS_FILE, {})
        os.utime(tmp_path / name / run_folder.ARGUMENTS_FILE, (1000 - age, 1000 - age))
    assert run_folder.newest_of_name(tmp_path / "x") == tmp_path / "x-12"


def test_a_claim_alone_is_no_obstacle(tmp_path):
    claim(tmp_path)
    release(tmp_path)
    run_folder.check_output_dir(tmp_path)
