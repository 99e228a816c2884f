"""Class counts and long-tailed subsets, taken from the label column alone: no image and no text is ever decoded."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Column, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from etf_adapt.errors import check_choice, quoted
from etf_adapt.sources.columns import arrow_column

PROFILES = ("exponential", "step")
CLASS_ORDERS = ("label", "permuted")

_ORDER_STREAM, _ROW_STREAM, _EVEN_STREAM = 1, 2, 3

EVEN_IMBALANCE = 2.0  # below which classes count as evenly filled
Ids: TypeAlias = NDArray[np.int64]


class Labels(NamedTuple):
    """The checked class ids of a data set."""

    ids: NDArray[np.int64]  # (rows,), in 0 .. num_classes - 1
    num_classes: int


def class_counts(data: Any, *, num_classes: int | None = None, label_column: str = "label") -> NDArray[np.int64]:
    """Count the rows of each class.

    Args:
        data: A ``datasets.Dataset``, of which only the label column is read; a ``Subset``, ``ConcatDataset`` or torchvision
            data set; or the labels themselves (rows,): a list, array, tensor or data set column.
        num_classes: Number of classes; by default the number of names of a ``ClassLabel`` column, otherwise the
            largest label plus one.
        label_column: Name of the label column of a data set.

    Returns:
        Array (num_classes,) of int64.

    Raises:
        ValueError: A label is missing, negative, out of range or no integer, or ``data`` is not one split.

    Example:
        >>> class_counts([0, 2, 2, 0, 2]).tolist()
        [2, 0, 3]
    """
    labels = read_labels(data, num_classes=num_classes, label_column=label_column)
    if labels.num_classes == 0:
        raise ValueError("`data` holds no rows, so its classes are not known: pass `num_classes`.")
    return np.bincount(labels.ids, minlength=labels.num_classes)


def make_long_tailed(
    dataset: Dataset,
    *,
    imbalance_factor: float,
    profile: str = "exponential",
    label_column: str = "label",
    class_order: str = "label",
    seed: int = 0,
) -> Dataset:
    r"""Select a long-tailed subset of the rows of a data set, for the training split only.

    The class of rank r (from 0) of K keeps, out of its :math:`n_r` rows and with f the imbalance factor,

    .. math:: \min\bigl(n_r, \max(1, \lfloor n_{\max}\, f^{-r/(K-1)} \rfloor)\bigr)

    with the exponential profile (Cao et al.: the long-tailed CIFAR of the field). With the step profile the first half of the
    ranks (the larger half for odd K) keeps all its rows and the others :math:`\lfloor n_{\max} / f \rfloor`, within the same
    limits. For one seed and class order the subsets are nested: a larger factor keeps a part of what a smaller one keeps. The
    rows keep their order, and nothing is written beside the data set.

    Args:
        dataset: Any map-style data set with integer labels.
        imbalance_factor: Largest over smallest class count, finite and at least 1 (100, not 0.01).
        profile: ``"exponential"`` or ``"step"``.
        label_column: Name of the label column.
        class_order: ``"label"``: the rank of a class is its label; ``"permuted"``: a seeded permutation.
        seed: Seed of the chosen rows and of the permutation, at least 0.

    Returns:
        The selected rows, as a data set.

    Raises:
        ValueError: The imbalance factor is below 1, an option is unknown, there is only one class, a class has no rows, or the
            labels are not those of `class_counts`.

    References:
        Cao, Wei, Gaidon, Arechiga, Ma (2019). Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss.
        https://arxiv.org/abs/1906.07413

    Example:
        >>> dataset = Dataset.from_dict({"label": [0, 1, 2] * 100})
        >>> class_counts(make_long_tailed(dataset, imbalance_factor=100)).tolist()
        [100, 10, 1]
    """
    tail: dict[str, Any] = {"imbalance_factor": imbalance_factor, "profile": profile, "class_order": class_order}
    return dataset.select(long_tailed_indices(dataset, **tail, seed=seed, label_column=label_column))


def long_tailed_indices(
    data: Any,
    *,
    imbalance_factor: float,
    profile: str = "exponential",
    class_order: str = "label",
    seed: int = 0,
    label_column: str = "label",
) -> NDArray[np.int64]:
    """Choose the rows of a long-tailed subset, ascending; arguments as `make_long_tailed`, data as `class_counts`."""
    check_choice("profile", profile, PROFILES)
    check_choice("class_order", class_order, CLASS_ORDERS)
    if not isinstance(imbalance_factor, Real) or not math.isfinite(imbalance_factor) or imbalance_factor < 1:
        raise ValueError(
            f"`imbalance_factor` (={imbalance_factor!r}) must be a finite number of at least 1: it is the largest "
            "class count over the smallest (100, not 0.01)."
        )
    ids, num_classes = read_labels(data, label_column=label_column)
    counts = np.bincount(ids, minlength=num_classes)
    if num_classes < 2:
        raise ValueError(
            f"The number of classes (={num_classes}) must be at least 2 for a long tail: check the label column."
        )
    if not counts.all():
        empty = quoted(np.flatnonzero(counts == 0).tolist())
        raise ValueError(f"Of {num_classes} classes these have no rows: {empty}. Drop them from the names or add rows.")

    by_rank = np.arange(num_classes)
    if class_order == "permuted":
        by_rank = seeded_generator(seed, _ORDER_STREAM).permutation(by_rank)
    kept = np.empty_like(counts)
    kept[by_rank] = _kept_counts(counts[by_rank], float(imbalance_factor), profile)
    return draw_per_class(ids, kept, seeded_generator(seed, _ROW_STREAM))


def draw_per_class(ids: Ids, counts: Ids, generator: np.random.Generator) -> Ids:
    """Choose so many random rows of each class, none above the rows that it has; ascending."""
    rows, starts = rows_by_class(ids, len(counts), generator)
    classes = ids[rows]
    place_in_class = np.arange(len(rows)) - starts[classes]
    return np.sort(rows[place_in_class < counts[classes]]).astype(np.int64)


def even_sample(ids: NDArray[np.int64], num_classes: int, max_rows: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Choose at most so many rows, as many of each class and all of rarer ones, but one of each at least; ascending."""
    counts = np.bincount(ids, minlength=num_classes)
    kept = np.minimum(counts, max(1.0, np.floor(even_cap(counts, max_rows)))).astype(np.int64)
    return draw_per_class(ids, kept, seeded_generator(seed, _EVEN_STREAM))


