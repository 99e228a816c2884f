"""Laws of predict: the stock model's probabilities, for every source of inputs, in order, and no half file."""

from __future__ import annotations

import csv
import gc
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from small_models import (
    NAMES,
    finished,
    pair_tokenizer,
    processor,
    save_tokenizer,
    stock_bert,
    stock_llama,
    stock_vit,
)
from transformers import AutoModelForSequenceClassification, pipeline

import etf_adapt
from etf_adapt.commands import predict as command
from etf_adapt.errors import DataError

TEXTS = ["a tree", "tree " * 9, "x", "a a a", "tree x tree", "a " * 20, "x x"]


def picture(seed, size=(11, 9)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images in no layout: files at the top and in folders, of several sizes, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(["b.png", "a/c.png", "a/deep/d.jpg", "z/e.png", "z/f.gif"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, (9 + number, 14)).save(folder / name)
    (folder / "notes.md").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A stock folder that this library has never seen."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = stock_vit(3)
    model.config.id2label, model.config.label2id = NAMES, {name: index for index, name in NAMES.items()}
    model.classifier.weight.data *= 50
    model.save_pretrained(folder)
    processor("vit").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = stock_bert()
    model.classifier.weight.data *= 50
    model.save_pretrained(folder)
    processor("bert").save_pretrained(folder)
    return folder


def rows_of(model, inputs, **options):
    return list(etf_adapt.predict(str(model), inputs, **{"probabilities": True, **options}))


def table(rows):
    return np.array([[value for name, value in row.items() if name.startswith("probability:")] for row in rows])


def from_pipeline(kind, model, inputs, **options):
    found = pipeline(kind, model=str(model), top_k=None)(inputs, **options)
    return [{entry["label"]: entry["score"] for entry in entries} for entries in found]


def assert_like(rows, expected):
    assert len(rows) == len(expected)
    for row, scores in zip(rows, expected):
        best = max(scores, key=scores.get)
        assert row["label"] == best and row["probability"] == pytest.approx(scores[best], abs=1e-6)
        assert {
            f"probability:{name}": pytest.approx(score, abs=1e-6) for name, score in scores.items()
        }.items() <= row.items()


def test_images_have_the_probabilities_of_the_stock_pipeline(vit, photos):
    rows = rows_of(vit, str(photos))
    files = [str(photos / name) for name in ("a/c.png", "a/deep/d.jpg", "b.png", "z/e.png", "z/f.gif")]
    assert [row["file"] for row in rows] == files and [row["row"] for row in rows] == [*range(5)]
    assert_like(rows, from_pipeline("image-classification", vit, files))
    opened = [Image.open(file) for file in files]
    assert_like(rows_of(vit, opened), from_pipeline("image-classification", vit, opened))


@pytest.mark.parametrize("name", ["resnet", "vit", "micro"])
def test_folders_of_this_library_and_of_timm_are_read_as_stock_readers_do(name, photos, tmp_path):
    finished(name).save_pretrained(tmp_path)
    files = [str(photos / "b.png"), str(photos / "z/e.png")]
    assert_like(rows_of(tmp_path, files), from_pipeline("image-classification", tmp_path, files))


def test_timms_own_export_is_read(tmp_path, photos):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=3)
    timm.models.save_for_hf(
        model, tmp_path, model_config={"label_names": ["ash", "birch", "cedar"]}, model_args={"num_classes": 3}
    )
    (row,) = rows_of(tmp_path, str(photos / "b.png"))
    from timm.data import create_transform, resolve_data_config

    image = create_transform(**resolve_data_config(model=model))(Image.open(photos / "b.png").convert("RGB"))
    with torch.no_grad():
        expected = model.eval()(image[None]).softmax(-1)[0]
    np.testing.assert_allclose(table([row])[0], expected, atol=1e-6)


def test_texts_have_the_probabilities_of_the_stock_pipeline(bert, tmp_path):
    assert_like(rows_of(bert, TEXTS), from_pipeline("text-classification", bert, TEXTS))
    torch.manual_seed(0)
    llama = stock_llama()
    llama.config.pad_token_id = None
    llama.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="</s>")
    (alone,) = rows_of(tmp_path, ["tree"])
    together = rows_of(tmp_path, ["tree tree x x x", "tree"])
    np.testing.assert_allclose(table([alone]), table(together[1:]), atol=1e-6)


