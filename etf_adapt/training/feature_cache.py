"""Features of a frozen backbone, read once: heads are then aligned, trained and scored on them in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate
from torch.utils.data import Dataset as TorchDataset

from etf_adapt.data.image_dataset import RowDraw
from etf_adapt.data.long_tail import labels_of
from etf_adapt.data.text import EvenLengths, lengths_of
from etf_adapt.heads.in_model import evaluation_mode, head_modules, read_features, to_device
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.models.stock_subclass import FEATURES
from etf_adapt.models.weights import new_weights


class CachedFeatures(TorchDataset[dict[str, Any]]):
    """Rows of what a model's head reads, in place of the rows that the features were read from.

    Args:
        features: Tensor (views, rows, in_features). A row drawn by a ``RowDraw`` gives its view of that epoch, in turn; one
            asked for by a plain int its first.
        labels: Class of each row (rows,).
        dataset: The rows that they were read from, which tell the labels to those who ask.

    Example:
        >>> rows = CachedFeatures(torch.arange(6.0).reshape(2, 3, 1), np.array([0, 1, 1]))
        >>> rows[2]["features"].tolist(), rows[RowDraw(2, epoch=1)]["features"].tolist(), rows[2]["labels"]
        ([2.0], [5.0], 1)
    """

    def __init__(self, features: Tensor, labels: NDArray[np.int64], dataset: Any = None) -> None:
        self.features = features
        self.labels = labels
        self.dataset = getattr(dataset, "dataset", dataset)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = index.epoch % len(self.features) if isinstance(index, RowDraw) else 0
        row = int(index)
        return {FEATURES: self.features[view, row], "labels": int(self.labels[row]), "row_id": row}


class FeatureCollator:
    """Makes a batch of rows of ``CachedFeatures``; of any other rows another collator does.

    Args:
        other: The collator of the rows that have no features.

    Returns:
        "features" (batch, in_features) float32, "labels" (batch,) int64, "row_id" (batch,) int64.
    """

    def __init__(self, other: Callable[[Sequence[Any]], Any]) -> None:
        self._other = other

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch of these rows."""
        return default_collate([*rows]) if FEATURES in rows[0] else self._other(rows)


def cache_features(
    model: ETFModel,
    rows: Any,
    collate: Callable[[Sequence[Any]], Any],
    *,
    views: int = 1,
    batch_size: int = 128,
    num_workers: int = 0,
) -> CachedFeatures:
    """Read what a model's head reads of each row once, in evaluation mode, shared out over the processes.

    A model takes the features in place of its inputs: ``model(features=..., labels=...)`` runs its head alone.

    Args:
        model: An adapted model with one head, whose backbone stays as it is.
        rows: The rows, map-style, with a column of labels (``etf_adapt.data.long_tail.labels_of``).
        collate: Makes a batch of them, with ``labels`` and ``row_id``.
        views: How often each row is read: with one it is read as a plain int asks for it; with more by a ``RowDraw`` of the
            epochs 0 to views - 1, each with an augmentation of its own.
        batch_size: Rows of a batch.
        num_workers: Workers of the loader.

    Returns:
        The features in float32 on the CPU, the same on every process.

    Raises:
        ValueError: The model has several heads, ``views`` does not fit the rows, or their numbers are not their places.
    """
    if len(head_modules(model)) != 1:
        raise ValueError(f"`model` has {len(head_modules(model))} heads: features are kept of models with one.")
    if views < 1:
        raise ValueError(f"`views` (={views}) must be at least 1.")
    if views > 1 and lengths_of(rows, "length") is not None:
        raise ValueError(f"`views` (={views}) must be 1 for texts, which are not augmented.")
    if new := list(new_weights(model)):
        warnings.warn(
            f"{len(new)} weights before the head, such as {new[0]}, are new and random, as the model's file holds none: kept "
            "features leave them so. Without cache_features they are trained.",
            stacklevel=2,
        )
        model._new_weights = ()
    labels = labels_of(rows)
    parts = [
        _read(model, rows, collate, None if views == 1 else view, batch_size, num_workers) for view in range(views)
    ]
    return CachedFeatures(torch.stack(parts), labels, rows)


def _read(
    model: ETFModel, rows: Any, collate: Callable[[Sequence[Any]], Any], view: int | None, batch_size: int, workers: int
) -> Tensor:
    lengths = lengths_of(rows, "length")
    order: Any = _Draws(len(rows), view) if lengths is None else EvenLengths(lengths, batch_size=batch_size)
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        sampler=order,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),  # or the pass would draw from the run's own
    )
    state, device = PartialState(), next(model.parameters()).device
    if state.num_processes > 1:
        shares = {"num_processes": state.num_processes, "process_index": state.process_index}
        loader = prepare_data_loader(loader, even_batches=False, **shares)
    found: list[tuple[Tensor, Tensor]] = []
    with evaluation_mode(model):
        for batch in loader:
            inputs = {name: to_device(value, device) for name, value in batch.items() if name != "labels"}
            row_ids = inputs.pop("row_id").cpu()
            found.append((row_ids, read_features(model, inputs)[0].to("cpu", torch.float32)))
    if state.num_processes > 1:
        found = gather_object(found)
    row_ids, features = (torch.cat(column) for column in zip(*found, strict=True))
    if not torch.equal(row_ids.sort().values, torch.arange(len(rows))):
        raise ValueError(
            f"`row_id` of {len(rows)} rows must be their place, 0 to {len(rows) - 1}, each once: number them after they were "
            "shuffled or selected."
        )
    return features[row_ids.argsort()]


class _Draws(Sampler[int]):
    """All rows in order: as plain ints, or as draws of an epoch."""

    def __init__(self, rows: int, epoch: int | None) -> None:
        self._rows, self._epoch = rows, epoch

    def __iter__(self) -> Iterator[int]:
        rows = range(self._rows)
        return iter(rows if self._epoch is None else [RowDraw(row, self._epoch, row) for row in rows])

    def __len__(self) -> int:
        return self._rows
