"""The recipe's flags, and what the names of models stand for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm

from etf_adapt.losses.registry import LOSS_NAMES
from etf_adapt.models.names import MODEL_NAMES, TEXT_MODELS, locate_model, micro_folder, model_task, resolve_model_name

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import finetune


class TestArguments:
    def test_a_run_is_named_after_data_model_and_head(self):
        *_, argv = finetune.read_arguments(
            ["--model", "some/vit.b16", "--dataset", "../x/cifar100", "--head", "linear"]
        )
        assert argv == ["--output_dir", str(Path("out/cifar100-vit.b16-linear"))]

    @pytest.mark.parametrize("flag", ["--do_train", "--do_eval", "--do-eval", "--do_predict=true"])
    def test_stages_are_not_chosen_by_flags_and_a_file_of_settings_may_hold_them(self, flag, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # no earlier run lies there
        with pytest.raises(ValueError, match=r"`--do_\w+` does nothing here: one run trains, validates .* and scores"):
            finetune.read_arguments(["--model", "micro", flag])
        (tmp_path / "arguments.json").write_text(json.dumps({"do_eval": True}))  # as a finished run leaves it
        *_, rest = finetune.read_arguments([str(tmp_path / "arguments.json")])
        assert rest[:2] == ["--do_eval", "True"]

    @pytest.mark.parametrize("suffix", ["yaml", "json"])
    def test_flags_after_a_file_win(self, suffix, tmp_path):
        settings = {
            "head": "linear",
            "validation_before_long_tail": True,
            "learning_rate": 1e-3,
            "imbalance_factor": None,
        }
        (tmp_path / f"s.{suffix}").write_text(json.dumps(settings))
        model, data, _, rest = finetune.read_arguments([str(tmp_path / f"s.{suffix}"), "--head", "cosine"])
        assert model.head == "cosine" and data.validation_before_long_tail and data.imbalance_factor is None
        assert rest[:2] == ["--learning_rate", "0.001"]

    def test_training_arguments_are_those_of_transformers(self, tmp_path):
        args = finetune.parse_training(
            ["--output_dir", str(tmp_path), "--gradient_accumulation_steps", "3", "--bf16", "0"]
        )
        assert args.gradient_accumulation_steps == 3 and not args.bf16

    def test_the_losses_are_those_of_the_registry(self):
        choice, _ = get_args(get_type_hints(finetune.ModelArguments)["loss"])
        assert {*get_args(choice)} == {*LOSS_NAMES}

    def test_help_names_every_group_of_flags(self, capsys):
        with pytest.raises(SystemExit) as stop:
            finetune.main(["--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(
            flag in said for flag in ("--head", "--imbalance_factor", "--overwrite_output_dir", "--learning_rate")
        )


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
