"""The recipe's flags, and what the names of models stand for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm

from etf_adapt import errors
from etf_adapt.commands.finetune_arguments import OWN_ARGUMENTS, ModelArguments, parse_training, read_arguments
from etf_adapt.commands.flags import ALIASES, ANSWERS, translate
from etf_adapt.commands.output_folder import claim_output_dir, resume_command
from etf_adapt.losses.registry import LOSS_NAMES
from etf_adapt.models.names import MODEL_NAMES, TEXT_MODELS, locate_model, micro_folder, model_task, resolve_model_name
from etf_adapt.results import claim, run_folder
from etf_adapt.training.arguments import ETFTrainingArguments


class TestArguments:
    def test_a_run_is_named_after_data_model_and_head(self):
        *_, argv = read_arguments(["--model", "some/vit.b16", "--dataset", "../x/cifar100", "--head", "linear"])
        assert argv == ["--output_dir", str(Path("out/cifar100-vit.b16-linear"))]

    @pytest.mark.parametrize("words", [["--head", "linear"], ["--head=linear"]])
    def test_the_published_method_has_its_own_head(self, words):
        with pytest.raises(ValueError, match=r"`paper` \(=True\) contradicts `head` \(='linear'\)"):
            read_arguments(["--paper", *words])
        assert read_arguments(["--paper", "--head=paper"])[0].head == "paper"

    @pytest.mark.parametrize("content", [b"model: [micro\n", b"{", b"model: \xff\n"])
    def test_a_broken_file_of_settings_is_named(self, tmp_path, content):
        (tmp_path / "flags.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"flags.yaml is no JSON or YAML \(.+\): mend it"):
            translate(["--config", str(tmp_path / "flags.yaml")])

    @pytest.mark.parametrize(
        ("flags", "name"),
        [
            (["--learning_rate", "3e-3", "--seed", "1"], "digits-micro-etf-lr0.003-seed1"),
            (["--learning-rate=1e-6"], "digits-micro-etf-lr1e-06"),
            (["--seed", "one"], "digits-micro-etf"),  # which is told later
            (["--dataset", "."], "birds_v1.5-micro-etf"),
            (["--dataset", ".."], "all-micro-etf"),
            (["--dataset", "/"], "data-micro-etf"),
            (["--dataset", "train.csv"], "train-micro-etf"),
            (["--dataset=--x-/-y.csv"], "y-micro-etf"),
        ],
    )
    def test_default_names_tell_runs_apart(self, tmp_path, monkeypatch, flags, name):
        (tmp_path / "all" / "birds v1.5").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "all" / "birds v1.5")
        *_, output_args, argv = read_arguments(flags)
        assert argv[-2:] == ["--output_dir", str(Path("out", name))] and not output_args.is_named

    def test_resuming_by_a_default_name_takes_the_newest_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for age, name in enumerate(("digits-micro-etf-2", "digits-micro-etf", "digits-micro-etf-lr1")):
            run_folder.write_json(Path("out", name, run_folder.ARGUMENTS_FILE), {})
            os.utime(Path("out", name, run_folder.ARGUMENTS_FILE), (1000 - age, 1000 - age))
        *_, argv = read_arguments(["--resume_from_checkpoint", "last"])
        assert argv == ["--output_dir", str(Path("out/digits-micro-etf-2")), "--resume_from_checkpoint", "last"]
        with pytest.raises(ValueError, match="removes what `resume_from_checkpoint` goes on from"):
            read_arguments(["--resume_from_checkpoint", "last", "--overwrite_output_dir"])

    def test_a_default_name_that_is_taken_gets_a_number_and_a_given_one_is_refused(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        model = Path("out/digits-micro-etf/model.safetensors")
        run_folder.write_json(model.with_name(run_folder.ARGUMENTS_FILE), {})
        model.touch()
        *_, output_args, argv = read_arguments([])
        second = claim_output_dir(argv[-1], is_named=output_args.is_named, resume=False, overwrite=False)
        assert (
            second == f"{model.parent}-2"
            and f"{second}, as {model.parent} holds another run" in capsys.readouterr().out
        )
        with pytest.raises(errors.OutputFolderError, match="holds an earlier run"):
            read_arguments(["--output_dir", str(model.parent)])
        claim.release(second)

    def test_the_command_that_goes_on_replaces_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["recipes/finetune.py"])
        command = resume_command(["--seed", "1", "--overwrite_output_dir"], "out/x y")
        program, flags = shlex.split(command)[:2], shlex.split(command)[2:]
        run_folder.write_json(Path("out/x y", run_folder.ARGUMENTS_FILE), {})
        *_, output_args, argv = read_arguments(flags)
        assert program == ["python", "recipes/finetune.py"] and not output_args.overwrite_output_dir
        assert argv[-4:] == ["--output_dir", "out/x y", "--resume_from_checkpoint", "last"]

    @pytest.mark.parametrize("name", ANSWERS)
    @pytest.mark.parametrize("form", ["--{}", "--{}=x"])
    def test_flags_of_other_scripts_that_are_none_of_ours_are_answered(self, name, form):
        with pytest.raises(ValueError, match=f"There is no argument `--{name}`: .{{20,}}"):
            read_arguments([form.format(name.replace("_", "-"))])

    @pytest.mark.parametrize(("alias", "name"), ALIASES.items())
    def test_aliases_and_hyphens_are_understood(self, alias, name):
        assert translate([f"--{alias.replace('_', '-')}", "x-y"]) == [f"--{name}", "x-y"]
        assert translate([f"--{alias}=x-y"]) == [f"--{name}=x-y"]

    def test_aliases_stand_for_real_flags_and_shadow_none(self):
        known = {entry.name for group in (*OWN_ARGUMENTS, ETFTrainingArguments) for entry in dataclasses.fields(group)}
        assert {*ALIASES.values()} <= known
        assert not known & {*ALIASES}
        stages = {"do_train", "do_eval", "do_predict"}  # fields of transformers' arguments, by which its scripts choose
        assert known & {*ANSWERS} == stages
        named = re.findall(r"--(\w+)", " ".join(ANSWERS.values()))
        assert {*named} <= known

    @pytest.mark.parametrize("suffix", ["yaml", "json"])
    def test_flags_after_a_file_win(self, suffix, tmp_path):
        settings = {
            "head": "linear",
            "validation_before_long_tail": True,
            "learning_rate": 1e-3,
            "imbalance_factor": None,
        }
        (tmp_path / f"s.{suffix}").write_text(json.dumps(settings))
        model, data, _, rest = read_arguments([str(tmp_path / f"s.{suffix}"), "--head", "cosine"])
        assert model.head == "cosine" and data.validation_before_long_tail and data.imbalance_factor is None
        assert rest[:2] == ["--learning_rate", "0.001"]

    def test_training_arguments_are_those_of_transformers(self, tmp_path):
        args = parse_training(["--output_dir", str(tmp_path), "--gradient_accumulation_steps", "3", "--bf16", "0"])
        assert args.gradient_accumulation_steps == 3 and not args.bf16

    def test_a_text_column_is_one_or_two_from_flags_and_from_a_file(self, tmp_path):
        _, data, *_ = read_arguments(["--text_column", "question", "sentence", "--label_column", "label"])
        assert (data.text_column, data.label_column) == (["question", "sentence"], "label")
        (tmp_path / "s.json").write_text(json.dumps({"text_column": data.text_column}))
        assert read_arguments([str(tmp_path / "s.json")])[1].text_column == data.text_column
        assert read_arguments(["--text_column=sentence"])[1].text_column == ["sentence"]

    def test_the_losses_are_those_of_the_registry(self):
        choice, _ = get_args(get_type_hints(ModelArguments)["loss"])
        assert {*get_args(choice)} == {*LOSS_NAMES}


class TestModelNames:
    def test_every_timm_name_is_one_that_timm_has_weights_for(self):
        known = set(timm.list_pretrained())
        names = [target.removeprefix("timm/") for target in MODEL_NAMES.values() if target.startswith("timm/")]
        assert names and set(names) <= known

    def test_every_short_name_has_a_task_and_one_meaning(self):
        assert all(model_task(name) == ("text" if name in TEXT_MODELS else "image") for name in MODEL_NAMES)
        assert len(set(MODEL_NAMES.values())) == len(MODEL_NAMES)

    def test_a_timm_name_without_its_tag_is_completed_by_timm(self):
        assert resolve_model_name("vit_base_patch16_224") == MODEL_NAMES["vit_base"]
        assert resolve_model_name("resnet34.a1_in1k") == "timm/resnet34.a1_in1k"

    def test_folders_and_hub_ids_stay_what_they_are(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert resolve_model_name(str(tmp_path)) == str(tmp_path)
        assert resolve_model_name("owner/name") == "owner/name"
        assert locate_model(micro_folder()) == micro_folder()

    def test_a_folder_of_the_name_of_a_model_is_the_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "minilm").mkdir()
        (tmp_path / "minilm" / "config.json").write_text("{}")
        assert locate_model(resolve_model_name("./minilm")) == "./minilm"
        assert resolve_model_name("minilm") == MODEL_NAMES["minilm"]

    def test_a_cached_model_is_found_without_the_hub(self, tmp_path, monkeypatch):
        from huggingface_hub import constants

        snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (tmp_path / "models--owner--name" / "refs").mkdir()
        (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
        for name in ("config.json", "model.safetensors"):
            (snapshot / name).write_text("{}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert locate_model("owner/name") == str(snapshot)
