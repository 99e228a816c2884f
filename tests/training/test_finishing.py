"""Laws of what is left by the one call after training: calibrated, saved, scored as saved, and told in full."""

from __future__ import annotations

import csv
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import NoisyRows, make_model, make_trainer
from transformers import ViTForImageClassification

from etf_adapt import ETFForImageClassification
from etf_adapt.errors import DataError
from etf_adapt.geometry.leave_one_out import PENALTIES
from etf_adapt.heads.alignment import align_head
from etf_adapt.inference.head_statistics import load_statistics
from etf_adapt.inference.held_out import score_features
from etf_adapt.metrics.calibration import fit_balanced
from etf_adapt.results import run_folder, tables
from etf_adapt.results.card import CARD_FILES, read_facts
from etf_adapt.training import aligning, finishing
from etf_adapt.training.finishing import is_adjusted

NAMES = {0: "ash", 1: "birch", 2: "cedar"}


def trained(folder, **settings):
    trainer = make_trainer(folder, model=make_model(id2label=NAMES), **{"num_train_epochs": 1, **settings})
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Leave empty files for the plots of the card, which take most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: file.touch())


def test_a_run_in_python_leaves_what_the_recipe_leaves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test = NoisyRows((9, 8, 7), seed=5)
    results = trained("run").finish(test, dataset="trees")
    assert {"model.safetensors", "config.json", *run_folder.RUN_FILES, *CARD_FILES} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert json.loads((tmp_path / "run" / run_folder.RESULTS_FILE).read_text()) == pytest.approx(results)
    assert {"train_runtime", *(f"{split}_{name}" for split in ("eval", "test") for name in tables.SCORES)} <= set(
        results
    )

    stock = ViTForImageClassification.from_pretrained("run").eval()
    with torch.no_grad():
        chosen = stock(pixel_values=test.images).logits.argmax(dim=-1).numpy()
    with open(tmp_path / "run" / run_folder.PREDICTIONS_FILE, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prediction"] for row in rows] == [NAMES[label] for label in chosen]
    assert results["test_accuracy"] == np.mean(chosen == test.labels)

    facts = read_facts("run")
    assert (facts.task, facts.base_model, facts.dataset) == ("image", "ViTForImageClassification", {"name": "trees"})
    assert facts.label_names == list(NAMES.values()) and facts.class_counts == [60, 21, 7]
    assert facts.is_adjusted and facts.calibrated_rows == 21 and facts.scores["accuracy"] == results["test_accuracy"]
    card, said = (tmp_path / "run/README.md").read_text(), capsys.readouterr().out
    assert "```sh" not in card and "calibrated on validation rows: logits x" in said and "load it:" in said


def test_without_test_rows_the_validation_rows_are_reported(tmp_path):
    results = trained(tmp_path).finish()
    facts = read_facts(tmp_path)
    assert facts.split == "validation" and facts.scores["accuracy"] == results["eval_accuracy"]
    assert results["test_accuracy"] is None and not (tmp_path / run_folder.PREDICTIONS_FILE).exists()


def test_without_any_held_out_rows_the_model_is_saved_and_not_scored(tmp_path):
    trainer = trained(tmp_path, eval_strategy="no")
    trainer.eval_dataset = None
    assert trainer.finish()["eval_accuracy"] is None
    assert "Not evaluated" in (tmp_path / "README.md").read_text() and (tmp_path / "model.safetensors").is_file()


def test_finishing_twice_is_finishing_once(tmp_path):
    trainer = trained(tmp_path)
    first = trainer.finish(prior_adjustment="none")
    second = trainer.finish(prior_adjustment="none")
    assert {name: second[name] for name in first if name.startswith("eval")} == pytest.approx(
        {name: value for name, value in first.items() if name.startswith("eval")}, abs=1e-4
    )
    assert not read_facts(tmp_path).is_adjusted


class Damaged(NoisyRows):
    """Rows of which the last cannot be read."""

    def __getitem__(self, row):
        if row == len(self) - 1:
            raise DataError("`photo.jpg` cannot be decoded: replace it")
        return super().__getitem__(row)


@pytest.mark.parametrize("damaged", ["validation", "test"])
def test_a_row_that_cannot_be_read_costs_the_scores_of_its_split_alone(tmp_path, damaged):
    splits = {name: (Damaged if name == damaged else NoisyRows)((6, 6, 6), seed=5) for name in ("validation", "test")}
    trainer = trained(tmp_path)
    with pytest.raises(DataError, match=rf"trained and saved, but no {damaged} scores: `photo.jpg` cannot be decoded"):
        trainer.finish(splits["test"], eval_dataset=splits["validation"])
    results = json.loads((tmp_path / run_folder.RESULTS_FILE).read_text())
    assert (results["eval_accuracy"] is None) == (damaged == "validation")
    assert (results["test_accuracy"] is None) == (damaged == "test")
    facts = read_facts(tmp_path)
    assert facts.split == ("test" if damaged == "validation" else "validation") and "accuracy" in facts.scores
    assert (facts.calibrated_rows > 0) == (damaged == "test") and (tmp_path / "model.safetensors").is_file()


def test_every_pass_of_a_run_says_what_it_does(tmp_path, monkeypatch, capsys):
    """By a clock that goes on by twenty seconds whenever it is read."""
    now = itertools.count(0.0, 20.0)
    monkeypatch.setattr("etf_adapt.data.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    trainer = trained(tmp_path, collapse_rows=8)
    trainer.finish(trainer.eval_dataset, eval_dataset=NoisyRows((5, 5, 5), seed=3))
    align_head(make_model(), trainer.get_eval_dataloader())  # which counts the classes first
    said = {line.split(":")[0] for line in capsys.readouterr().err.splitlines()}
    batches = {"aligning the head", "counting classes", "measuring the norm of the logits", "measuring neural collapse",
               "calibrating", "scoring test"}  # fmt: skip
    assert {
        "training steps",
        "evaluation, batches",
        "choosing the penalty",
        *(f"{name}, batches" for name in batches),
    } <= said


class CountedRows(NoisyRows):
    """Rows that count how often they are read."""

    read = 0

    def __getitem__(self, row):
        self.read += 1
        return super().__getitem__(row)


def saved_scores(trainer, rows):
    """Score the saved folder by transformers alone."""
    stock = ViTForImageClassification.from_pretrained(trainer.args.output_dir).eval()
    batch = trainer.data_collator([rows[row] for row in range(len(rows))])
    with torch.no_grad():
        logits = stock(pixel_values=batch["pixel_values"]).logits
    right = logits.argmax(dim=1) == batch["labels"]
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"]).item()
    return {"accuracy": right.double().mean().item(), "loss": loss}


def test_validation_rows_are_read_by_the_evaluations_and_scored_as_the_folder_does(tmp_path):
    rows = CountedRows((190, 160, 290), seed=4)  # five batches
    trainer = trained(tmp_path, eval_dataset=rows, num_train_epochs=2, load_best_model_at_end=False)
    assert rows.read == 2 * 640
    results = trainer.finish()
    assert rows.read == 2 * 640 + 3 * 128  # two batches, on which folder and model agree, and one read ahead
    expected = saved_scores(trainer, rows)
    assert {name: results[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_run_that_was_resumed_after_its_last_evaluation_ends_in_the_same_bits(tmp_path):
    """The features are then read again."""
    ended = []
    for name in ("whole", "resumed"):
        trainer = trained(tmp_path / name, eval_counts=(33, 20, 11))
        if name == "resumed":
            trainer._evaluated = None
        scores = trainer.finish()
        ended.append((load_file(tmp_path / name / "model.safetensors"), scores["eval_loss"]))
    assert ended[0][1] == ended[1][1]
    for name, tensor in ended[0][0].items():
        assert torch.equal(tensor, ended[1][0][name]), name


@pytest.mark.parametrize("chooses", [False, True])
def test_a_run_that_was_stopped_after_its_last_step_ends_in_the_same_bits(tmp_path, monkeypatch, chooses):
    """Also where a pass reads some rows and training has read the others."""
    monkeypatch.setattr(aligning, "MIN_READ_ROWS", 20)
    settings = {"learning_rate": 1e-3, "eval_counts": (33, 20, 11), "load_best_model_at_end": chooses}
    whole = trained(tmp_path, **settings)
    assert (
        len(whole.sampled_rows()) < len(whole.train_labels) and whole.state.best_global_step == whole.state.global_step
    )
    scores = whole.finish()
    tensors = load_file(tmp_path / "model.safetensors")
    resumed = make_trainer(tmp_path, model=make_model(id2label=NAMES), num_train_epochs=1, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.finish()["eval_loss"] == scores["eval_loss"]
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("case", ["other rows", "earlier weights", "folder differs"])
def test_what_the_evaluations_do_not_tell_is_read_again(tmp_path, monkeypatch, case):
    rows = CountedRows((190, 160, 290), seed=4)
    trainer = trained(tmp_path, eval_dataset=rows, load_best_model_at_end=False)
    if case == "other rows":
        trainer.eval_dataset = rows = CountedRows((190, 160, 290), seed=5)
    elif case == "earlier weights":
        trainer._evaluated = (trainer.state.global_step - 1, *trainer._evaluated[1:])
    else:
        load = finishing.load_stock

        def changed(folder, task, **options):
            model = load(folder, task, **options)
            model.classifier.bias.data += torch.tensor([0.0, 0.0, 5.0])
            return model

        monkeypatch.setattr(finishing, "load_stock", changed)
    before = rows.read
    results = trainer.finish()
    assert rows.read == before + 640 + 3 * 128
    if case != "folder differs":
        assert results["eval_loss"] == pytest.approx(saved_scores(trainer, rows)["loss"], rel=1e-5)


def test_the_last_penalty_is_the_one_by_which_validation_rows_are_likeliest(tmp_path):
    trainer = trained(tmp_path / "a")
    features, labels = (found := trainer.read(trainer.eval_dataset, "")).features, found.labels
    trainer.finish()
    (kept,) = load_statistics(tmp_path / "a").values()

    def loss(penalty):
        logits = score_features([kept.rows], features, [True])(penalty, torch.arange(len(labels)))
        return fit_balanced(logits, labels, trainer.class_counts)[2]

    assert kept.penalty == min(PENALTIES, key=lambda penalty: (loss(penalty), -penalty))
    assert trainer.alignment["penalties"] == (kept.penalty,)
    assert (kept.logit_scale, kept.prior_strength) != (1.0, 0.0)


@pytest.mark.parametrize("settings", [{"frame_penalty": 0.37}, {"num_train_epochs": 0}])
def test_a_penalty_that_is_given_or_chosen_by_features_that_never_saw_the_labels_stays(tmp_path, settings):
    trainer = trained(tmp_path, **settings)
    before = trainer.alignment["penalties"]
    trainer.finish()
    (kept,) = load_statistics(tmp_path).values()
    assert (kept.penalty,) == before == trainer.alignment["penalties"]


def test_the_head_is_set_from_the_features_of_the_best_weights(tmp_path):
    falling = itertools.count(0, -1)  # the first epoch is the best
    settings = {"num_train_epochs": 3, "metric_for_best_model": "falling", "greater_is_better": True}
    trainer = make_trainer(tmp_path, compute_metrics=lambda _: {"falling": float(next(falling))}, **settings)
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    trainer.finish()
    (kept,) = load_statistics(tmp_path).values()
    model = ETFForImageClassification.from_pretrained(tmp_path)
    again = align_head(model, trainer.rows_loader(trainer.alignment_dataset), class_counts=trainer.class_counts)
    assert torch.allclose(kept.rows.sums, again.statistics[0].sums, atol=1e-4)


def test_what_cannot_be_finished_is_told_and_nothing_is_written(tmp_path):
    trainer = trained(tmp_path, save_strategy="no", load_best_model_at_end=False)
    left = sorted(tmp_path.iterdir())
    rows = trainer.eval_dataset
    for options, words in (
        ({"prior_adjustment": "fitted"}, "`prior_adjustment` .='fitted'. must be one of 'auto', 'fit', 'none'"),
        ({"eval_dataset": {"a": rows, "b": rows}}, r"pass the one to calibrate on, of \['a', 'b'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer.finish(**options)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="is fitted on validation rows: give some"):
        trainer.finish(prior_adjustment="fit")
    trainer.class_counts = None
    with pytest.raises(ValueError, match=r"`train_dataset` .=None. is needed"):
        trainer.finish()
    assert sorted(tmp_path.iterdir()) == left


COUNTED = np.array([5, 2, 1])


@pytest.mark.parametrize(
    ("head", "choice", "has_validation", "adjusts"),
    [("etf", "auto", True, True), ("etf", "auto", False, False), ("linear", "auto", True, False),
     ("linear", "fit", True, True), ("etf", "none", True, False)],
)  # fmt: skip
def test_the_prior_is_adjusted_for_by_default_where_a_fixed_head_can_take_it(head, choice, has_validation, adjusts):
    assert is_adjusted(make_model(head=head), choice, COUNTED, has_validation=has_validation) == adjusts


def test_a_prior_of_classes_without_rows_is_refused():
    assert not is_adjusted(make_model(), "auto", np.array([3, 0, 2]), has_validation=True)
    with pytest.raises(ValueError, match="needs training rows of each class, and class 1 has none: take 'none'"):
        is_adjusted(make_model(head="linear"), "fit", np.array([3, 0, 2]), has_validation=True)
    with pytest.raises(ValueError, match="`prior_adjustment` finite"):
        make_model().set_calibration(1.0, [0.0, math.nan, 0.0])
