"""Laws of refit: figures are those of the folder that it writes, rows that the features saw choose nothing, names decide."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import small_texts
import torch
from small_card import card_facts
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    pipeline,
)

from etf_adapt import ETFForSequenceClassification, evaluate, extend, finetune, predict, refit
from etf_adapt.commands.refit import main
from etf_adapt.data.load import load_data
from etf_adapt.errors import DataError, OutputFolderError
from etf_adapt.heads.seen_rows import SEEN_PENALTY
from etf_adapt.hub.check import check_folder
from etf_adapt.inference.head_statistics import follows, load_statistics
from etf_adapt.inference.refit import _run_of
from etf_adapt.inference.rows import prepare_rows
from etf_adapt.results.run_folder import ARGUMENTS_FILE, FACTS_FILE, STATISTICS_FILE, write_json

COUNTS = {"ash": 60, "birch": 15, "cedar": 4}
EVEN = dict.fromkeys(COUNTS, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    train = small_texts.rows(COUNTS, 0)
    small_texts.write(folder / "own", train=train, validation=small_texts.rows(EVEN, 1), test=small_texts.rows(EVEN, 2))
    small_texts.write(folder / "cut", train=train)
    small_texts.stock_folder(folder / "model")
    return folder


def recalls(model, folder, texts):
    """Score texts by a stock model: the mean recall of its classes, by name."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**tokenizer([text for text, _ in texts], padding=True, return_tensors="pt")).logits
    right = {name: [] for name in COUNTS}
    for (_, name), index in zip(texts, logits.argmax(dim=1).tolist(), strict=True):
        right[name].append(model.config.id2label[index] == name)
    return np.mean([np.mean(values) for values in right.values()])


def test_scores_before_and_after_are_those_of_the_stock_folders(place, tmp_path):
    result = refit(place / "model", str(place / "own"), output=tmp_path / "new")
    held = small_texts.rows(EVEN, 1)
    stock, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    assert stock.config.id2label == dict(enumerate(small_texts.NAMES))
    before = AutoModelForSequenceClassification.from_pretrained(place / "model")
    assert result.before["balanced_accuracy"] == pytest.approx(recalls(before, place / "model", held))
    assert result.after["balanced_accuracy"] == pytest.approx(recalls(stock, tmp_path / "new", held))
    assert result.after["balanced_accuracy"] > 0.2 + result.before["balanced_accuracy"]
    assert (
        result.is_set
        and result.rows == 79
        and result.judge == "validation rows of the data set, taken as unseen by the model"
    )
    assert pipeline("text-classification", str(tmp_path / "new"))(held[0][0])[0]["label"] in COUNTS
    statistics = load_statistics(tmp_path / "new")["classifier"]
    assert statistics.rows.counts.tolist() == [COUNTS[name] for name in small_texts.NAMES]
    assert follows(result.model.classifier, statistics)
    assert "balanced accuracy" in (tmp_path / "new" / "README.md").read_text()
    assert STATISTICS_FILE not in check_folder(tmp_path / "new")


@pytest.mark.parametrize(
    ("data", "options", "words", "rows", "chooses"),
    [
        ("own", {}, "validation rows of the data set, taken as unseen by the model", 79, True),
        ("cut", {"held_out": "share"}, "a share of the training rows, unseen by the model as you say", 79, True),
        ("cut", {}, "rows that the model was trained on, which say little of new ones", 79, False),
        ("own", {"held_out": "none"}, "rows that the model was trained on, which say little of new ones", 79, False),
        ("cut", {"new_labels": True}, "each training row scored without itself", 79, True),
    ],
)
def test_only_rows_that_the_features_did_not_see_choose(place, data, options, words, rows, chooses):
    result = refit(place / "model", str(place / data), **options)
    assert (result.judge, result.rows) == (words, rows)
    if chooses:
        assert result.calibration[0] == result.model.etf_settings["logit_scale"]
    else:
        assert (result.penalty, result.calibration) == (SEEN_PENALTY, None)
        assert result.model.etf_settings["prior_adjustment"] is None
    assert any(words in line for line in result.describe())


