"""Batches as people have them: mappings, pairs of a torchvision loader, or the rows of a data set and a collator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from etf_adapt.data.long_tail import check_labels, labels_of
from etf_adapt.data.progress import progress
from etf_adapt.errors import DataError, message_of

_ROWS = 64  # of a batch that is made here
_BESIDE = ("label", "labels", "row_id")  # columns that are no input of a model


def as_batches(data: Any, inputs: Collection[str], collator: Callable[[list[Any]], Any] | None = None) -> Iterable[Any]:
    """Return batches as they are, and rows in batches, by a collator, else by torch's of the model's ``inputs`` alone."""
    is_rows = hasattr(data, "__getitem__") and not isinstance(data, Sequence)
    if collator is None and not is_rows:
        return data
    return DataLoader(data, batch_size=_ROWS, collate_fn=collator or partial(_collate, inputs=inputs))


def _collate(rows: list[Any], inputs: Collection[str]) -> Any:
    if isinstance(rows[0], Mapping):
        if not set(inputs) & rows[0].keys():
            raise DataError(
                f"`data` has columns {[*rows[0]]}, none of them an input of the model ({', '.join(inputs)})."
            )
        kept = [name for name in rows[0] if name in inputs or name in _BESIDE]
        rows = [{name: torch.as_tensor(row[name]) for name in kept} for row in rows]
    try:
        return default_collate(rows)
    except (TypeError, RuntimeError) as error:  # pictures, texts of several lengths
        raise DataError(
            f"The rows of `data` cannot be put together as they are ({error}): give a `collator`, such as transformers' "
            "DataCollatorWithPadding."
        ) from error


def split_batch(batch: Any) -> tuple[Any, Tensor, Tensor | None]:
    """Split a mapping with ``labels`` or ``label``, or a pair, into inputs, labels and row ids, both (batch,) on the CPU."""
    inputs, labels, row_ids = batch, None, None
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        labels = inputs.pop("label", None)
        labels = inputs.pop("labels", labels)
        row_ids = inputs.pop("row_id", None)
    elif isinstance(batch, (list, tuple)) and len(batch) == 2:
        inputs, labels = batch
    labels = None if labels is None else torch.as_tensor(labels).cpu()
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        has = f"shape {tuple(labels.shape)}" if labels is not None else f"no labels ({type(batch).__name__})"
        raise DataError(
            f"A batch of `data` has {has}: it must be a mapping with `labels`, or a pair (inputs, labels), with a class "
            "index for each row (batch,). Of rows give a data set, or a `collator`."
        )
    return inputs, labels, None if row_ids is None else torch.as_tensor(row_ids).cpu()


def read_counts(class_counts: Any, num_classes: int) -> NDArray[np.int64]:
    """Return the rows of each class: ``num_classes`` numbers as they are, else counted in labels or a data set."""
    is_plain = isinstance(class_counts, (Sequence, np.ndarray, Tensor))
    if is_plain and len(class_counts) == num_classes:
        return np.asarray(class_counts)
    labels = class_counts if is_plain else labels_of(class_counts)
    return np.bincount(check_labels(labels, name="class_counts", num_classes=num_classes), minlength=num_classes)


def count_classes(data: Iterable[Any], num_classes: int) -> NDArray[np.int64]:
    """Count the rows of each class in the labels of batches: (num_classes,)."""
    counts = np.zeros(num_classes, np.int64)
    for batch in progress(data, "counting classes, batches"):
        labels = check_labels(split_batch(batch)[1], num_classes=num_classes)
        counts += np.bincount(labels, minlength=num_classes)
    return counts


_meetings: list[Callable[[], None]] = []  # where the other processes wait for one that leaves a pass over data


class LeftTogether(DataError):
    """Raised where another process leaves a pass, by an error that all of them will raise."""


@contextmanager
def met_by(meet: Callable[[], None]) -> Iterator[None]:
    """Call ``meet`` where this process leaves a pass by a ``DataError``: the others are met there first."""
    _meetings.append(meet)
    try:
        yield
    finally:
        _meetings.remove(meet)


def leave_pass(error: DataError) -> str:
    """Meet the other processes where they wait; return what they are to be told, nothing where one of them left first."""
    if isinstance(error, LeftTogether):
        return ""
    for meet in _meetings:
        meet()
    return message_of(error)


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise on every process the ``DataError`` of one: the others would wait for it."""
    message = ""
    try:
        yield
    except DataError as error:
        message = leave_pass(error)
    if told := next(filter(None, gather_object([message])), None):
        raise DataError(told)


def own_batches(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield this process's batches with their number among all batches, none of them padded or repeated."""
    rank, world = PartialState().process_index, PartialState().num_processes
    if world > 1 and isinstance(data, DataLoader):
        shard = prepare_data_loader(data, num_processes=world, process_index=rank, even_batches=False)
        for step, batch in enumerate(shard):
            yield step * world + rank, batch
    else:
        yield from islice(enumerate(data), rank, None, world)