def test_a_folder_of_mean_pooling_is_read_as_its_own_library_reads_it(tmp_path):
    model = finished("pooled").eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = [
            model(**model.processor([text], return_tensors="pt")).logits[0].softmax(-1).tolist() for text in TEXTS
        ]
    np.testing.assert_allclose(table(rows_of(tmp_path, TEXTS)), expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_changes_nothing(bert, vit, photos, batch_size):
    for model, inputs in ((bert, TEXTS * 3), (vit, str(photos))):
        rows = rows_of(model, inputs, batch_size=batch_size)
        assert [row["row"] for row in rows] == [*range(len(rows))]
        np.testing.assert_allclose(table(rows), table(rows_of(model, inputs)), atol=1e-6)


def test_workers_change_nothing(vit, photos):
    assert rows_of(vit, str(photos), num_workers=2, batch_size=2) == rows_of(vit, str(photos), batch_size=2)


def test_every_source_of_the_same_texts_gives_the_same_rows(bert, tmp_path):
    expected = rows_of(bert, TEXTS)
    (tmp_path / "t.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "t.csv").write_text("id,message,label\n" + "".join(f"{id},{text},a\n" for id, text in enumerate(TEXTS)))
    (tmp_path / "t.tsv").write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    Dataset.from_dict({"sentence": TEXTS}).to_parquet(tmp_path / "t.parquet")
    for name in ("t.txt", "t.csv", "t.tsv", "t.jsonl", "t.parquet"):
        assert rows_of(bert, str(tmp_path / name)) == expected, name
    assert rows_of(bert, Dataset.from_dict({"text": TEXTS, "label": [0] * 7})) == expected


def test_pairs_have_the_probabilities_of_the_stock_pipeline_from_every_source(bert, tmp_path, capsys):
    AutoModelForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path / "model")
    pair_tokenizer().save_pretrained(tmp_path / "model")
    pairs = [*zip(TEXTS, reversed(TEXTS)), ("tree " * 20, "a " * 30)]  # of the last, the longer text is cut first
    expected = rows_of(tmp_path / "model", pairs)
    given = [{"text": first, "text_pair": second} for first, second in pairs]
    longest = {"truncation": "longest_first", "max_length": 32}
    assert_like(expected, from_pipeline("text-classification", tmp_path / "model", given, **longest))
    assert [(row["text"], row["text_pair"]) for row in expected] == pairs
    assert not np.allclose(table(expected), table(rows_of(tmp_path / "model", [" ".join(pair) for pair in pairs])))
    columns = {"premise": [first for first, _ in pairs], "hypothesis": [second for _, second in pairs]}
    rows = Dataset.from_dict({"hypothesis": columns["hypothesis"], "id": [*range(8)], "premise": columns["premise"]})
    rows.to_parquet(tmp_path / "t.parquet")
    rows.to_json(tmp_path / "t.jsonl")
    rows.to_csv(tmp_path / "t.csv")
    asked = {"text_column": ["premise", "hypothesis"], "batch_size": 3}
    for source in (rows, *(str(tmp_path / f"t.{ending}") for ending in ("parquet", "jsonl", "csv"))):
        found = rows_of(tmp_path / "model", source, **asked)
        assert [(row["text"], row["text_pair"]) for row in found] == pairs, source
        np.testing.assert_allclose(table(found), table(expected), atol=1e-6)
    printed = run(capsys, tmp_path / "model", tmp_path / "t.csv", "--text_column", "premise", "hypothesis").out
    read = [*csv.DictReader(io.StringIO(printed))]
    assert [(row["text"], row["text_pair"], row["label"]) for row in read] == [
        (row["text"], row["text_pair"], row["label"]) for row in expected
    ]


def test_pairs_that_are_none_are_refused(bert, tmp_path):
    for empty in (("a", " "), (None, "a"), ("a", "a", "a"), ()):
        with pytest.raises(DataError, match="Input 1 cannot be read: the text is empty"):
            rows_of(bert, [("a", "tree"), empty])
    with pytest.raises(DataError, match="`inputs` mix single texts and pairs of texts"):
        rows_of(bert, [("a", "tree"), "a"])
    (tmp_path / "t.csv").write_text("a,b,c\nx,y,z\n")
    with pytest.raises(DataError, match=r"`text_column` \(=\['a', 'b', 'c'\]\) must name one column, or the two"):
        rows_of(bert, str(tmp_path / "t.csv"), text_column=["a", "b", "c"])
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"`text_column` \(=b\) names columns, and lines of text have none"):
        rows_of(bert, str(tmp_path / "t.txt"), text_column="b")


