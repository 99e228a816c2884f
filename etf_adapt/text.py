"""Texts to tokens: tokenized once, kept in the cache of `datasets`, padded per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor

DEFAULT_MAX_LENGTH = 512
_REAL_LENGTH = 10**9  # tokenizers that know no limit say 10**30


def tokenize(dataset: Dataset, tokenizer: Any, max_length: int | None = None, *, text_column: str = "text") -> Dataset:
    """Tokenize a split once; the same rows, tokenizer and length are read from the cache later.

    Args:
        dataset: With a column of strings and any others, which stay.
        tokenizer: Of transformers.
        max_length: Tokens that a text is cut to, those that the tokenizer adds included. By default the tokenizer's
            own limit, and 512 where it has none. The least of this and the model's positions is what a model can read.
        text_column: Name of the column of strings; it is left out of the result.

    Returns:
        The rows with the tokenizer's columns ("input_ids", "attention_mask", ...), "length", the number of tokens, and
        "row_id", the row's number in `dataset`.

    Raises:
        ValueError: `max_length` is not positive, or a text gives no token.
    """
    if max_length is None:
        own = tokenizer.model_max_length
        max_length = own if own < _REAL_LENGTH else DEFAULT_MAX_LENGTH
    if max_length < 1:
        raise ValueError(f"`max_length` (={max_length}) must be at least 1: it counts tokens.")

    def encode(rows: dict[str, list[Any]], ids: list[int]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(rows[text_column], truncation=True, max_length=max_length))
        return encoded | {"length": [len(tokens) for tokens in encoded["input_ids"]], "row_id": ids}

    # Named here, because by default `datasets` writes beside the rows, which may lie in a folder of the user's.
    fingerprint = Hasher.hash((dataset._fingerprint, tokenizer, max_length, text_column))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "etf_adapt")
    cache.mkdir(parents=True, exist_ok=True)
    tokenized = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=[text_column],
        cache_file_name=str(cache / f"tokenized-{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="Tokenizing",
    )
    lengths = tokenized.with_format("numpy")["length"][:]
    if not lengths.all():
        row = int(lengths.argmin())
        text = dataset[row][text_column]
        raise ValueError(f"Row {row} (={text!r}) gives no token: change the text or remove the row.")
    return tokenized


class TextCollator:
    """Makes a batch of rows that `tokenize` gives, padded to its longest one.

    Args:
        tokenizer: Of transformers; it says with what and on which side to pad.
        pad_to_multiple_of: Rounds the length up to a multiple, as tensor cores like it (8).
        label_column: Name of the column of labels.

    Returns:
        The tokenizer's inputs (batch, longest length), "labels" (batch,) and "row_id" (batch,), the rows' numbers in
        their split, not for the model; all int64.

    Raises:
        ValueError: The tokenizer has no padding token.
    """

    def __init__(self, tokenizer: Any, *, pad_to_multiple_of: int | None = None, label_column: str = "label") -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"`tokenizer` (={type(tokenizer).__name__}) has no padding token, so texts cannot be batched: set its "
                "`pad_token`, to its `eos_token` for most decoders, and the model's `pad_token_id` to match."
            )
        self._tokenizer = tokenizer
        self._pad_to_multiple_of = pad_to_multiple_of
        self._label_column = label_column

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these rows."""
        inputs = [{name: row[name] for name in self._tokenizer.model_input_names if name in row} for row in rows]
        padded = self._tokenizer.pad(inputs, pad_to_multiple_of=self._pad_to_multiple_of, return_tensors="pt")
        return dict(padded) | {
            "labels": torch.tensor([row[self._label_column] for row in rows]),
            "row_id": torch.tensor([row["row_id"] for row in rows]),
        }
