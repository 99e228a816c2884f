"""Laws of extend: with rows added it is the head of all rows, taking them away undoes it, and stock readers see nothing."""

from __future__ import annotations

import pytest
import small_texts
import timm
import torch
from slow_cases import rest_slow
from small_run import make_trainer
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

from etf_adapt import ETFForImageClassification, evaluate, extend, refit
from etf_adapt.commands.extend import main
from etf_adapt.errors import DataError
from etf_adapt.inference.head_statistics import follows, load_statistics
from etf_adapt.results.run_folder import STATISTICS_FILE

COUNTS = {"ash": 30, "birch": 12, "cedar": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows A and B, all of them, and a model refitted to each of A and all with the same penalty."""
    folder = tmp_path_factory.mktemp("texts")
    first, second = small_texts.rows(COUNTS, 0), small_texts.rows({"ash": 3, "birch": 2, "cedar": 2, "dogwood": 5}, 1)
    old = [row for row in second if row[1] != "dogwood"]
    for name, rows in {"a": first, "b": old, "new": second, "both": first + old, "all": first + second}.items():
        small_texts.write(folder / name, train=rows)
    small_texts.write(folder / "one", train=[row for row in second if row[1] == "dogwood"][:1])
    small_texts.write(folder / "cedars", train=[row for row in first if row[1] == "cedar"])
    small_texts.stock_folder(folder / "model")
    settings = {"new_labels": True, "penalty": 3.0}
    for name in ("a", "both", "all"):
        refit(folder / "model", str(folder / name), output=folder / f"refit_{name}", **settings)
    return folder


def directions(model):
    """Return class vectors and biases before calibration, by class name: what the law of the same scale leaves open."""
    weight, bias = model.classifier.class_vectors()
    adjustment = torch.tensor(model.etf_settings["prior_adjustment"] or [0.0], dtype=torch.float64)
    rows = torch.cat([weight, (bias - adjustment).unsqueeze(1)], dim=1) / weight.norm()
    return {name: rows[index] for index, name in model.config.id2label.items()}


def same(left, right, tolerance=1e-5):
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], atol=tolerance) for name in left)


def test_a_changed_model_is_scored_as_it_is_in_memory(place, tmp_path):
    result = extend(place / "refit_a", str(place / "new"))
    extend(place / "refit_a", str(place / "new"), output=tmp_path / "more")
    here, there = (
        evaluate(model, str(place / "all"), split="train", **options)
        for model, options in ((result.model, {"processor": result.model.processor}), (str(tmp_path / "more"), {}))
    )
    assert here.scores == pytest.approx(there.scores) and here.class_counts.tolist() == there.class_counts.tolist()


def load(folder):
    from etf_adapt import ETFForSequenceClassification

    return ETFForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(("added", "whole"), [("b", "refit_both"), ("new", "refit_all")])
def test_an_extended_head_is_that_of_all_rows_together(place, tmp_path, added, whole):
    result = extend(place / "refit_a", str(place / added), output=tmp_path / "more")
    assert same(directions(result.model), directions(load(place / whole)))
    assert (result.added, result.new_classes) == ((7, []) if added == "b" else (12, ["dogwood"]))
    # Penalty, scale and strength are carried, the prior is that of the new counts.
    before, after = (load_statistics(folder)["classifier"] for folder in (place / "refit_a", tmp_path / "more"))
    assert (before.penalty, before.logit_scale, before.prior_strength) == (
        after.penalty,
        after.logit_scale,
        after.prior_strength,
    )
    assert result.model.etf_settings["prior_adjustment"] == pytest.approx(after.offsets.tolist())
    assert result.model.etf_settings["class_counts"] == [*result.class_counts.values()]
    stock, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more", output_loading_info=True)
    assert not any(info.values()) and follows(result.model.classifier, after)
    assert torch.equal(stock.classifier.weight, result.model.classifier.weight)
    assert "was not evaluated" in (tmp_path / "more" / "README.md").read_text()


def test_a_decoder_without_a_bias_is_refitted_and_extended(place, tmp_path):
    folder = small_texts.stock_folder(tmp_path / "decoder", is_decoder=True)
    first = refit(folder, str(place / "both"), output=tmp_path / "first", held_out="share", force=True).model
    assert first.etf_settings["prior_adjustment"] is None
    more = extend(tmp_path / "first", str(place / "new"), output=tmp_path / "more").model
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more")
    assert stock.score.bias is None and torch.equal(stock.score.weight, more.score.weight)
    assert stock.config.pad_token_id is not None and stock.config.num_labels == 4


def test_taking_rows_away_undoes_adding_them(place, tmp_path):
    extend(place / "refit_a", str(place / "new"), output=tmp_path / "more")
    result = extend(tmp_path / "more", remove=str(place / "new"))
    assert result.dropped_classes == ["dogwood"]
    assert same(directions(result.model), directions(load(place / "refit_a")))


def test_a_class_of_one_row_comes_and_a_class_without_rows_goes(place):
    result = extend(place / "refit_a", str(place / "one"), remove=str(place / "cedars"))
    assert result.class_counts == {"ash": 30, "birch": 12, "dogwood": 1}
    assert result.model.config.id2label == {0: "ash", 1: "birch", 2: "dogwood"}
    assert result.model.classifier.weight.shape == (3, 16)


def test_what_is_not_there_is_not_taken_away(place, tmp_path):
    with pytest.raises(DataError, match="other rows than those to take away"):
        extend(place / "refit_a", remove=str(place / "both"))
    with pytest.raises(DataError, match="that the model lacks: `dogwood`"):
        extend(place / "refit_a", remove=str(place / "one"))
    with pytest.raises(DataError, match="fewer than two classes"):
        extend(place / "refit_a", remove=str(place / "a"))
    with pytest.raises(ValueError, match="set its head anew by refit"):
        extend(place / "model", str(place / "b"))
    model = load(place / "refit_a")
    with torch.no_grad():
        model.classifier.bias[0] += 1
    model.save_pretrained(tmp_path)
    (tmp_path / STATISTICS_FILE).write_bytes((place / "refit_a" / STATISTICS_FILE).read_bytes())
    with pytest.raises(ValueError, match="is not of this head"):
        extend(tmp_path, str(place / "b"))


def test_the_command_adds_a_table_of_a_few_rows(place, tmp_path, capsys):
    main([str(place / "refit_a"), str(place / "one" / "train.csv"), "--output", str(tmp_path / "more")])
    assert "1 rows added" in capsys.readouterr().out
    assert "dogwood" in load(tmp_path / "more").config.label2id


@pytest.mark.parametrize(
    ("settings", "keeps"),
    rest_slow(
        [({}, True), ({"realign": "never"}, False), ({"keep_statistics": False}, False), ({"frame": "random"}, False)],
        fast=2,
    ),
)
def test_a_finished_run_keeps_the_statistics_of_its_final_features(tmp_path, settings, keeps):
    trainer = make_trainer(tmp_path, num_train_epochs=1, **settings)
    trainer.train()
    assert not list(tmp_path.rglob(f"checkpoint-*/{STATISTICS_FILE}"))
    trainer.finish()
    assert (tmp_path / STATISTICS_FILE).exists() == keeps


@pytest.mark.parametrize("has_validation", [True, False])
@pytest.mark.parametrize("frame", rest_slow(["whitened", "means"], fast=1))
def test_statistics_of_a_run_give_the_calibrated_head_that_it_saves(tmp_path, frame, has_validation):
    settings = {} if has_validation else {"eval_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, num_train_epochs=1, frame=frame, **settings)
    if not has_validation:
        trainer.eval_dataset = None
    trainer.train()
    trainer.finish()
    found = load_statistics(tmp_path)["classifier"]
    assert found.frame == frame and follows(trainer.model.classifier, found)
    assert follows(ETFForImageClassification.from_pretrained(tmp_path).classifier, found)


def test_stock_readers_pass_over_the_statistics(place, tmp_path, recwarn):
    model = refit("micro", "digits", new_labels=True, penalty=1.0, output=tmp_path / "timm").model
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(pixel_values=images).logits
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(images), logits)
        stock, info = AutoModelForImageClassification.from_pretrained(tmp_path / "timm", output_loading_info=True)
        assert torch.equal(stock.eval()(images).logits, logits) and not any(info.values())
    assert pipeline("text-classification", str(place / "refit_a"))("w1 w2")[0]["label"] in COUNTS
    sentence = refit(place / "model", str(place / "a"), new_labels=True, pooling="mean", output=tmp_path / "mean")
    from sentence_transformers import SentenceTransformer

    scores = SentenceTransformer(str(tmp_path / "mean")).encode(["w1 w2"])
    assert scores.shape == (1, 3) and (tmp_path / "mean" / STATISTICS_FILE).exists() and sentence.is_set
    assert isinstance(ETFForImageClassification.from_pretrained(tmp_path / "timm"), ETFForImageClassification)