def test_a_data_set_has_splits_and_an_image_model_no_texts(vit, bert):
    assert len(rows_of(vit, "digits")) == 599 and len(rows_of(vit, "digits", split="train")) == 1198
    with pytest.raises(ValueError, match=r"`split` \(='tests'\) must be one of 'train', 'test'; did you mean 'test'"):
        rows_of(vit, "digits", split="tests")
    with pytest.raises(DataError, match=r"No column is known to hold images or texts: .*there are `image` \(Image\)"):
        rows_of(bert, "digits")
    with pytest.raises(ValueError, match="The model reads texts: name their column by `text_column`"):
        rows_of(bert, TEXTS, image_column="image")


def test_a_column_that_is_not_known_is_asked_for(bert, vit, tmp_path):
    scans = etf_adapt.load_data("digits").test.select(range(3)).rename_column("image", "scan").select_columns("scan")
    assert len(rows_of(vit, scans)) == 3
    file = tmp_path / "t.csv"
    file.write_text("title,body\na,a tree\n")
    with pytest.raises(DataError, match=r"`title`, `body` each hold texts: name one with `text_column`"):
        rows_of(bert, str(file))
    assert [row["text"] for row in rows_of(bert, str(file), text_column="body")] == ["a tree"]
    file.write_text("the first text of a file without a header\nanother\n")
    with pytest.raises(DataError, match="No column is known to hold texts"):
        rows_of(bert, str(file))


def test_a_bad_input_is_named_and_the_others_are_right(vit, photos, tmp_path, caplog):
    whole = rows_of(vit, str(photos))
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "b.png").read_bytes()[:90])
    files = [row["file"] for row in whole]
    mixed = [*files[:2], str(broken), *files[2:], str(tmp_path / "missing.png")]
    with pytest.raises(DataError, match=rf"Input 2 \(`{broken}`\) cannot be read: .*on_bad_input='skip'"):
        rows_of(vit, mixed)
    rows = rows_of(vit, mixed, on_bad_input="skip", batch_size=2)
    assert [row["row"] for row in rows] == [0, 1, 3, 4, 5]
    np.testing.assert_allclose(table(rows), table(whole), atol=1e-6)
    assert f"Input 2 (`{broken}`) is left out" in caplog.text and "2 of 7 inputs were left out" in caplog.text


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_every_file_is_closed_whether_it_can_be_read_or_not(vit, photos, tmp_path):
    for name in ("b.png", "a/deep/d.jpg"):
        broken = tmp_path / Path(name).name
        broken.write_bytes((photos / name).read_bytes()[:300])
    (tmp_path / "none.png").write_text("no image")
    picture(0).save(tmp_path / "moving.gif", save_all=True, append_images=[picture(1), picture(2)])
    stored = Dataset.from_dict({"image": [str(tmp_path / "moving.gif")]})
    assert [row["file"] for row in rows_of(vit, str(tmp_path), on_bad_input="skip")] == [str(tmp_path / "moving.gif")]
    assert len(rows_of(vit, stored)) == 1
    gc.collect()


def test_empty_texts_are_bad_inputs_and_nothing_at_all_is_an_error(bert, caplog):
    for empty in ("", "  ", None):
        with pytest.raises(DataError, match="Input 1 cannot be read: the text is empty"):
            rows_of(bert, ["a", empty, "tree"])
        assert [row["row"] for row in rows_of(bert, ["a", empty, "tree"], on_bad_input="skip")] == [0, 2]
    with pytest.raises(DataError, match="hold nothing to classify"):
        rows_of(bert, [])


