"""Texts are tokenized once, cut to a length, and padded per batch."""

from __future__ import annotations

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from etf_adapt.data.text import TextCollator, tokenize

WORDS = ["[PAD]", "[UNK]", "[CLS]", "one", "two", "three"]
TEXTS = ["one two three", "two", "one one one one one one one one", "three one"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path


def make_tokenizer(**options):
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.fixture
def rows():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"text": TEXTS, "label": [0, 1, 1, 0]}, features=features)


def test_tokens_lengths_and_row_numbers(rows):
    tokenized = tokenize(rows, make_tokenizer())
    assert tokenized["input_ids"][:] == [[2, 3, 4, 5], [2, 4], [2] + [3] * 8, [2, 5, 3]]
    assert tokenized["length"][:] == [4, 2, 9, 3]
    assert tokenized["row_id"][:] == [0, 1, 2, 3]
    assert tokenized.features["label"] == rows.features["label"]
    assert "text" not in tokenized.column_names


def test_a_long_tokenization_says_how_far_it_is(rows, monkeypatch, capsys):
    monkeypatch.setattr("etf_adapt.data.progress.FIRST_SECONDS", 0.0)
    tokenize(rows, make_tokenizer())
    assert "tokenizing texts: 4 of 4, 0 s" in capsys.readouterr().err


def test_row_numbers_are_those_of_the_rows_given(rows):
    assert tokenize(rows.select([3, 1]), make_tokenizer())["row_id"][:] == [0, 1]


@pytest.mark.parametrize(("limit", "max_length", "longest"), [(10**30, None, 9), (5, None, 5), (5, 3, 3)])
def test_texts_are_cut(rows, limit, max_length, longest):
    tokenizer = make_tokenizer(model_max_length=limit)
    assert max(tokenize(rows, tokenizer, max_length)["length"]) == longest


def test_the_second_time_is_read_from_the_cache(rows, cache, monkeypatch):
    tokenizer = make_tokenizer()
    first = tokenize(rows, tokenizer)
    TextCollator(tokenizer)([first[0], first[1]])  # padding leaves its settings in the tokenizer
    files = {file: file.stat().st_mtime_ns for file in (cache / "etf_adapt").iterdir()}
    assert len(files) == 1
    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", None)
    assert tokenize(rows, tokenizer)[:] == first[:]
    assert tokenize(rows, make_tokenizer())[:] == first[:]
    assert {file: file.stat().st_mtime_ns for file in (cache / "etf_adapt").iterdir()} == files


def test_another_length_is_another_entry(rows):
    tokenizer = make_tokenizer()
    assert [max(tokenize(rows, tokenizer, length)["length"]) for length in (9, 4, 9)] == [9, 4, 9]


def test_nothing_is_written_beside_the_rows(rows, tmp_path):
    rows.save_to_disk(tmp_path / "mine")
    before = sorted((tmp_path / "mine").rglob("*"))
    tokenize(datasets.load_from_disk(str(tmp_path / "mine")), make_tokenizer())
    assert sorted((tmp_path / "mine").rglob("*")) == before


def test_a_batch_is_padded_to_its_longest_text(rows):
    tokenized = tokenize(rows, make_tokenizer())
    batch = TextCollator(make_tokenizer())([tokenized[1], tokenized[0]])
    assert batch["input_ids"].tolist()[0] == [2, 4, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [2, 4]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["row_id"].tolist() == [1, 0]
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert not {"length", "label"} & set(batch)


def test_padding_says_nothing(rows, caplog, recwarn):
    tokenized = tokenize(rows, make_tokenizer())
    TextCollator(make_tokenizer())([tokenized[0], tokenized[1]])
    assert not caplog.records
    assert not recwarn.list


def test_a_tokenizer_without_a_padding_token_is_refused():
    with pytest.raises(ValueError, match="eos_token"):
        TextCollator(make_tokenizer(pad_token=None))


def test_a_length_without_room_is_refused(rows):
    with pytest.raises(ValueError, match=r"`max_length` \(=0\)"):
        tokenize(rows, make_tokenizer(), 0)


def test_a_text_without_tokens_is_named(rows):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.normalizer = None
    blank = Dataset.from_dict({"text": ["one", "\u2003"], "label": [0, 1]})
    with pytest.raises(ValueError, match="Row 1"):
        tokenize(blank, tokenizer)


def test_a_pair_is_encoded_as_the_tokenizer_encodes_one(minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    first, second = ["how are you " * 4, "fine"], ["and you", "I am well, thank you, but for the rain " * 3]
    rows = Dataset.from_dict({"text": first, "text_pair": second, "label": [0, 1]})
    for length in (None, 12):
        tokenized = tokenize(rows, tokenizer, length)
        batch = TextCollator(tokenizer)([tokenized[0], tokenized[1]])
        direct = tokenizer(
            first, second, padding=True, truncation="longest_first", max_length=length, return_tensors="pt"
        )
        assert all(torch.equal(batch[name], direct[name]) for name in direct)
        assert batch["token_type_ids"].sum(1).bool().all()  # none of the two texts is cut away
        assert tokenized["length"][:] == direct["attention_mask"].sum(1).tolist()
    assert not {"text", "text_pair"} & set(tokenized.column_names)


def test_real_tokenizer(minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenized = tokenize(Dataset.from_dict({"text": ["how are you", "fine"], "label": [0, 1]}), tokenizer)
    batch = TextCollator(tokenizer)([tokenized[0], tokenized[1]])
    direct = tokenizer(["how are you", "fine"], padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], direct[name]) for name in direct)
