"""The recipe: one command from data to a stock checkpoint with its evidence; every flag it promises; the same again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from slow_cases import rest_slow
from transformers import (
    AutoModelForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from etf_adapt import load_data
from etf_adapt.commands.main import main
from etf_adapt.data.transforms import image_transforms
from etf_adapt.models.image_size import set_image_size
from etf_adapt.results import run_folder, tables
from etf_adapt.results.card import CARD_FILES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))


SMALL = ["--max_train_rows", "90", "--per_device_train_batch_size", "32", "--torch_threads", "1"]
SMALL += ["--num_train_epochs", "2"]


def run(*flags: str) -> None:
    main(["finetune", *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The working folder of a short run by the default model on a few digits; its result is in out/first."""
    folder = tmp_path_factory.mktemp("work")
    data = load_data("digits", max_train_rows=90)
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test.select(range(80)))):
        split.to_parquet(str(folder / "few_digits" / f"{name}.parquet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("--dataset", "few_digits", "--output_dir", "out/first")
    return folder


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """Leave empty files for the plots of the card, which take a third of a small run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: Path(file).touch())


class TestResult:
    def test_everything_promised_is_there_and_no_pickle(self, finished):
        names = {path.name for path in (finished / "out/first").iterdir()}
        assert {"model.safetensors", "config.json", *run_folder.RUN_FILES, *CARD_FILES} <= names
        assert not list(finished.rglob("training_args.bin"))

    def test_results_name_every_score_of_both_splits(self, finished):
        results = json.loads((finished / "out/first" / run_folder.RESULTS_FILE).read_text())
        for split in ("eval", "test"):
            for score in tables.SCORES:
                value = results[f"{split}_{score}"]
                assert value is None or 0.0 <= value <= 1.0 or score == "loss"
        assert {"train_samples_per_second", "train_runtime", "epoch"} <= set(results)
        assert results["test_many"] is None, "no class has more than 100 of 90 rows"

    def test_the_figures_are_those_of_the_saved_folder_in_stock_classes(self, finished):
        model, logits, _ = stock_logits(finished)
        with open(finished / "out/first" / run_folder.PREDICTIONS_FILE, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        names = [model.config.id2label[index] for index in logits.argmax(dim=1).tolist()]
        assert [row["prediction"] for row in rows] == names
        assert [int(row["row_id"]) for row in rows] == list(range(80))
        confidences = torch.tensor([float(row["confidence"]) for row in rows])
        torch.testing.assert_close(confidences, logits.softmax(dim=1).max(dim=1).values, atol=1e-5, rtol=0)
        accuracy = json.loads((finished / "out/first" / run_folder.RESULTS_FILE).read_text())["test_accuracy"]
        assert accuracy == sum(row["prediction"] == row["label"] for row in rows) / len(rows)

    def test_the_prior_adjustment_is_in_the_saved_layer(self, finished):
        _, logits, labels = stock_logits(finished)
        entry = json.loads((finished / "out/first/config.json").read_text())["etf_adapt"]
        offsets, counts = np.array(entry["prior_adjustment"]), np.array(entry["class_counts"])
        strength = offsets[counts.argmin()] - offsets[counts.argmax()]
        assert strength > 0
        expected = -np.log(counts / counts.sum()) * strength / np.log(counts.max() / counts.min())
        np.testing.assert_allclose(offsets, expected)
        results = json.loads((finished / "out/first" / run_folder.RESULTS_FILE).read_text())
        for suffix, scores in (("", logits), ("_unadjusted", logits - torch.tensor(offsets))):
            right = (scores.argmax(dim=1) == labels).float()
            recalls = [right[labels == label].mean().item() for label in labels.unique()]
            assert results[f"test_balanced_accuracy{suffix}"] == pytest.approx(np.mean(recalls), abs=1e-6)

    def test_nothing_written_tells_where_it_ran(self, finished):
        for path in (finished / "out/first").iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                written = path.read_bytes()
                assert str(finished).encode() not in written and str(ROOT).encode() not in written, path.name

    def test_the_two_lines_that_it_shows_load_it(self, finished, monkeypatch):
        monkeypatch.chdir(finished)
        names: dict = {}
        exec(run_folder.loading_lines("out/first", "timm", "image"), names)
        assert names["classify"](Image.new("L", (8, 8)))[0]["label"] in "0123456789"

    def test_its_arguments_file_runs_it_again_with_the_same_weights(self, finished, no_plots, monkeypatch):
        monkeypatch.chdir(finished)
        main(["finetune", f"out/first/{run_folder.ARGUMENTS_FILE}", "--output_dir", "out/again"])
        assert_same_weights(finished / "out/first", finished / "out/again")

    def test_a_stopped_run_goes_on_to_the_same_weights(self, finished, no_plots, monkeypatch):
        monkeypatch.chdir(finished)
        shutil.copytree("out/first", "out/stopped")
        newest = max(Path("out/stopped").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        shutil.rmtree(newest)
        (Path("out/stopped") / "model.safetensors").unlink()
        run("--dataset", "few_digits", "--output_dir", "out/stopped", "--resume_from_checkpoint", "last")
        assert_same_weights(finished / "out/first", finished / "out/stopped")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--learning_rate", "0.01"], "`learning_rate` (=0.01) was None when the run in out/refused began"),
            (["--augment", "false"], "`augment` (=False) was True"),
            (["--loss", "cross_entropy"], "`loss` (='cross_entropy') was None"),
            (["--per_device_train_batch_size", "16"], "with batch size 32, and this run has 16"),
        ],
    )
    def test_a_run_is_not_resumed_otherwise_and_its_record_stays(self, flags, message, finished, monkeypatch, capsys):
        monkeypatch.chdir(finished)
        shutil.copytree("out/first", "out/refused", dirs_exist_ok=True)
        record = Path("out/refused", run_folder.ARGUMENTS_FILE)
        before = record.read_text()
        with pytest.raises(SystemExit):
            run("--dataset", "few_digits", "--output_dir", "out/refused", "--resume_from_checkpoint", "last", *flags)
        assert message in capsys.readouterr().err
        assert record.read_text() == before

    def test_a_longer_run_is_recorded_as_it_was_trained(self, finished, no_plots, monkeypatch, capsys):
        monkeypatch.chdir(finished)
        shutil.copytree("out/first", "out/longer")
        flags = ["--resume_from_checkpoint", "last", "--num_train_epochs", "3"]
        run("--dataset", "few_digits", "--output_dir", "out/longer", *flags)
        assert "`num_train_epochs` was 2 and is 3: the learning rate follows" in capsys.readouterr().out
        assert json.loads(Path("out/longer", run_folder.ARGUMENTS_FILE).read_text())["num_train_epochs"] == 3

    def test_a_finished_run_is_replaced_only_on_request_and_other_files_stay(
        self, finished, no_plots, monkeypatch, capsys
    ):
        monkeypatch.chdir(finished)
        shutil.copytree("out/first", "out/kept")
        (finished / "out/kept/thesis.txt").write_text("years of work")
        with pytest.raises(SystemExit):
            run("--dataset", "few_digits", "--output_dir", "out/kept")
        assert "--overwrite_output_dir" in capsys.readouterr().err
        flags = ["--dataset", "few_digits", "--output_dir", "out/kept"]
        run(*flags, "--overwrite_output_dir", "--max_steps", "1")
        assert (finished / "out/kept/thesis.txt").read_text() == "years of work"
        assert [path.name for path in Path("out/kept").glob("checkpoint-*")] == ["checkpoint-1"]


def stock_logits(finished: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the finished folder in its stock class, and its logits and the labels of the test rows."""
    model = AutoModelForImageClassification.from_pretrained(finished / "out/first").eval()
    test = load_data(str(finished / "few_digits")).test
    transform = image_transforms(model.config.pretrained_cfg, train=False)
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([transform(image) for image in test["image"]])).logits
    return model, logits, torch.tensor(test["label"])


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


MARGIN = {"margin": 0.7, "prior_strength": 0.5}
BEFORE_TAIL = ["--validation_before_long_tail", "--imbalance_factor", "5"]


@pytest.mark.parametrize(
    ("flags", "loss"),
    rest_slow(
        [
            (["--head", "linear", "--pretrained", "false", *BEFORE_TAIL], {"name": "cross_entropy"}),
            (["--head", "cosine", "--evaluate_test", "false"], {"name": "logit_adjusted"}),
            (["--paper"], {"name": "dot_regression"}),
            (
                ["--head", "linear", "--loss", "focal", "--class_weights", "balanced"],
                {"name": "focal", "class_weights": "balanced"},
            ),
            (["--loss", "logit_adjusted", "--sampler", "sqrt", "--head_trainable"], {"name": "logit_adjusted"}),
            (
                [
                    "--validation_fraction",
                    "0",
                    "--image_size",
                    "40",
                    "--no_augment",
                    "--loss_options",
                    json.dumps(MARGIN),
                ],
                {"name": "margin_dot_regression", **MARGIN},
            ),
        ],
        fast=3,
    ),
    ids=["linear", "cosine", "paper", "focal", "etf trained", "etf with options"],
)
def test_every_head_runs_to_a_stock_folder(flags, loss, tmp_path, no_plots, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_colours(tmp_path / "images")
    run("--dataset", "images", "--output_dir", "run", "--max_steps", "1", *flags)
    entry = json.loads((tmp_path / "run/config.json").read_text())["etf_adapt"]
    assert loss.items() <= entry["loss"].items()
    assert f"Loss: name {loss['name']}" in (tmp_path / "run/README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained("run")
    assert sorted(model.config.id2label.values()) == ["blue", "green", "red"]
    results = json.loads((tmp_path / "run" / run_folder.RESULTS_FILE).read_text())
    assert (results["eval_accuracy"] is None) == ("--validation_fraction" in flags)
    # While settings are chosen, validation alone is scored.
    assert (results["test_accuracy"] is None) == ("--evaluate_test" in flags)
    assert Path("run", run_folder.PREDICTIONS_FILE).exists() == ("--evaluate_test" not in flags)


def launch(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    scripts = Path(sys.executable).parent
    return subprocess.run(
        [str(scripts / command[0]), *command[1:]], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.mark.slow
def test_two_processes_train_together_and_one_reports(tmp_path):
    flags = ["--max_train_rows", "90", "--max_steps", "2", "--output_dir", "two", "--use_cpu"]
    script = str(ROOT / "recipes/finetune.py")
    done = launch(["torchrun", "--nproc_per_node", "2", "--master_port", "29617", script, *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("load it:") == 1
    with open(tmp_path / "two" / run_folder.PREDICTIONS_FILE, newline="", encoding="utf-8") as stream:
        assert len(list(csv.DictReader(stream))) == len(load_data("digits").test)


@pytest.mark.slow
def test_mixed_precision_keeps_float32_masters(tmp_path, no_plots, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    run("--max_steps", "2", "--output_dir", "half")
    said = capsys.readouterr().out
    assert "bf16" in said and "data: image `image`, label `label`\ndata: 10 classes: `0`, " in said
    assert {tensor.dtype for tensor in load_file("half/model.safetensors").values() if tensor.ndim} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224.timm", "vit_tiny_patch16_224.hf", "mobilenetv2_100.timm"])
def test_real_backbones_at_another_image_size(model, shared_models, tmp_path, no_plots, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_colours(tmp_path / "images")
    flags = ["--dataset", "images", "--imbalance_factor", "4", "--image_size", "64", "--max_steps", "2"]
    run("--model", str(shared_models / model), *flags, "--output_dir", "run")
    stock = AutoModelForImageClassification.from_pretrained("run").eval()
    with torch.no_grad():
        assert stock(pixel_values=torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)
    classify = pipeline("image-classification", model="run")
    assert classify(Image.new("RGB", (48, 48), (30, 30, 200)))[0]["label"] == "blue"


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["random", "whitened"])
def test_a_hundred_threes_and_five_eights(frame, tmp_path, no_plots, monkeypatch):
    """Two classes are where the cosine has no gradient: a random head and an aligned one both learn from real images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair").mkdir()
    digits = load_data("digits", imbalance_factor=1, validation_before_long_tail=True, validation_fraction=0.15)
    for split, (threes, eights) in {"train": (100, 5), "validation": (17, 17), "test": (60, 57)}.items():
        rows = getattr(digits, split)
        labels = np.array(rows["label"])
        chosen = [*np.flatnonzero(labels == 3)[:threes], *np.flatnonzero(labels == 8)[:eights]]
        names = Dataset.from_dict({"label": [f"digit {label}" for label in labels[chosen]]})
        pair = rows.select(chosen).remove_columns("label").add_column("label", names["label"])
        pair.to_parquet(f"pair/{split}.parquet")
    settings = ["--frame", frame, "--learning_rate", "1e-3", "--sampler", "balanced", "--torch_threads", "1"]
    main(["finetune", "--dataset", "pair", "--output_dir", "run", *settings])
    results = json.loads((tmp_path / "run" / run_folder.RESULTS_FILE).read_text())
    assert results["test_balanced_accuracy"] > 0.85 and results["test_tail_third"] > 0.8
    log = [json.loads(line) for line in (tmp_path / "run" / run_folder.LOG_FILE).read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert frame == "whitened" or losses[-1] < 0.5 * losses[0]  # the aligned head begins with most margins reached


def test_position_embeddings_are_resized_as_transformers_would_do_it_at_each_call():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model(pixel_values=images, interpolate_pos_encoding=True).logits
        set_image_size(model, processor, 48)
        assert torch.equal(model(pixel_values=images).logits, expected)
    assert dict(processor.size) == {"height": 48, "width": 48} and model.config.image_size == 48


def save_colours(folder: Path) -> None:
    """Write an image folder of three classes with a test split."""
    for label, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
        for index in range(24):
            image = Image.new("RGB", (48, 48), tuple(min(255, channel + 2 * index) for channel in colour))
            place = folder / ("test" if index % 4 == 0 else "train") / label
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{index}.png")


@pytest.mark.slow
def test_adapters_leave_a_stock_folder(tmp_path, no_plots, monkeypatch):
    pytest.importorskip("peft", reason="needs the package of `.[peft]`")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter.json").write_text('{"peft_type": "LORA", "r": 2, "use_dora": true}')
    for config in ("lora", "adapter.json"):
        run("--peft", config, "--max_steps", "1", "--output_dir", "run", "--overwrite_output_dir")
        assert not [name for name in load_file("run/model.safetensors") if "lora" in name or "base_layer" in name]
        model = timm.create_model("local-dir:run", pretrained=True)
        assert model(torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:])).shape == (1, 10)


@pytest.mark.slow
def test_workers_that_persist_do_not_hand_out_another_split(tmp_path, no_plots, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true", "--output_dir", "run")
    results = json.loads(Path("run", run_folder.RESULTS_FILE).read_text())
    assert results["test_balanced_accuracy"] is not None


@pytest.mark.slow
def test_text(minilm, shared_data, tmp_path, no_plots, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_parquet(
            str(shared_data / f"clinc150/{split}-00000-of-00001.parquet"), cache_dir=str(tmp_path)
        )
        names, labels = rows.features["label"].names, np.array(rows["label"])
        chosen = [row for label in (3, 50, 120) for row in np.flatnonzero(labels == label)[:8]]
        lines = [{"text": rows[row]["text"], "label": names[labels[row]]} for row in chosen]
        (tmp_path / f"texts/{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", str(minilm), "--dataset", "texts", "--max_steps", "2", "--max_length", "16"]
    with pytest.warns(UserWarning, match="--pooling mean"):
        run(*flags, "--output_dir", "run")
    classify = pipeline("text-classification", model="run")
    assert classify("is my vacation request approved")[0]["label"] in classify.model.config.label2id
    assert classify.tokenizer.pad_token is not None
    run(*flags, "--output_dir", "mean", "--pooling", "mean")
    own_lines = (tmp_path / "mean/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "SentenceTransformer" in own_lines
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    names: dict[str, object] = {}
    exec(own_lines, names)
    with open(tmp_path / "mean" / run_folder.PREDICTIONS_FILE, newline="", encoding="utf-8") as stream:
        predictions = {int(row["row_id"]): row["prediction"] for row in csv.DictReader(stream)}
    asked = [row["text"] for row in map(json.loads, (tmp_path / "texts/test.jsonl").read_text().splitlines())]
    scored = names["model"].encode(asked, convert_to_tensor=True).argmax(dim=1).tolist()
    assert [names["names"][label] for label in scored] == [predictions[row] for row in range(len(asked))]


@pytest.mark.slow
def test_an_image_encoder_without_a_classification_class(tmp_path, no_plots, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained("encoder")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("encoder")
    with pytest.warns(UserWarning, match="no class for image classification"):
        run("--model", "./encoder", "--num_train_epochs", "2", "--max_steps", "-1", "--output_dir", "run")
    results = json.loads(Path("run", run_folder.RESULTS_FILE).read_text())
    assert results["test_balanced_accuracy"] > 0.15  # one of ten by chance
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    Image.new("RGB", (8, 8)).save("photo.jpg")
    exec(Path("run/README.md").read_text().split("```python\n")[1].split("```")[0], {})


@pytest.mark.slow
def test_a_file_of_weights_is_trained_on(tmp_path, no_plots, monkeypatch):
    """The recipe asks nobody for the weights of the architecture, and the finished folder is the file's backbone, trained."""
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(weights, "weights.safetensors")
    model = ["--model", "timm/test_resnet.r160_in1k", "--checkpoint_path", "weights.safetensors", "--head", "linear"]
    fixed = ["--freeze", "backbone", "--batch_norm", "frozen", "--image_size", "32"]
    run(*model, *fixed, "--max_steps", "2", "--evaluate_test", "false", "--output_dir", "out")
    saved = load_file("out/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items() if not name.startswith("fc."))
