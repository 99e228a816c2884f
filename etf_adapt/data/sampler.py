"""A sampler that fixes how often each class is drawn, the same for any number of processes and after any resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from etf_adapt.data.long_tail import check_integer, read_labels, rows_by_class, seeded_generator

_WALK_STREAM, _LINE_STREAM, _SHUFFLE_STREAM = 11, 12, 13

# Shares of a row are kept as integers in units of 2^-40, so that their sums over epochs are exact.
_UNIT_BITS = 40


class ClassBalancedSampler(Sampler[int]):
    r"""Draw rows so that each class has a fixed share of every epoch.

    With :math:`n_c` rows in class c, T the rows drawn an epoch and p the power, class c is drawn

    .. math:: t_c = T\, n_c^{1-p} \big/ \textstyle\sum_k n_k^{1-p}

    times an epoch: p = 1 is class-balanced, 1/2 square-root and 0 natural (instance) sampling (Kang et al., section
    4.1, whose q is 1 - p). Nothing of this is left to chance:

    - An epoch draws a class :math:`\lfloor t_c \rfloor` or :math:`\lfloor t_c \rfloor + 1` times. Who gets the rows
      left over rotates over the epochs (systematic sampling; the offsets are van der Corput's sequence), so that
      after e epochs each class is within a few rows (of the order of log e) of :math:`e\,t_c`.
    - A class is walked through in one seeded order, and each epoch goes on where the one before stopped: no row repeats
      before all of its class were drawn. With power 0 every epoch holds every row.
    - The draw is a function of seed and epoch. It knows nothing of processes: Accelerate hands batch i, i + n, ... of it to
      process i of n, so n processes with batch B see at each step what one process with batch n B sees.

    Call ``set_epoch`` before each epoch, as with torch's ``DistributedSampler``, or each epoch draws the same rows.

    Args:
        labels: Label of each row: list, array, tensor, or a ``datasets.Dataset``, whose label column is read. Classes
            without rows are left out.
        power: p above, from 0 (natural) to 1 (balanced).
        batch_size: Rows of a whole *global* batch: rows per process times processes (times accumulation steps, where
            these too must come out even). The length is rounded up to a multiple of it.
        seed: Seed of all draws, at least 0.
        num_samples: Rows drawn an epoch before rounding up; the number of rows by default.
        label_column: Name of the label column of a data set.

    Raises:
        ValueError: There are no rows, a label is invalid or a number is out of its range.

    References:
        Kang et al. (2020). Decoupling Representation and Classifier for Long-Tailed Recognition.
        https://arxiv.org/abs/1910.09217

    Example:
        >>> labels = [0] * 90 + [1] * 10
        >>> sampler = ClassBalancedSampler(labels, batch_size=20)
        >>> len(sampler), sum(labels[row] for row in sampler)
        (100, 50)
    """

    def __init__(
        self,
        labels: Any,
        *,
        power: float = 1.0,
        batch_size: int,
        seed: int = 0,
        num_samples: int | None = None,
        label_column: str = "label",
    ) -> None:
        if not isinstance(power, (int, float)) or not 0 <= power <= 1:
            raise ValueError(f"`power` (={power!r}) must lie in 0..1: 1 draws all classes equally often, 0 all rows.")
        ids, num_classes = read_labels(labels, label_column=label_column)
        if not len(ids):
            raise ValueError("`labels` holds no rows: there is nothing to draw.")
        batch = check_integer("batch_size", batch_size, least=1)
        wanted = len(ids) if num_samples is None else check_integer("num_samples", num_samples, least=1)

        self.seed = seed
        self.epoch = 0
        self._length = -(-wanted // batch) * batch
        self._counts = np.bincount(ids, minlength=num_classes)
        self._rows, self._starts = rows_by_class(ids, num_classes, seeded_generator(seed, _WALK_STREAM))

        weights = np.where(self._counts > 0, self._counts.astype(np.float64) ** (1.0 - float(power)), 0.0)
        targets = self._length * weights / weights.sum()
        self._whole = np.floor(targets).astype(np.int64)
        # The fractions that remain, end to end on a line in random order of classes. Their sum is an integer.
        self._line = seeded_generator(seed, _LINE_STREAM).permutation(num_classes)
        fractions = np.rint((targets - self._whole)[self._line] * 2**_UNIT_BITS).astype(np.int64)
        end = (self._length - int(self._whole.sum())) << _UNIT_BITS
        self._edges = np.minimum(np.concatenate([[0], np.cumsum(fractions)]), end)
        self._edges[-1] = end

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that the next iteration draws."""
        self.epoch = check_integer("epoch", epoch, least=0)

    def quotas(self, epoch: int) -> NDArray[np.int64]:
        """Return how often an epoch draws each class (num_classes,); the sum is the length."""
        epoch = check_integer("epoch", epoch, least=0)
        return self._drawn_before(epoch + 1) - self._drawn_before(epoch)

    def rows(self, epoch: int) -> NDArray[np.integer]:
        """Return the row ids of an epoch (len(self),) in the order in which they are drawn."""
        epoch = check_integer("epoch", epoch, least=0)
        quotas = self.quotas(epoch)
        # One array changed in place, of small integers: arrays of this length are most of the memory.
        kind = np.int32 if max(self._length, len(self._rows)) < 2**30 else np.int64
        first = self._drawn_before(epoch) % np.maximum(self._counts, 1) - (np.cumsum(quotas) - quotas)
        steps = np.arange(self._length, dtype=kind)
        steps += np.repeat(first.astype(kind), quotas)
        steps %= np.repeat(self._counts.astype(kind), quotas)
        steps += np.repeat(self._starts.astype(kind), quotas)
        drawn = self._rows[steps]
        seeded_generator(self.seed, _SHUFFLE_STREAM, epoch).shuffle(drawn)
        return drawn

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows(self.epoch).tolist())

    def __len__(self) -> int:
        return self._length

    def _drawn_before(self, epoch: int) -> NDArray[np.int64]:
        """Return how often each class was drawn in all epochs before this one."""
        drawn = epoch * self._whole
        drawn[self._line] += np.diff(_points_below(self._edges, epoch))
        return drawn


def _points_below(edges: NDArray[np.int64], epochs: int) -> NDArray[np.int64]:
    """Count, over the first epochs, the points of each epoch's comb below each edge, in units of 2^-40.

    The comb of epoch e is u_e, u_e + 1, u_e + 2, ... with u_e the e-th number of van der Corput's sequence in base 2 (the bits
    of e mirrored at the point). A class whose interval lies between two edges gets one row for each point in it.
    """
    whole, fractions = edges >> _UNIT_BITS, edges & ((1 << _UNIT_BITS) - 1)
    points = epochs * whole
    # In closed form: over a block of 2^k epochs that starts at a multiple of 2^k, the u_e are an even grid of spacing 2^-k.
    for k in range(epochs.bit_length()):  # each set bit of `epochs` is a block
        if epochs >> k & 1:
            first_epoch = epochs >> (k + 1) << (k + 1)
            first_value = int(f"{first_epoch:0{_UNIT_BITS}b}"[::-1], 2)
            points += np.clip(-((first_value - fractions) >> (_UNIT_BITS - k)), 0, 1 << k)
    return points
