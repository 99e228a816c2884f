"""Choosing rows by class: validation rows, smaller training sets. Seeded, from labels alone."""

from __future__ import annotations

import numpy as np

from etf_adapt.data.long_tail import draw_per_class, seeded_generator

_SPLIT_STREAM = 21


def take_per_class(labels: np.ndarray, counts: np.ndarray, *, seed: int) -> np.ndarray:
    """Choose ``counts[c]`` random rows of each class c from ``labels`` (rows,); row ids, ascending."""
    return draw_per_class(labels, counts, seeded_generator(seed, _SPLIT_STREAM))


def validation_rows(
    labels: np.ndarray, *, num_classes: int, fraction: float, balanced: bool = False, seed: int = 0
) -> np.ndarray:
    """Choose the training rows that become the validation split; no class ever gives its last row.

    Stratified: n rows of a class give round(fraction n), halves upwards; balanced: fraction x rows / classes, at least one.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if balanced:
        wanted = np.full(num_classes, max(1, int(fraction * len(labels) / num_classes)))
    else:
        # At a tenth a class gives its first row at 5; a smaller one trains on all it has and is not validated, unless no
        # class would give any: then each class of two rows or more gives one.
        wanted = np.floor(fraction * counts + 0.5).astype(np.int64)
        if not np.minimum(wanted, counts - 1).any():
            wanted = np.ones(num_classes, dtype=np.int64)
    wanted = np.clip(wanted, 0, counts - 1)
    if not wanted.any():
        raise ValueError(
            f"No validation rows can be cut from {len(labels)} training rows: each class has a single row, which it "
            "needs for training; add rows, give a validation split, or set `validation_fraction` to 0."
        )
    return take_per_class(labels, wanted, seed=seed)


def fewer_rows(labels: np.ndarray, *, num_classes: int, max_rows: int, seed: int = 0) -> np.ndarray:
    """Choose `max_rows` rows, or all where there are fewer: each class its proportional share, at least one."""
    if max_rows < num_classes:
        raise ValueError(
            f"`max_train_rows` (={max_rows}) must be at least the number of classes ({num_classes}): "
            "each class needs a training row."
        )
    if max_rows >= len(labels):
        return np.arange(len(labels))
    exact = np.bincount(labels, minlength=num_classes) * (max_rows / len(labels))
    share = np.maximum(np.floor(exact).astype(np.int64), 1)
    rest = max_rows - share.sum()
    if rest > 0:  # to the largest remainders
        share[np.argsort(share - exact, kind="stable")[:rest]] += 1
    for _ in range(-rest):  # the classes lifted to one row are paid for by the largest
        share[share.argmax()] -= 1
    return take_per_class(labels, share, seed=seed)