def test_each_row_counts_once_whatever_judges(place):
    for options in ({"held_out": "none"}, {"validation_fraction": 0.0}, {"held_out": "share"}):
        result = refit(place / "model", str(place / "cut"), force=True, **options)
        assert (result.rows, sum(result.model.etf_settings["class_counts"])) == (79, 79), options


def test_a_run_on_rows_of_ones_own_tells_nothing_of_a_data_set(place, tmp_path):
    folder = small_texts.stock_folder(tmp_path / "run")
    write_json(tmp_path / "run" / ARGUMENTS_FILE, {"seed": 5})
    write_json(tmp_path / "run" / FACTS_FILE, {"facts": vars(card_facts(dataset={"name": "own data"}))})
    for dataset in ("digits", str(place / "cut")):
        assert _run_of(str(folder), dataset) == {}


def test_rows_kept_out_to_judge_are_in_the_head_at_last(place):
    result = refit(place / "model", str(place / "cut"), held_out="share")
    whole = refit(place / "model", str(place / "cut"), held_out="none", penalty=result.penalty, force=True)
    left, right = (head.model.classifier.weight / head.model.classifier.weight.norm() for head in (result, whole))
    assert torch.allclose(left, right, atol=1e-6)


def test_of_many_rows_a_sample_sets_the_head_and_the_prior_is_that_of_all(place, tmp_path):
    result = refit(place / "model", str(place / "own"), max_rows=24, output=tmp_path / "new")
    names = [result.model.config.id2label[label] for label in range(3)]
    assert (result.rows, result.all_rows) == (24, 79) and "24 of 79 rows, a sample" in result.describe()[0]
    (statistics,) = load_statistics(tmp_path / "new").values()
    assert dict(zip(names, statistics.rows.counts.tolist(), strict=True)) == {"ash": 10, "birch": 10, "cedar": 4}
    assert dict(zip(names, result.model.etf_settings["class_counts"], strict=True)) == COUNTS
    offsets = dict(zip(names, statistics.offsets.tolist(), strict=True))
    _, strength = result.calibration
    assert strength > 0.01
    assert offsets["cedar"] - offsets["ash"] == pytest.approx(strength * np.log(60 / 4))

    # With rows added the head follows from the sample and these, and its prior from all.
    small_texts.write(tmp_path / "more", train=small_texts.rows({"cedar": 6, "dogwood": 3}, 3))
    more = extend(tmp_path / "new", str(tmp_path / "more"), output=tmp_path / "extended")
    assert more.class_counts == {**COUNTS, "cedar": 10, "dogwood": 3}
    (grown,) = load_statistics(tmp_path / "extended").values()
    assert grown.rows.counts.sum() == 33
    assert dict(zip(more.class_counts, grown.class_counts.tolist(), strict=True)) == more.class_counts
    assert follows(more.model.classifier, grown)
    with pytest.raises(ValueError, match="was set from a sample of its rows"):
        extend(tmp_path / "new", remove=str(tmp_path / "more"))
    assert refit(place / "model", str(place / "own"), max_rows=79).rows == 79


def test_the_validation_rows_of_the_run_that_made_a_model_judge_it(place, tmp_path):
    folder = small_texts.stock_folder(tmp_path / "run")
    data = load_data(str(place / "cut"), validation_fraction=0.25, seed=5)
    arguments = {"dataset": str(place / "cut"), "validation_fraction": 0.25, "seed": 5, "freeze": "none"}
    write_json(tmp_path / "run" / ARGUMENTS_FILE, arguments)
    write_json(tmp_path / "run" / FACTS_FILE, {"facts": vars(card_facts(dataset=data.description))})
    result = refit(folder, str(place / "cut"))
    assert result.judge == "validation rows of the run that made the model"
    assert result.rows == 79
    assert refit(folder, str(place / "cut"), seed=6).calibration is None  # other rows, which the run had trained on
    write_json(tmp_path / "run" / ARGUMENTS_FILE, {**arguments, "dataset": "other/cut"})  # of the same last name
    assert "run that made the model" not in refit(folder, str(place / "cut")).judge
    write_json(tmp_path / "run" / ARGUMENTS_FILE, {**arguments, "freeze": "backbone"})
    assert refit(folder, str(place / "cut")).judge == "each training row scored without itself"


