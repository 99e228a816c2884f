"""Laws of evaluate: the scores that follow from the predictions, classes by name, and counts whose origin is said."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from small_models import NAMES, finished, pair_tokenizer, processor, stock_bert
from transformers import AutoModelForSequenceClassification

import etf_adapt
from etf_adapt.commands.evaluate import main
from etf_adapt.errors import DataError

TEXTS = ["a tree", "tree tree", "x", "a a a", "tree x tree", "a x", "x x", "tree a", "x a"]
LABELS = ["ash", "cedar", "birch", "ash", "cedar", "cedar", "ash", "birch", "cedar"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A stock folder with class names, without class counts."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = stock_bert()
    model.config.id2label, model.config.label2id = NAMES, {name: index for index, name in NAMES.items()}
    model.classifier = torch.nn.Linear(16, 3)
    model.num_labels = model.config.num_labels = 3
    model.classifier.weight.data *= 50
    tokens = [processor("bert")([text], return_tensors="pt") for text in TEXTS]
    with torch.no_grad():  # so that each class is predicted
        model.classifier.bias -= torch.cat([model(**text).logits for text in tokens]).mean(dim=0)
    model.save_pretrained(folder)
    processor("bert").save_pretrained(folder)
    return str(folder)


def rows(texts=TEXTS, labels=LABELS, names=None):
    if names is None:
        return Dataset.from_dict({"text": texts, "label": labels})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": texts, "label": [names.index(label) for label in labels]}, features=features)


def table(folder, name, labels=LABELS):
    file = folder / name
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(TEXTS, labels)))
    return str(file)


def predicted(model, texts=TEXTS):
    return [row["label"] for row in etf_adapt.predict(model, texts)]


def test_scores_are_those_of_the_predictions(bert):
    found = etf_adapt.evaluate(bert, rows(), batch_size=2)
    best, names = predicted(bert), list(NAMES.values())
    assert [names[label] for label in found.rows.predictions] == best and len({*best}) > 1
    assert found.scores["accuracy"] == pytest.approx(np.mean(np.array(best) == np.array(LABELS)))
    recalls = [np.mean([guess == name for guess, label in zip(best, LABELS) if label == name]) for name in names]
    assert found.scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    probabilities = [row["probability"] for row in etf_adapt.predict(bert, TEXTS)]
    np.testing.assert_allclose(found.rows.confidences, probabilities, atol=1e-6)


def test_classes_are_matched_by_name_whatever_their_order(bert):
    expected = etf_adapt.evaluate(bert, rows()).scores
    for names in (["cedar", "ash", "birch"], ["birch", "fir", "cedar", "ash"]):
        assert etf_adapt.evaluate(bert, rows(names=names)).scores == expected


def test_unknown_classes_are_an_error_or_left_out_and_absent_ones_are_said(bert, caplog):
    labels = ["ashes" if label == "birch" else label for label in LABELS]
    known = [place for place, label in enumerate(labels) if label != "ashes"]
    with pytest.raises(
        DataError, match=r"has 2 of 9 rows of 1 class\(es\) .* not know: `ashes` .nearest: `ash`.*'skip'"
    ):
        etf_adapt.evaluate(bert, rows(labels=labels))
    found = etf_adapt.evaluate(bert, rows(labels=labels), unknown_classes="skip")
    rest = etf_adapt.evaluate(bert, rows([TEXTS[place] for place in known], [labels[place] for place in known]))
    assert found.left_out == 2 and found.rows.row_ids.tolist() == known and found.scores == rest.scores
    assert "no rows of 1 class(es) of the model: `birch`" in caplog.text
    with pytest.raises(DataError, match=r"9 of 9 rows .*: mend the names\.$"):
        etf_adapt.evaluate(bert, rows(labels=["x", "y", "z"] * 3), unknown_classes="skip")


def test_class_counts_are_the_models_else_those_of_train_else_unknown(bert, tmp_path):
    model = finished("bert")
    model.save_pretrained(tmp_path / "ours")
    splits = DatasetDict(train=rows(TEXTS[:5], ["cedar", "cedar", "cedar", "ash", "ash"]), test=rows())
    splits.save_to_disk(tmp_path / "data")
    ours = etf_adapt.evaluate(str(tmp_path / "ours"), str(tmp_path / "data"))
    assert ours.class_counts.tolist() == [9, 3, 1] and ours.counted == "of the model's training"
    stock = etf_adapt.evaluate(bert, str(tmp_path / "data"))
    assert stock.class_counts.tolist() == [2, 0, 3] and stock.split == "test" and "train split" in stock.counted
    alone = etf_adapt.evaluate(bert, table(tmp_path, "held_out.csv"))
    assert alone.class_counts is None and alone.scores["few"] is None and alone.split == "test"
    for counts in ([5, 50, 500], np.array([5, 50, 500])):
        assert etf_adapt.evaluate(bert, rows(), class_counts=counts).scores["many"] is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shot_bounds": [100, 20]}, r"`shot_bounds` \(=\(100, 20\)\)"),
        ({"class_counts": [1, 2]}, "`class_counts` has 2 entries, the model 3 classes"),
        ({"class_counts": [1.5, 2.0, 3.0]}, "must hold the training rows of each class"),
    ],
)
def test_wrong_counts_are_known_before_a_row_is_read(bert, monkeypatch, options, words):
    monkeypatch.setattr("etf_adapt.inference.classifier.predict_rows", lambda *_, **__: pytest.fail("rows were read"))
    with pytest.raises(ValueError, match=words):
        etf_adapt.evaluate(bert, rows(), **options)


def test_weights_that_are_not_whole_are_named(tmp_path):
    finished("bert").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    for content in (weights.read_bytes()[:-100], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"):
        weights.write_bytes(content)
        with pytest.raises(OSError, match="model` holds weights that are not whole"):
            etf_adapt.evaluate(str(tmp_path / "model"), rows())
        with pytest.raises(OSError, match="model` holds weights that are not whole"):
            etf_adapt.ETFForSequenceClassification.from_pretrained(tmp_path / "model")


def test_a_finished_model_scores_without_its_adjustment_too(tmp_path):
    model = finished("bert")
    model.save_pretrained(tmp_path)
    found = etf_adapt.evaluate(str(tmp_path), rows())
    names = list(NAMES.values())
    with torch.no_grad():
        logits = torch.cat([model.eval()(**model.processor([text], return_tensors="pt")).logits for text in TEXTS])
    before = (logits - torch.tensor([0.5, 0.0, -0.5])).argmax(1)
    recalls = [
        np.mean([names[guess] == name for guess, label in zip(before, LABELS) if label == name]) for name in names
    ]
    assert found.scores["balanced_accuracy_unadjusted"] == pytest.approx(np.mean(recalls))


def test_pairs_are_scored_as_they_are_predicted(bert, tmp_path, capsys):
    AutoModelForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path / "model")
    pair_tokenizer().save_pretrained(tmp_path / "model")
    pairs = [*zip(TEXTS, reversed(TEXTS))]
    lines = "".join(f"{first},{second},{label}\n" for (first, second), label in zip(pairs, LABELS))
    (tmp_path / "t.csv").write_text(f"premise,hypothesis,label\n{lines}")
    columns, model = ["premise", "hypothesis"], str(tmp_path / "model")
    found = etf_adapt.evaluate(model, str(tmp_path / "t.csv"), text_column=columns)
    rows = [*etf_adapt.predict(model, pairs)]
    assert [found.label_names[label] for label in found.rows.predictions] == [row["label"] for row in rows]
    np.testing.assert_allclose(found.rows.confidences, [row["probability"] for row in rows], atol=1e-6)
    alone = etf_adapt.evaluate(model, str(tmp_path / "t.csv"), text_column="premise")
    assert not np.allclose(alone.rows.confidences, found.rows.confidences)
    main([model, str(tmp_path / "t.csv"), "--text_column", *columns, "--output_dir", str(tmp_path / "scores")])
    results = json.loads((tmp_path / "scores" / "all_results.json").read_text())
    assert results["test_loss"] == found.scores["loss"]


def test_a_bad_row_is_named(bert):
    with pytest.raises(DataError, match="Input 2 cannot be read: the text is empty"):
        etf_adapt.evaluate(bert, rows([*TEXTS[:2], " ", *TEXTS[3:]]))
    with pytest.raises(DataError, match="The model reads texts, and column `image` holds images"):
        etf_adapt.evaluate(bert, etf_adapt.load_data("digits").test)


# The command


def test_report_and_files_hold_the_scores(bert, tmp_path, capsys):
    data, folder = table(tmp_path, "t.csv"), tmp_path / "scores"
    main([bert, data, "--output-dir", str(folder)])
    found = etf_adapt.evaluate(bert, data)
    printed = capsys.readouterr().out
    assert (
        "test split of" in printed
        and "mean of classes" in printed
        and "(not known)" in printed
        and "many" not in printed
    )
    results = json.loads((folder / "all_results.json").read_text())
    assert results["test_accuracy"] == found.scores["accuracy"] and results["rows"] == 9 and results["split"] == "test"
    listed = [*csv.DictReader((folder / "predictions.csv").open())]
    assert list(listed[0]) == ["row_id", "label", "prediction", "confidence"]  # as after training
    assert [row["label"] for row in listed] == LABELS and [row["prediction"] for row in listed] == predicted(bert)
    main([bert, data, "--output_dir", str(folder)])  # an earlier evaluation is replaced
    for other in (tmp_path, bert):
        with pytest.raises(SystemExit):
            main([bert, data, "--output_dir", str(other)])
        assert "which no evaluation wrote: choose another folder" in capsys.readouterr().err


def test_predictions_of_image_files_name_them(tmp_path):
    finished("micro").save_pretrained(tmp_path / "model")
    for number, name in enumerate(["ash/1.png", "birch/2.png", "cedar/3.png"]):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        Image.new("RGB", (9, 9), (number * 90, 0, 0)).save(tmp_path / "data" / name)
    main([str(tmp_path / "model"), str(tmp_path / "data"), "--output_dir", str(tmp_path / "scores")])
    listed = [*csv.DictReader((tmp_path / "scores" / "predictions.csv").open())]
    assert [row["file"] for row in listed] == [
        str(tmp_path / "data" / f"{name}") for name in ("ash/1.png", "birch/2.png", "cedar/3.png")
    ]
