"""What a run leaves is complete, private and safe: results, log, predictions, card; and nothing of others is touched."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from small_card import card_facts

from etf_adapt import errors
from etf_adapt.results import run_folder, tables
from etf_adapt.results.card import CARD_FILES, escape_markdown, make_card, read_facts, write_card
from etf_adapt.results.card_metadata import is_hub_id, read_base_card

HOSTILE_NAMES = [
    "a|b",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "two\nlines\n---\n# heading",
    'quo"te',
    "```\ncode",
    "x\n<!-- /etf_adapt: making -->\ny",
]


class TestOutputFolder:
    def test_an_empty_or_missing_folder_is_free(self, tmp_path):
        run_folder.check_output_dir(tmp_path)
        run_folder.check_output_dir(tmp_path / "missing")

    def test_anything_that_no_run_wrote_is_refused_whatever_is_said(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        for say in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(errors.OutputFolderError, match="thesis"):
                run_folder.check_output_dir(tmp_path, **say)

    def test_an_earlier_run_is_kept_unless_the_user_says_how_to_go_on(self, tmp_path):
        run_folder.write_json(tmp_path / run_folder.ARGUMENTS_FILE, {})
        (tmp_path / "checkpoint-7").mkdir()
        with pytest.raises(errors.OutputFolderError, match=r"--resume_from_checkpoint.*--overwrite_output_dir"):
            run_folder.check_output_dir(tmp_path)
        run_folder.check_output_dir(tmp_path, resume=True)
        run_folder.check_output_dir(tmp_path, overwrite=True)

    def test_a_run_that_ended_before_its_first_checkpoint_is_no_obstacle(self, tmp_path):
        run_folder.write_json(tmp_path / run_folder.ARGUMENTS_FILE, {})
        run_folder.check_output_dir(tmp_path)

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(errors.OutputFolderError, match="is a file"):
            run_folder.check_output_dir(tmp_path / "file")

    def test_replacing_a_run_removes_its_files_and_no_others(self, tmp_path):
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

    def test_nothing_is_removed_where_no_run_was(self, tmp_path):
        (tmp_path / "model.safetensors").write_text("")
        run_folder.remove_run_files(tmp_path)
        assert (tmp_path / "model.safetensors").exists()


class TestFiles:
    def test_what_is_not_finite_is_written_as_null(self, tmp_path):
        run_folder.write_json(tmp_path / "r.json", {"nan": math.nan, "inf": [math.inf], "one": 1.0})
        assert json.loads((tmp_path / "r.json").read_text()) == {"nan": None, "inf": [None], "one": 1.0}
        assert [path.name for path in tmp_path.iterdir()] == ["r.json"]

    def test_arguments_tell_no_token_and_no_place_of_this_machine(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        @dataclasses.dataclass
        class Arguments:
            model: str = "/home/somebody/models/vit"
            dataset: str = str(tmp_path / "data" / "birds")
            output_dir: str = "out/run"
            hub_token: str = "hf_secret"
            options: dict = dataclasses.field(
                default_factory=lambda: {"dir": "/home/somebody/x", "api_token": "hf_secret"}
            )

        public = run_folder.public_arguments(Arguments())
        assert public == {"model": "vit", "dataset": "data/birds", "output_dir": "out/run", "options": {"dir": "x"}}

    def test_the_command_tells_no_token_and_no_place_of_this_machine(self):
        argv = [
            "--model",
            "/home/somebody/vit",
            "--data=/home/somebody/d",
            "--hub_token",
            "hf_s",
            "--hub_token=hf_s",
            "--paper",
        ]
        assert run_folder.public_command(argv) == "accelerate launch recipes/finetune.py --model vit --data=d --paper"

    def test_results_are_flat_and_name_every_score_of_both_splits(self):
        results = tables.flat_results({"train_runtime": 1.0}, {"accuracy": 0.5}, None)
        assert {f"{split}_{score}" for split in ("eval", "test") for score in tables.SCORES} <= set(results)
        assert results["eval_accuracy"] == 0.5 and results["test_accuracy"] is None and results["train_runtime"] == 1.0

    def test_the_log_has_one_line_a_step(self, tmp_path):
        history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_accuracy": 0.5}, {"step": 2, "loss": math.nan}]
        run_folder.write_log(tmp_path / "log.jsonl", history)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert lines == [{"step": 1, "loss": 2.0, "eval_accuracy": 0.5}, {"step": 2, "loss": None}]

    def test_predictions_keep_class_names_whatever_they_hold(self, tmp_path):
        rows = range(len(HOSTILE_NAMES))
        file = tmp_path / "predictions.csv"
        run_folder.write_predictions(
            file, row_ids=rows, labels=rows, predictions=rows, confidences=[0.5] * len(rows), label_names=HOSTILE_NAMES
        )
        with open(file, newline="", encoding="utf-8") as stream:
            assert [row["label"] for row in csv.DictReader(stream)] == HOSTILE_NAMES

    def test_the_environment_names_versions_and_no_machine(self):
        import platform

        found = run_folder.describe_environment()
        assert "torch" in found and platform.node() not in found.values()


class TestTable:
    def test_groups_and_thirds_each_hold_every_class_once(self):
        table = tables.shot_table({}, [500, 100, 60, 20, 5], [3, 3, 3, 3, 3])
        assert [row[2] for row in table] == [1, 3, 1, 2, 1, 2, 5, 5]
        assert sum(row[3] for row in table[:3]) == sum(row[3] for row in table[3:6]) == 15

    def test_an_empty_group_is_a_dash(self):
        table = tables.shot_table({"many": None}, [50, 50], [1, 1])
        assert "many" in (line := tables.format_table(table).splitlines()[1]) and line.endswith(" -")


class TestCard:
    def test_metadata_are_what_the_hub_reads(self):
        metadata = make_card(card_facts()).data.to_dict()
        assert metadata["pipeline_tag"] == "image-classification" and metadata["library_name"] == "timm"
        assert metadata["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
        assert metadata["base_model_relation"] == "finetune"
        metrics = metadata["model-index"][0]["results"][0]["metrics"]
        assert [metric["value"] for metric in metrics] == [0.5, 0.25, 0.01]  # not the group that is empty, nor the NaN

    @pytest.mark.parametrize("name", ["my_model", "./encoder", "../models/vit", "a/b/c"])
    def test_a_local_base_model_or_data_set_is_not_given_out_as_a_hub_id(self, name):
        metadata = make_card(card_facts(base_model=name)).data.to_dict()
        assert "base_model" not in metadata and "base_model_relation" not in metadata and "datasets" not in metadata

    def test_a_folder_of_this_machine_is_no_hub_id(self, tmp_path, monkeypatch):
        (tmp_path / "models/vit").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert not is_hub_id("models/vit") and is_hub_id("other/vit")

    def test_the_licence_is_the_base_models_and_is_never_made_up(self, tmp_path):
        assert "license" not in make_card(card_facts(inherited=read_base_card(tmp_path))).data.to_dict()
        (tmp_path / "README.md").write_text("no metadata")
        assert read_base_card(tmp_path) == {}
        known = {
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "LICENSE.md",
            "language": ["en", "de"],
        }
        ModelCard(f"---\n{ModelCardData(**known, tags=['x'])}\n---\n").save(tmp_path / "README.md")
        assert read_base_card(tmp_path) == known
        data = make_card(card_facts(inherited=known)).data.to_dict()
        assert data["license_name"] == "dinov3-license" and "language" not in data
        assert make_card(card_facts(inherited=known, task="text")).data.language == ["en", "de"]

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_names_cannot_break_out_of_yaml_markdown_or_html(self, name):
        labels = {"label_names": [name, "x"], "model_id": f"out/{name}", "recalls": [0.1, 0.9], "row_counts": [10, 10]}
        card = str(
            make_card(card_facts(dataset={"name": name, "kind": "Hub"}, base_model=name, command=name, **labels))
        )
        read = ModelCard(card).data
        assert read.datasets == [" ".join(name.split())] and read.pipeline_tag == "image-classification"
        assert "<script>" not in outside_code(ModelCard(card).text) and "49" not in outside_code(ModelCard(card).text)
        usual = str(make_card(card_facts(recalls=[0.1, 0.9], row_counts=[10, 10])))
        assert [line.split()[0] for line in headings(card)] == [line.split()[0] for line in headings(usual)]
        assert markers(card) == markers(usual)

    def test_escaping_leaves_one_line(self):
        assert "\n" not in escape_markdown("two\nlines") and "<" not in escape_markdown("<b>")

    def test_the_worst_classes_come_first_and_those_without_rows_are_named_in_the_limits(self):
        names, counts = ["a", "b", "c", "d"], [50, 40, 30, 3]
        recalls, rows = [0.9, 0.2, None, 0.2], [10, 4, 0, 8]
        facts = card_facts(label_names=names, class_counts=counts, recalls=recalls, row_counts=rows)
        text = make_card(facts).text
        assert text.index("| d | 3 | 8 | 20.0 |") < text.index("| b | 40 | 4 | 20.0 |") and "| c |" not in text
        assert "1 classes have no test rows" in text

    def test_it_is_written_with_its_figures_and_its_facts(self, tmp_path):
        facts = card_facts(recalls=[0.5, None], row_counts=[10, 0])
        card = write_card(tmp_path, facts)
        assert {path.name for path in tmp_path.iterdir()} == set(CARD_FILES)
        assert set(re.findall(r"\]\(([\w.]+)\)", card.text)) == {"class_counts.png", "recalls.png"}
        for name in ("class_counts.png", "recalls.png"):
            with Image.open(tmp_path / name) as image:
                assert image.size[0] > 300 and not {"date", "Creation Time"} & set(image.info)
        again, is_edited = read_facts(tmp_path)
        assert not is_edited
        assert str(make_card(again)) == str(card)
        assert "timm/x" in str(make_card(dataclasses.replace(again, model_id="timm/x", on_hub=True)))
        assert read_facts(tmp_path / "other") is None

    def test_what_a_person_wrote_is_kept_when_it_is_renewed(self, tmp_path):
        write_card(tmp_path, card_facts())
        file = tmp_path / "README.md"
        edited = file.read_text().replace("pipeline_tag:", "license: mit\ncustom: [1]\npipeline_tag:")
        edited = edited.replace("- etf_adapt\n", "- etf_adapt\n- birds\n")
        edited = re.sub(
            r"<!-- etf_adapt: limits.*/etf_adapt: limits -->", "## Limits\n\nAsk Ada.", edited, flags=re.DOTALL
        )
        edited = edited.replace("<!-- etf_adapt: results", "Made for the bird club.\n\n<!-- etf_adapt: results")
        file.write_text(edited)
        assert read_facts(tmp_path)[1]
        card = write_card(tmp_path, card_facts(scores={"accuracy": 0.75, "balanced_accuracy": 0.5}, command="other"))
        assert file.read_text() == str(card)
        data = card.data.to_dict()
        assert data["license"] == "mit" and data["custom"] == [1] and "birds" in data["tags"]
        assert [metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]] == [0.75, 0.5]
        assert "Ask Ada." in card.text and "Made for the bird club." in card.text and "**50.0 %**" in card.text
        assert "etf_adapt: limits" not in card.text and "**25.0 %**" not in card.text and "```sh\nother" in card.text
        assert str(write_card(tmp_path, card_facts())).count("## How it was made") == 1

    def test_nothing_of_an_earlier_run_is_taken_for_a_persons(self, tmp_path):
        write_card(tmp_path, card_facts(base_model="google/vit", inherited={"license": "apache-2.0"}))
        new = card_facts(base_model="./local", inherited={"license": "cc-by-nc-4.0"}, scores={}, table=[])
        data = write_card(tmp_path, new).data.to_dict()
        assert data["license"] == "cc-by-nc-4.0" and not {"base_model", "model-index"} & set(data)

    def test_a_card_that_is_no_yaml_is_kept_beside_the_new_one(self, tmp_path):
        write_card(tmp_path, card_facts())
        broken = (tmp_path / "README.md").read_text().replace("library_name:", "license: [mit\nlibrary_name:")
        (tmp_path / "README.md").write_text(broken)
        with pytest.warns(UserWarning, match=r"README\.edited\.md"):
            write_card(tmp_path, card_facts())
        assert (tmp_path / "README.edited.md").read_text() == broken
        assert (tmp_path / "README.md").read_text() == str(make_card(card_facts()))

    def test_facts_of_another_version_are_read_as_far_as_they_are_known(self, tmp_path):
        write_card(tmp_path, card_facts())
        written = json.loads((tmp_path / "card.json").read_text())
        for change, is_known in (({"new": 1}, True), ({"split": None}, True)):
            (tmp_path / "card.json").write_text(json.dumps(written | {"facts": written["facts"] | change}))
            assert (read_facts(tmp_path) is not None) == is_known
        del written["facts"]["split"]
        (tmp_path / "card.json").write_text(json.dumps(written))
        assert read_facts(tmp_path) is None
        (tmp_path / "card.json").write_text("{")
        assert read_facts(tmp_path) is None

    def test_a_card_of_ones_own_is_left_as_it_is(self, tmp_path):
        (tmp_path / "README.md").write_text("# Birds\n\nby Ada\n")
        card = write_card(tmp_path, card_facts())
        assert card.text.strip() == "# Birds\n\nby Ada" and card.data.library_name == "timm"


def outside_code(text: str) -> str:
    """Return the lines that stand in no fenced block."""
    kept, fence = [], None
    for line in text.splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence is None and ticks >= 3:
            fence = ticks
        elif fence is not None and line == "`" * ticks and ticks >= fence:
            fence = None
        elif fence is None:
            kept.append(line)
    return "\n".join(kept)


def markers(card: str) -> list[str]:
    return re.findall(r"^<!-- /?etf_adapt: \w+", card, flags=re.MULTILINE)


def headings(card: str) -> list[str]:
    return [line for line in outside_code(card).splitlines() if line.startswith("#")]


def test_loading_lines_are_python(tmp_path: Path):
    pairs = (("timm", "image"), ("transformers", "image"), ("transformers", "text"), ("sentence_transformers", "text"))
    for library, task in pairs:
        compile(run_folder.loading_lines(tmp_path / 'quo"te', library, task), "lines", "exec")