def even_cap(counts: NDArray[np.int64], max_rows: int) -> float:
    """Return the most rows of a class with which the rows of all classes are ``max_rows``; infinite where they are fewer."""
    if counts.sum() <= max_rows:
        return math.inf
    ascending = np.sort(counts)
    smaller = np.concatenate([[0], np.cumsum(ascending)[:-1]])  # rows of all smaller classes
    caps = (max_rows - smaller) / np.arange(len(counts), 0, -1)  # a class, if these are taken whole
    return float(caps[np.argmax(caps <= ascending)])


def read_labels(data: Any, *, num_classes: int | None = None, label_column: str = "label") -> Labels:
    """Read and check the labels of a data set, list, array or tensor; arguments and errors as `class_counts`."""
    if num_classes is not None:
        check_integer("num_classes", num_classes, least=1)
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise ValueError(f"`data` is a {type(data).__name__} of splits {list(data)}: pass one of them.")
    if isinstance(data, IterableDataset):
        raise ValueError(
            "`data` is an IterableDataset, whose rows cannot be counted or chosen beforehand: load it with "
            "`streaming=False`."
        )
    if isinstance(data, Column) and isinstance(data.source, Dataset):
        data, label_column = data.source, data.column_name

    name = "labels"
    if isinstance(data, Dataset):
        name, feature = label_column, data.features.get(label_column)
        data = _read_column(data, label_column)
        if isinstance(feature, ClassLabel) and num_classes is None:
            num_classes = feature.num_classes
    elif isinstance(data, torch.utils.data.Dataset):
        data = labels_of(data)
    ids = check_labels(data, name=name, num_classes=num_classes)
    return Labels(ids, int(ids.max(initial=-1)) + 1 if num_classes is None else int(num_classes))


def check_labels(values: Any, *, name: str = "labels", num_classes: int | None = None) -> NDArray[np.int64]:
    """Convert class ids (rows,) to int64; a missing, fractional or out-of-range one is named, by ``name`` and its row."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` has shape {array.shape}, but must hold one class id a row: (rows,).")
    if array.dtype.kind not in "iub":
        plain = values.tolist() if hasattr(values, "tolist") else values
        for row, value in enumerate(plain):
            if not isinstance(value, Integral):
                raise ValueError(
                    f"`{name}` (={value!r} at row {row}) must be class ids, integers from 0: map names to ids, and drop "
                    "rows without a label."
                )
    ids: NDArray[np.int64] = array.astype(np.int64, copy=False)
    outside = ids < 0
    if num_classes is not None:
        outside |= ids >= num_classes
    if outside.any():
        row = int(outside.argmax())
        law = "be at least 0" if num_classes is None else f"lie in 0..{num_classes - 1}"
        raise ValueError(
            f"`{name}` (={array[row]} at row {row}) must {law}: check the number of classes, and drop rows that have no "
            "label (often -1 or -100)."
        )
    return ids


def rows_by_class(ids: Ids, num_classes: int, generator: np.random.Generator) -> tuple[NDArray[np.integer], Ids]:
    """Return row ids (rows,), class after class and shuffled within each, and the start of each class in them."""
    shuffled = np.arange(len(ids), dtype=np.int32 if len(ids) < 2**31 else np.int64)
    generator.shuffle(shuffled)
    # numpy sorts 16-bit integers by radix, eight times as fast as wider ones.
    labels = (ids.astype(np.uint16) if num_classes <= 2**16 else ids)[shuffled]
    rows = shuffled[np.argsort(labels, kind="stable")]
    counts = np.bincount(ids, minlength=num_classes)
    return rows, np.cumsum(counts) - counts


def seeded_generator(seed: int, *stream: int) -> np.random.Generator:
    """Make numpy's PCG64 generator for one stream of a seed, such as a purpose and an epoch; streams are independent."""
    sequence = np.random.SeedSequence(check_integer("seed", seed, least=0), spawn_key=stream)
    return np.random.Generator(np.random.PCG64(sequence))


