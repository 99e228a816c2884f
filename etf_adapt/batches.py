"""Batches of a run: rows of similar length together, and labels made soft by mixup, CutMix and smoothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import Sampler

from etf_adapt.long_tail import read_labels, seeded_generator
from etf_adapt.sampler import ClassBalancedSampler

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


class SoftLabels:
    """Make labels soft: mixup and CutMix mix pairs of images, smoothing mixes in the uniform distribution.

    Pairs are the first with the last row of a process's batch, and so on, by one weight a batch: timm's ``Mixup``.

    Args:
        num_classes: Number of classes.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of CutMix, 0 for none; with both, either is chosen for each batch.
        smoothing: Weight of the uniform distribution, in [0, 1).

    Example:
        >>> import torch
        >>> soften = SoftLabels(4, smoothing=0.4)
        >>> _, labels = soften(torch.zeros(1, 3, 2, 2), torch.tensor([2]))
        >>> [round(label, 2) for label in labels[0].tolist()]
        [0.1, 0.1, 0.7, 0.1]
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.is_active = bool(mixup or cutmix or smoothing)
        self.mixes = bool(mixup or cutmix)
        self._mix = None
        if mixup or cutmix:
            self._mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and soft labels (batch, num_classes) for inputs (batch, ...) and labels (batch,).

        Raises:
            ValueError: The inputs are to be mixed and are no images (batch, channels, height, width).
        """
        if self._mix is None:
            return inputs, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise ValueError(
                f"`mixup` and `cutmix` mix images, and this model reads {tuple(inputs.shape)} of {inputs.dtype}: set both "
                "to 0."
            )
        mixed, soft = self._mix(inputs, labels)
        return mixed, soft


def labels_of(dataset: Any) -> NDArray[np.int64]:
    """Read the label of each row of a data set without reading its other columns.

    Args:
        dataset: A ``datasets.Dataset`` with a column ``label`` or ``labels``, or a wrapper with one as ``dataset``.

    Returns:
        Array (rows,) of int64.

    Raises:
        ValueError: There is no such column, or a label is missing.
    """
    inner = dataset if isinstance(dataset, Dataset) else getattr(dataset, "dataset", None)
    column = next((name for name in ("label", "labels") if name in getattr(inner, "column_names", ())), None)
    if not isinstance(inner, Dataset) or column is None:
        raise ValueError(
            f"`train_dataset` (a {type(dataset).__name__}) has no column `label` that can be read: pass `labels`, the label "
            "of each row."
        )
    return read_labels(inner, label_column=column).ids


def lengths_of(dataset: Any, column: str) -> NDArray[np.int64] | None:
    """Read the length of each row of a data set.

    Args:
        dataset: The data set.
        column: Column of lengths, such as ``etf_adapt.text.tokenize`` adds.

    Returns:
        Array (rows,); None where the data set has no such column.
    """
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return None
    return np.asarray(dataset.with_format("numpy")[column][:])
