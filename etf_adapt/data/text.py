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
from etf_adapt.data.progress import ProgressLines
from etf_adapt.data.sampler import ClassBalancedSampler

DEFAULT_MAX_LENGTH = 512
REAL_LENGTH = 10**9  # tokenizers that know no limit say 10**30


def tokenize(dataset: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """Tokenize a split once, to columns of the tokenizer, "length" (num_tokens) and "row_id"; later runs read the cache.

    A column "text_pair" makes pairs with "text". ``max_length`` is by default the tokenizer's own limit, 512 if it has none.
    """
    if max_length is None:
        own = tokenizer.model_max_length
        max_length = own if own < REAL_LENGTH else DEFAULT_MAX_LENGTH
    if max_length < 1:
        raise ValueError(f"`max_length` (={max_length}) must be at least 1: it counts tokens.")

    names = [name for name in ("text", "text_pair") if name in dataset.column_names]
    lines = ProgressLines("tokenizing texts", len(dataset))

    def encode(rows: dict[str, list[Any]], ids: list[int]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(*(rows[name] for name in names), truncation=True, max_length=max_length))
        lines.update(ids[-1] + 1)
        return encoded | {"length": [len(tokens) for tokens in encoded["input_ids"]], "row_id": ids}

    # Named here, because by default `datasets` writes beside the rows, which may lie in a folder of the user's.
    fingerprint = Hasher.hash((dataset._fingerprint, tokenizer, max_length, *names))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "etf_adapt")
    cache.mkdir(parents=True, exist_ok=True)
    tokenized = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=names,
        cache_file_name=str(cache / f"tokenized-{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="Tokenizing",
    )
    lengths = tokenized.with_format("numpy")["length"][:]
    if not lengths.all():
        row = int(lengths.argmin())
        raise ValueError(f"Row {row} (={dataset[row]['text']!r}) gives no token: change the text or remove the row.")
    return tokenized


class TextCollator:
    """Make a batch of rows of `tokenize`, padded to its longest one: the tokenizer's inputs, "labels" and "row_id"."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"`tokenizer` (={type(tokenizer).__name__}) has no padding token, so texts cannot be batched: set its "
                "`pad_token`, to its `eos_token` for most decoders, and the model's `pad_token_id` to match."
            )
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these rows; all values int64."""
        inputs = [{name: row[name] for name in self._tokenizer.model_input_names if name in row} for row in rows]
        padded = self._tokenizer.pad(inputs, return_tensors="pt")
        return dict(padded) | {
            "labels": torch.tensor([row["label"] for row in rows]),
            "row_id": torch.tensor([row["row_id"] for row in rows]),
        }


_LENGTH_STREAM = 21
_POOL_BATCHES = 50


class SimilarLengths(Sampler[int]):
    """Reorder a sampler's draw: pools of 50 batches are sorted by length, ties as drawn, cut into batches, and shuffled."""

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


# Not transformers' LengthGroupedSampler, which draws another order at each pass: sums over a pass must come out bit for bit,
# and the first batches of an alignment set the scale of the head.
class EvenLengths(Sampler[int]):
    """Draw each row once, in batches of similar length, always in the same order."""

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], *, batch_size: int, seed: int = 0) -> None:
        by_length = np.argsort(-np.asarray(lengths), kind="stable")
        whole = len(by_length) // batch_size * batch_size
        # Shuffled, so that the first batches stand for all and the time that is left can be told; the last is the shortest.
        shuffled = seeded_generator(seed, _LENGTH_STREAM).permutation(by_length[:whole].reshape(-1, batch_size))
        self._rows = [*shuffled.ravel().tolist(), *by_length[whole:].tolist()]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def lengths_of(dataset: Any, column: str) -> NDArray[np.int64] | None:
    """Read a column of lengths (rows,), such as `tokenize` adds; None where the data set has no such column."""
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return None
    return np.asarray(dataset.with_format("numpy")[column][:])
