"""Every mistake of a user ends in one message, a non-zero exit and an untouched disk, before training where it can."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Features, Value
from PIL import Image
from slow_cases import rest_slow

from etf_adapt import errors
from etf_adapt.commands.main import main
from etf_adapt.models.names import micro_folder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))


def disk(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def run_and_expect_error(argv: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *argv])
    said = capsys.readouterr().err
    assert stop.value.code == code
    messages = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and "Traceback" not in said
    return messages[0]


def csv(folder: Path, rows: list[tuple[str, str]], *, name: str = "train.csv", header: str = "text,label") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return folder


GOOD = [(f"text {i}", "ab"[i % 2]) for i in range(40)]


def one_class(folder: Path) -> Path:
    return csv(folder, [(f"text {i}", "a") for i in range(9)])


def missing_column(folder: Path) -> Path:
    return csv(folder, GOOD, header="text,klass")


def empty_text(folder: Path) -> Path:
    return csv(folder, [*GOOD, ("", "a")])


def unknown_test_label(folder: Path) -> Path:
    csv(folder, [("x", "c"), ("y", "a")], name="test.csv")
    return csv(folder, GOOD)


def class_without_rows(folder: Path) -> Path:
    for name in ("cat", "dog", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("cat", "dog"):
        for index in range(6):
            image(folder / name / f"{index}.png")
    return folder


def no_image(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            image(folder / name / f"{index}.png")
    (folder / "dog" / "3.png").write_text("I am no image")
    return folder


def label_outside_the_range(folder: Path) -> Path:
    """Write a column that is declared to hold two classes and holds a third: no reader of files checks it."""
    folder.mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    table = pyarrow.table({"text": ["x", "y", "z"] * 9, "label": [0, 1, 7] * 9}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return folder


def image(file: Path) -> None:
    Image.new("RGB", (12, 12), (40, 90, 160)).save(file)


# What is written below the folder, the flags, and the words that the message must hold.
DATA_CASES: dict[str, tuple[Callable[[Path], Path], list[str], list[str]]] = {
    "one class": (one_class, [], ["one class|1 class|two"]),
    "missing label column": (missing_column, ["--label_column", "label"], ["label", "klass"]),
    "empty text": (empty_text, [], ["40", "empty"]),
    "test split with unknown labels": (unknown_test_label, [], ["test", "c"]),
    "class with no rows": (class_without_rows, [], ["empty", "no training rows"]),
    "image file that is no image": (no_image, [], ["3.png", "no image"]),
    "label outside the range": (label_outside_the_range, [], ["7"]),
    "non-positive imbalance factor": (
        lambda folder: csv(folder, GOOD),
        ["--imbalance_factor", "0"],
        ["imbalance_factor", "0"],
    ),
    "texts for an image model": (lambda folder: csv(folder, GOOD), [], ["reads images", "texts"]),
    "validation fraction": (lambda folder: csv(folder, GOOD), ["--validation_fraction", "1.5"], ["1.5"]),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_a_broken_data_set_is_told_before_training_and_left_as_it_was(name, tmp_path, capsys, monkeypatch):
    make, flags, words = DATA_CASES[name]
    monkeypatch.chdir(tmp_path)
    data = make(tmp_path / "data")
    (tmp_path / "out").mkdir()
    before = disk(tmp_path)
    said = run_and_expect_error(["--dataset", str(data), "--output_dir", "out", *flags], capsys)
    for word in words:
        assert re.search(word, said), said
    assert disk(tmp_path) == before


# The flags, and the words that the message must hold. Each is known before torch is imported, let alone data read.
ARGUMENT_CASES = {
    "unknown model": (["--model", "./vit_bse"], ["vit_bse"]),
    "unknown head": (["--head", "linaer"], ["linaer", "did you mean 'linear'"]),
    "unknown loss": (["--loss", "cros_entropy"], ["did you mean 'cross_entropy'"]),
    "unknown profile": (["--imbalance_profile", "exp"], ["imbalance_profile", "'exp'", "'exponential'"]),
    "unknown class order": (["--class_order", "labels"], ["did you mean 'label'"]),
    "unknown choice of transformers": (["--log_level", "warnin"], ["did you mean 'warning'"]),
    "contradiction": (["--paper", "--head", "linear"], ["paper", "linear"]),
    "no number": (["--imbalance_factor", "many"], ["imbalance_factor", "many"]),
    "text model on digits": (["--model", "bert_base"], ["--dataset"]),
    "options that are no JSON": (["--loss_options", "margin=1"], ["loss_options", "margin=1", "JSON"]),
    "name among the options": (["--loss_options", '{"name": "cross_entropy"}'], ["loss_options", "--loss"]),
    "unknown adjustment": (["--prior_adjustment", "fitt"], ["fitt", "fit"]),
    "unknown pooling": (["--pooling", "meen"], ["meen", "mean"]),
    "no adapters": (["--peft", "loar"], ["loar", "JSON"]),
    "missing weights": (
        ["--model", "resnet18", "--checkpoint_path", "no.pth"],
        ["checkpoint_path", "no.pth", "no file"],
    ),
    "missing settings": (["nowhere.yaml"], ["nowhere.yaml"]),
}


@pytest.mark.parametrize("name", ARGUMENT_CASES)
def test_a_wrong_argument_is_told_at_once(name, tmp_path, capsys, monkeypatch):
    flags, words = ARGUMENT_CASES[name]
    monkeypatch.chdir(tmp_path)
    said = run_and_expect_error(flags, capsys)
    assert all(word in said for word in words), said
    assert disk(tmp_path) == {}


NO_DATA = ["--dataset", "no/such/folder/here"]  # which is not come to
LATER_CASES = {
    "unknown sampler": (["--sampler", "balancd"], ["balancd", "balanced"]),
    "unknown option of the loss": (
        ["--loss_options", '{"margn": 1}'],
        ["margn", "margin_dot_regression", "prior_strength"],
    ),
    "option outside its range": (["--loss_options", '{"temperature": -1}'], ["temperature"]),
    "unknown refit": (["--final_frame", "whitend"], ["final_frame", "whitend", "whitened"]),
    "unknown argument": (["--lerning_rate", "1"], ["--lerning_rate", "--learning_rate"]),
    "missing tracker": (["--report_to", "wandb", *NO_DATA], ["report_to", "wandb to be installed"]),
    "unknown metric": (
        ["--metric_for_best_model", "f1", *NO_DATA],
        ["metric_for_best_model", "did you mean 'macro_f1'"],
    ),
    "unused columns": (["--remove_unused_columns", "true", *NO_DATA], ["remove_unused_columns", "row_id"]),
    "metric of no class": (["--metric_for_best_model", "many", "--max_train_rows", "60"], ["many", "no class"]),
    "missing data": (["--dataset", "no/such/folder/here"], ["no/such/folder/here"]),
    "unknown timm name": (["--model", "vit_bse"], ["vit_base"]),
    "pooling of images": (["--pooling", "mean"], ["pooling", "texts"]),
    "adapters of a frozen backbone": (["--peft", "lora", "--freeze", "backbone"], ["freeze", "peft"]),
    "weights of another model": (
        ["--model", "resnet18", "--checkpoint_path", str(Path(micro_folder(), "model.safetensors"))],
        ["checkpoint_path", "resnet18", "lacks", "has beside"],
    ),
    "publishing": (["--push_to_hub"], ["push_to_hub"]),
    "nothing to resume": (["--resume_from_checkpoint", "last"], ["no complete checkpoint"]),
}


@pytest.mark.parametrize("name", LATER_CASES)
def test_what_only_the_libraries_can_tell_is_told_before_training(name, tmp_path, capsys, monkeypatch):
    flags, words = LATER_CASES[name]
    monkeypatch.chdir(tmp_path)
    said = run_and_expect_error(flags, capsys)
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("split", rest_slow(["test", "validation"], fast=1))
def test_a_damaged_image_costs_the_scores_of_its_split_and_not_the_training(split, tmp_path, capsys):
    noise = Image.effect_noise((32, 32), 50)
    for name in ("train", "validation", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / "data" / name / kind).mkdir(parents=True)
            for index in range(3):
                noise.save(tmp_path / "data" / name / kind / f"{index}.png")
    damaged = tmp_path / "data" / split / "dog" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:600])  # its header is whole
    out = tmp_path / "out"
    flags = ["--dataset", str(tmp_path / "data"), "--output_dir", str(out), "--num_train_epochs", "1"]
    said = run_and_expect_error([*flags, "--per_device_train_batch_size", "3"], capsys)
    assert f"trained and saved, but no {split} scores" in said and "dog/1.png" in said
    results = json.loads((out / "all_results.json").read_text())
    scored = {"validation": "eval_accuracy", "test": "test_accuracy"}
    assert [name for name, key in scored.items() if results[key] is None] == [split]
    assert {"model.safetensors", "README.md", "config.json"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj"]}, "No modules were targeted"),
        ({"rank": 8}, "rank"),
        ({"peft_type": "LARA"}, "LARA"),
    ],
)
def test_adapters_that_a_model_cannot_take_are_told_before_any_data_are_read(settings, words, tmp_path, capsys):
    pytest.importorskip("peft", reason="needs the package of `.[peft]`")
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    flags = ["--peft", str(tmp_path / "peft.json"), "--output_dir", str(tmp_path / "out")]
    said = run_and_expect_error([*flags, *NO_DATA], capsys)
    assert "peft.json" in said and words in said


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    before = disk(tmp_path)
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "last"]):
        assert "thesis.txt" in run_and_expect_error(["--output_dir", str(tmp_path), *flags], capsys)
    assert disk(tmp_path) == before


def test_without_the_hub_a_model_that_is_not_cached_is_told_before_any_data_are_read(capsys):
    said = run_and_expect_error(["--model", "vit_base", "--dataset", "no/such/data/set"], capsys)
    for way in ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "local folder", "cache", "--model micro"):
        assert way in said


def test_messages_of_loader_workers_lose_their_traceback(capsys):
    said = "Caught ValueError in DataLoader worker 0.\nOriginal Traceback (most recent call last):\n  ...\nValueError: image 3"
    with pytest.raises(SystemExit), errors.one_line_errors():
        raise ValueError(said)
    assert capsys.readouterr().err == "error: image 3\n"


@pytest.mark.parametrize(
    "full", [errors.DiskFullError("no room"), OSError(errno.ENOSPC, "no room"), OSError(errno.EDQUOT, "")]
)
def test_a_full_disk_ends_with_one(full, capsys):
    with pytest.raises(SystemExit) as stop, errors.one_line_errors():
        raise full
    assert stop.value.code == 1 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stop, errors.one_line_errors():
        raise FileNotFoundError("no file")
    assert stop.value.code == 2


def test_a_run_that_fails_ends_with_one_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stop, errors.one_line_errors():
        raise FloatingPointError("the loss is not finite")
    assert stop.value.code == 1 and capsys.readouterr().err == "error: the loss is not finite\n"
    with pytest.raises(AttributeError), errors.one_line_errors():
        raise AttributeError("a bug")
    with pytest.raises(RuntimeError), errors.one_line_errors():
        raise RuntimeError("shapes do not match")


def test_what_one_process_meets_is_printed_by_it_and_what_all_meet_by_the_first(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for error, printed in ((errors.RowError("row 3"), "error: row 3\n"), (errors.DataError("no rows"), "")):
        with pytest.raises(SystemExit), errors.one_line_errors():
            raise error
        assert capsys.readouterr().err == printed
