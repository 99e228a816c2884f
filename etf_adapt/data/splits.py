"""Choosing rows by class: validation rows, smaller training sets. Seeded, from labels alone."""

from __future__ import annotations

import numpy as np

from etf_adapt.data.long_tail import Labels, rows_by_class, seeded_generator

_SPLIT_STREAM = 21


def take_per_class(labels: np.ndarray, counts: np.ndarray, *, seed: int) -> np.ndarray:
    """Choose a given number of random rows from each class.

    Args:
        labels: (rows,) class of each row, in 0 .. num_classes - 1.
        counts: (num_classes,) rows to choose from each class, none above the rows that it has.
        seed: Of the choice.

    Returns:
        (sum of counts,) row ids, int64, sorted.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> chosen = take_per_class(labels, np.array([2, 1]), seed=0)
        >>> np.bincount(labels[chosen]).tolist()
        [2, 1]
    """
    rows, starts = rows_by_class(Labels(labels, len(counts), None), seeded_generator(seed, _SPLIT_STREAM))
    classes = labels[rows]
    place_in_class = np.arange(len(rows)) - starts[classes]
    return np.sort(rows[place_in_class < counts[classes]])


def validation_rows(
    labels: np.ndarray, *, num_classes: int, fraction: float, balanced: bool = False, seed: int = 0
) -> np.ndarray:
    """Choose the training rows that become the validation split.

    Stratified: n rows of a class give round(fraction n), halves upwards, so at a tenth a class gives its first row at
    5; a smaller class trains on all it has and is not validated, unless no class would give any: then each class of two
    rows or more gives one. Balanced: each class gives the same number, fraction x rows / classes, at least one.
    No class ever gives its last row.

    Args:
        labels: (rows,) class of each training row.
        num_classes: Number of classes.
        fraction: Share of the rows to choose, in (0, 1).
        balanced: The same number from each class, as far as its rows allow.
        seed: Of the choice.

    Returns:
        Row ids, int64, sorted.

    Raises:
        ValueError: Every class has a single row.

    Example:
        >>> labels = np.array([0] * 100 + [1] * 5 + [2])
        >>> np.bincount(labels[validation_rows(labels, num_classes=3, fraction=0.1)], minlength=3).tolist()
        [10, 1, 0]
    """
    counts = np.bincount(labels, minlength=num_classes)
    if balanced:
        wanted = np.full(num_classes, max(1, int(fraction * len(labels) / num_classes)))
    else:
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
    """Choose at most `max_rows` rows that keep the shape of the class counts.

    Each class keeps its proportional share, at least one row; rows that rounding leaves go to the largest remainders,
    so that `max_rows` is met exactly.

    Args:
        labels: (rows,) class of each row; every class has at least one.
        num_classes: Number of classes.
        max_rows: Rows to keep, at least one for each class.
        seed: Of the choice.

    Returns:
        Row ids, int64, sorted: all of them where there are no more than `max_rows`.

    Raises:
        ValueError: Fewer rows than classes are asked for.

    Example:
        >>> labels = np.array([0] * 80 + [1] * 20)
        >>> np.bincount(labels[fewer_rows(labels, num_classes=2, max_rows=10)]).tolist()
        [8, 2]
    """
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
    if rest > 0:
        share[np.argsort(share - exact, kind="stable")[:rest]] += 1
    for _ in range(-rest):  # the classes lifted to one row are paid for by the largest
        share[share.argmax()] -= 1
    return take_per_class(labels, share, seed=seed)