def test_a_head_that_is_better_is_left_alone_unless_forced(place, tmp_path):
    texts = small_texts.rows(EVEN, 1)
    model = AutoModelForSequenceClassification.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    with torch.no_grad():  # a head that knows the rows which will judge
        batch = tokenizer([text for text, _ in texts], padding=True, return_tensors="pt")
        features = model.bert(**batch).pooler_output
    targets = torch.tensor([small_texts.NAMES.index(name) for _, name in texts])
    fitted = torch.nn.Linear(16, 3)
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=500)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(fitted(features), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    model.classifier.load_state_dict(fitted.state_dict())
    model.save_pretrained(tmp_path / "good")
    tokenizer.save_pretrained(tmp_path / "good")
    result = refit(tmp_path / "good", str(place / "own"), output=tmp_path / "new")
    assert not result.is_set and not (tmp_path / "new").exists()
    with torch.no_grad():
        assert torch.allclose(result.model.eval()(**batch).logits, model.eval()(**batch).logits, atol=1e-5)
    assert refit(tmp_path / "good", str(place / "own"), output=tmp_path / "new", force=True).is_set


def test_classes_without_names_take_those_of_the_data_set_and_others_go_by_name(place, tmp_path, caplog):
    unnamed = small_texts.stock_folder(tmp_path / "unnamed", [f"LABEL_{index}" for index in range(3)])
    assert refit(unnamed, str(place / "own")).model.config.id2label == dict(enumerate(sorted(small_texts.NAMES)))
    assert "have no names" in caplog.text
    other = small_texts.stock_folder(tmp_path / "other", ["ash", "birch", "dogwood"])
    with pytest.raises(DataError, match=r"unknown to the model: `cedar`.*new_labels"):
        refit(other, str(place / "own"))
    more = small_texts.stock_folder(tmp_path / "more", [*small_texts.NAMES, "dogwood"])
    with pytest.raises(DataError, match="without rows: `dogwood`"):
        refit(more, str(place / "own"))
    with pytest.raises(DataError, match=r"`held_out` \(='share'\) is for data sets without"):
        refit(place / "model", str(place / "own"), held_out="share")


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_an_encoder_becomes_a_classifier_by_new_labels_alone(place, tmp_path, pooling):
    BertModel.from_pretrained(place / "model").save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds no trained classifier"):
        refit(tmp_path / "encoder", str(place / "own"), pooling=pooling)
    result = refit(tmp_path / "encoder", str(place / "own"), new_labels=True, pooling=pooling, output=tmp_path / "new")
    assert result.before == {} and result.after["balanced_accuracy"] > 0.5
    assert (tmp_path / "new" / "modules.json").exists() == (pooling == "mean")
    assert refit(tmp_path / "new", str(place / "own")).before["balanced_accuracy"] > 0.5


def test_classes_of_one_row_each_leave_nothing_to_choose_by(place, tmp_path):
    single = small_texts.write(tmp_path / "single", train=small_texts.rows(dict.fromkeys(COUNTS, 1), 3))
    result = refit(place / "model", single, new_labels=True)
    assert (result.rows, result.after, result.calibration, result.penalty) == (3, {}, None, SEEN_PENALTY)


def test_the_command_says_what_was_done_in_one_line_each(place, tmp_path, capsys):
    output = str(tmp_path / "new")
    main([str(place / "model"), str(place / "own"), "--output", output, "--keep_statistics", "false"])
    said = capsys.readouterr().out
    assert said.startswith("head in closed form from 79 rows, penalty") and f"{output} (" in said
    assert not (tmp_path / "new" / STATISTICS_FILE).exists()
    with pytest.raises(OutputFolderError, match="holds something already"):
        refit(place / "model", str(place / "own"), output=output)
    with pytest.raises(SystemExit) as ended:
        main([str(place / "model"), str(place / "nowhere"), "--output", str(tmp_path / "other")])
    assert ended.value.code == 2
    assert json.loads((tmp_path / "new" / "config.json").read_text())["etf_adapt"]["head"]["frame"] == "whitened"


def test_the_folder_of_the_result_is_named_after_the_models(place, monkeypatch, capsys):
    given = {}

    def note(**options):
        given.update(options)
        raise ValueError("noted")

    monkeypatch.chdir(place / "model")
    monkeypatch.setattr("etf_adapt.inference.refit.refit", note)
    with pytest.raises(SystemExit):
        main([".", "rows.csv", "--keep_statistics", "no"])
    assert (given["output"], given["keep_statistics"]) == ("model-refitted", False)
    with pytest.raises(SystemExit):
        main([".", "rows.csv", "--keep_statistics", "ture"])
    assert "'ture' must be true or false" in capsys.readouterr().err


def test_pairs_of_columns_reach_the_model_as_pairs(place, tmp_path):
    texts = small_texts.rows(EVEN, 3)
    lines = "".join(f"{text},{other},{label}\n" for (text, label), (other, _) in zip(texts, small_texts.rows(EVEN, 4)))
    (tmp_path / "t.csv").write_text(f"premise,hypothesis,label\n{lines}")
    columns, data = ["premise", "hypothesis"], str(tmp_path / "t.csv")
    alone = refit(str(place / "model"), data, text_column="premise", held_out="none", force=True).model
    pairs = refit(str(place / "model"), data, text_column=columns, held_out="none", force=True).model
    flags = ["--output", str(tmp_path / "out"), "--held_out", "none", "--force", "--text_column", *columns]
    main([str(place / "model"), data, *flags])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded.classifier.weight, pairs.classifier.weight)
    assert not torch.allclose(loaded.classifier.weight, alone.classifier.weight)


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}])
def test_the_length_that_texts_were_cut_to_holds_wherever_the_folder_is_read(place, tmp_path, options):
    first, second, data = str(tmp_path / "run"), str(tmp_path / "refitted"), str(place / "own")
    made = finetune(str(place / "model"), data, output_dir=first, max_length=3, num_train_epochs=0, **options)
    texts = load_data(data).test["text"][:]
    with open(tmp_path / "run" / "predictions.csv", newline="") as stream:
        expected = [float(row["confidence"]) for row in csv.DictReader(stream)]
    whole = [row["probability"] for row in predict(first, texts, max_length=6)]
    assert not np.allclose(whole, expected, atol=1e-4)
    np.testing.assert_allclose([row["probability"] for row in predict(first, texts)], expected, atol=1e-5)
    assert evaluate(first, data).scores["loss"] == pytest.approx(made.scores["test_loss"], abs=1e-5)
    if not options:
        stock = pipeline("text-classification", model=first)(list(texts), truncation=True)
        np.testing.assert_allclose([row["score"] for row in stock], expected, atol=1e-5)
    refit(first, data, output=second, force=True)
    assert AutoTokenizer.from_pretrained(second).model_max_length == 3


def test_long_texts_are_cut_to_512_tokens_unless_more_is_asked_for_and_kept(place, tmp_path):
    config = BertConfig.from_pretrained(place / "model", max_position_embeddings=2048)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "long")
    AutoTokenizer.from_pretrained(place / "model", model_max_length=2048).save_pretrained(tmp_path / "long")
    small_texts.write(tmp_path / "data", train=[("w1 " * count, name) for name in COUNTS for count in (2000, 1, 1, 1)])
    data, lengths = load_data(str(tmp_path / "data")), []
    folder = str(tmp_path / "long")
    for asked in (None, 1024, None):  # the last time of a folder that this library wrote
        model = ETFForSequenceClassification.from_pretrained(folder, id2label=data.id2label)
        rows = prepare_rows(model, folder, data, max_length=asked)
        lengths.append((max(rows.train["length"]), rows.processor.model_max_length))
        if asked:
            folder = str(tmp_path / "ours")
            model.save_pretrained(folder)
    assert lengths == [(512, 512), (1024, 1024), (1024, 1024)]
