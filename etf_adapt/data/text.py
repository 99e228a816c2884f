"""Texts as tokens, their batches, and draws of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from etf_adapt.data.long_tail import seeded_generator
from etf_adapt.data.sampler import ClassBalancedSampler

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


_LENGTH_STREAM = 21
_POOL_BATCHES = 50


class SimilarLengths(Sampler[int]):
    """Reorder the draw of a sampler so that a batch holds rows of similar length, and pads little.

    The rows of an epoch stay the same, each as often, so class quotas do too. Pools of 50 batches are sorted by length,
    ties in the order drawn, cut into batches, and the batches shuffled; all by seed and epoch alone.

    Args:
        sampler: Draws the rows; its length is in whole batches.
        lengths: Length of each row of the data set, in tokens.
        batch_size: Rows of a global batch.
        seed: Seed of the shuffle, at least 0.

    Example:
        >>> lengths = [1, 9, 2, 8]
        >>> draw = ClassBalancedSampler([0, 0, 1, 1], batch_size=2)
        >>> rows = list(SimilarLengths(draw, lengths, batch_size=2))
        >>> sorted(sorted(rows[start : start + 2]) for start in (0, 2))
        [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        sampler: ClassBalancedSampler,
        lengths: Sequence[int] | NDArray[np.int64],
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.seed = seed
        self._lengths = np.asarray(lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that the next iteration draws."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        drawn = self.sampler.rows(self.sampler.epoch)
        generator = seeded_generator(self.seed, _LENGTH_STREAM, self.sampler.epoch)
        for start in range(0, len(drawn), _POOL_BATCHES * self.batch_size):
            pool = drawn[start : start + _POOL_BATCHES * self.batch_size]
            by_length = pool[np.argsort(self._lengths[pool], kind="stable")]
            yield from generator.permutation(by_length.reshape(-1, self.batch_size)).ravel().tolist()

    def __len__(self) -> int:
        return len(self.sampler)


class EvenLengths(Sampler[int]):
    """Draw each row once, in batches of similar length, for passes whose result does not depend on the order.

    Rows are sorted by length and cut into batches, and the batches shuffled, so that the first ones stand for all and the time
    that is left can be told. A last, smaller batch holds the shortest rows.

    Args:
        lengths: Length of each row of the data set, in tokens.
        batch_size: Rows of a batch.
        seed: Seed of the shuffle, at least 0.

    Example:
        >>> rows = list(EvenLengths([1, 9, 2, 8, 3], batch_size=2))
        >>> sorted(sorted(rows[start : start + 2]) for start in (0, 2)), rows[4:]
        ([[1, 3], [2, 4]], [0])
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], *, batch_size: int, seed: int = 0) -> None:
        by_length = np.argsort(-np.asarray(lengths), kind="stable")
        whole = len(by_length) // batch_size * batch_size
        shuffled = seeded_generator(seed, _LENGTH_STREAM).permutation(by_length[:whole].reshape(-1, batch_size))
        self._rows = [*shuffled.ravel().tolist(), *by_length[whole:].tolist()]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def lengths_of(dataset: Any, column: str) -> NDArray[np.int64] | None:
    """Read the length of each row of a data set.

    Args:
        dataset: The data set.
        column: Column of lengths, such as ``etf_adapt.data.text.tokenize`` adds.

    Returns:
        Array (rows,); None where the data set has no such column.
    """
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return None
    return np.asarray(dataset.with_format("numpy")[column][:])