@pytest.mark.parametrize(("kind", "most"), [("image", 2 * 3), ("text", 32 * 3)])
def test_inputs_are_read_as_rows_are_taken(vit, bert, kind, most):
    read = []

    def endless():
        number = 0
        while True:
            read.append(number)
            yield picture(number) if kind == "image" else "a tree"
            number += 1

    rows = etf_adapt.predict(str(vit if kind == "image" else bert), endless(), batch_size=3)
    for taken in range(1, 200):
        next(rows)
        assert len(read) <= taken + most


def test_top_k_and_probabilities_are_columns(vit, photos):
    (row,) = rows_of(vit, str(photos / "b.png"), top_k=2)
    by_name = {name: row[f"probability:{name}"] for name in NAMES.values()}
    order = sorted(by_name, key=by_name.get, reverse=True)
    assert (row["label"], row["label_2"]) == tuple(order[:2]) and row["probability_2"] == by_name[order[1]]
    assert len(rows_of(vit, str(photos / "b.png"), top_k=9, probabilities=False)[0]) == 2 + 2 * 3
    assert sum(by_name.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"`top_k` \(=0\) must be at least 1"):
        rows_of(vit, str(photos), top_k=0)


def test_what_is_no_classifier_is_refused(tmp_path, bert):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no classifier of images or texts \(its architecture is BertForMaskedLM"):
        rows_of(tmp_path, TEXTS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    processor("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights .*`classifier\.weight`.*would guess"):
        rows_of(tmp_path, TEXTS)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**config, "architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"}
        )
    )
    with pytest.raises(ValueError, match="does not choose one of several classes"):
        rows_of(tmp_path, TEXTS)
    with pytest.raises(ValueError, match=r"`device` \(='cudo'\) cannot be used here"):
        rows_of(bert, TEXTS, device="cudo")


def test_a_model_object_gives_what_its_folder_gives(vit, photos):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(vit).train()
    found = list(etf_adapt.predict(model, str(photos), processor=processor("vit"), probabilities=True))
    assert found == rows_of(vit, str(photos)) and model.training


# The command


def run(capsys, *words):
    command.main([str(word) for word in words])
    return capsys.readouterr()


def test_a_file_holds_the_rows_of_python_as_csv_and_as_parquet(vit, photos, tmp_path, capsys):
    rows = rows_of(vit, str(photos), top_k=2)
    flags = ("--top-k", 2, "--probabilities")
    printed = run(capsys, vit, photos, *flags).out
    for name in ("p.csv", "p.parquet"):
        done = run(capsys, vit, photos, *flags, "--output", tmp_path / name)
        assert done.out == "" and done.err.endswith(f"5 rows: {tmp_path / name}\n")
    assert (tmp_path / "p.csv").read_text() == printed
    read = [*csv.DictReader(io.StringIO(printed))]
    assert [{name: type(rows[0][name])(value) for name, value in row.items()} for row in read] == [
        {name: pytest.approx(value, rel=1e-8) if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.parquet"]


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_no_file_is_left_or_replaced_when_the_run_ends_early(bert, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "t.txt").write_text("a\n\ntree\n")
    output = tmp_path / "out" / name
    output.parent.mkdir()
    output.write_text("of yesterday")
    words = [str(bert), str(tmp_path / "t.txt"), "--output", str(output)]
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2 and "Input 1 cannot be read" in capsys.readouterr().err

    def interrupted(*_, **__):
        yield {"row": 0}
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "predict", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 130 and "no file of predictions was written" in capsys.readouterr().err
    assert [path.name for path in output.parent.iterdir()] == [name] and output.read_text() == "of yesterday"


@pytest.mark.slow
def test_texts_come_from_the_standard_input(bert):
    command = [sys.executable, "-m", "etf_adapt", "predict", str(bert), "-", "--on_bad_input", "skip"]
    done = subprocess.run(
        command, input="a tree\n\nélan x\n".encode(), capture_output=True, cwd=Path(__file__).parents[2]
    )
    rows = [*csv.DictReader(io.StringIO(done.stdout.decode()))]
    assert [(row["row"], row["text"]) for row in rows] == [("0", "a tree"), ("2", "élan x")]
    assert done.returncode == 0 and b"1 of 3 inputs were left out" in done.stderr


def test_several_processes_are_refused(vit, photos, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        command.main([str(vit), str(photos)])
    assert "predict runs in one process" in capsys.readouterr().err