def check_integer(name: str, value: Any, *, least: int) -> int:
    """Return an integer of at least ``least``; any other value is an error."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` (={value!r}) must be an integer of at least {least}.")
    return int(value)


def _read_column(dataset: Dataset, name: str) -> NDArray[Any] | list[Any]:
    """Read a column of labels, as Python values where some are missing."""
    if name not in dataset.column_names:
        raise ValueError(
            f"`label_column` (={name!r}) is not a column of the data set, which has {dataset.column_names}."
        )
    dtype = dataset.data.column(name).type
    if not (pa.types.is_integer(dtype) or pa.types.is_boolean(dtype)):
        raise ValueError(
            f"`{name}` holds {dtype}, but labels must be class ids: cast it with `dataset.class_encode_column({name!r})`."
        )
    column = arrow_column(dataset, name)
    return column.to_pylist() if column.null_count else column.to_numpy()


def _kept_counts(counts: NDArray[np.int64], imbalance_factor: float, profile: str) -> NDArray[np.int64]:
    """Return the number of rows that each class keeps, classes in order of their rank."""
    num_classes = len(counts)
    ranks = np.arange(num_classes)
    if profile == "exponential":
        shares = imbalance_factor ** (-ranks / (num_classes - 1))
    else:
        shares = np.where(ranks < num_classes - num_classes // 2, 1.0, 1.0 / imbalance_factor)
    # The factor keeps what is whole on paper, such as 96 * 32^(-2/5) = 24, from being cut to 23 by rounding.
    wanted = np.floor(counts.max() * shares * (1.0 + 1e-12)).astype(np.int64)
    return np.minimum(counts, np.maximum(1, wanted))


def labels_of(dataset: Any) -> NDArray[np.int64]:
    """Read the label of each row of a data set as it is indexed, without reading the rows.

    Of a ``datasets.Dataset`` the column ``label`` or ``labels``; of a torchvision data set its ``targets``; of ``Subset`` and
    ``ConcatDataset`` those of their parts; of a wrapper as long as its ``dataset`` those of that. Changed labels are refused.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([labels_of(part) for part in dataset.datasets])
    why = "it has no column `label` and no `targets`"
    if isinstance(dataset, Dataset):
        column = next((name for name in ("label", "labels") if name in dataset.column_names), None)
        if column is not None:
            ids = read_labels(dataset, label_column=column).ids
            _require_untransformed(dataset, ids)
            return ids
    elif getattr(dataset, "target_transform", None) is not None:
        why = "its `target_transform` may change them"
    elif getattr(dataset, "targets", None) is not None and len(dataset.targets) == len(dataset):
        return check_labels(dataset.targets, name="targets")
    elif (inner := getattr(dataset, "dataset", None)) is not None:
        if len(inner) == len(dataset):
            return labels_of(inner)
        why = f"of the {len(inner)} rows of its `dataset` it has {len(dataset)}"
    raise ValueError(
        f"The labels of a {type(dataset).__name__} are unknown: {why}. Pass `labels`, the label of each row."
    )


def _require_untransformed(dataset: Dataset, ids: NDArray[np.int64]) -> None:
    """Refuse a transform (`with_transform`) that changes labels, as a row each of the first classes shows."""
    if dataset.format["type"] != "custom":
        return
    for row in np.unique(ids, return_index=True)[1][:3].tolist():
        read = dataset[row]
        label = next((read[name] for name in ("labels", "label") if name in read), ids[row])
        if np.ndim(label) == 0 and label != ids[row]:
            raise ValueError(
                f"The transform of the data set changes labels (row {row}: {ids[row]} to {label}). Pass `labels`, the label of "
                "each row."
            )
