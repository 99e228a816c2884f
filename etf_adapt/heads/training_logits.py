"""What heads read of training rows, and the rows' logits by the head that would have been set without each of them.

The head itself stays an ordinary linear layer; hooks note its features and change its logits in the steps of training alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etf_adapt.heads.seen_rows import SeenRows


class TrainingLogits:
    """Notes what the heads of a model read of each row of a training batch, and leaves the row out, by hooks on these."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        self.rows: dict[str, SeenRows] = {}  # by the path of the head; heads without an entry score as they are
        self.notes = self.leaves_out = True
        self._batch: tuple[Tensor, Tensor] | None = None
        for path, head in heads.items():
            head.register_forward_hook(partial(self._change, path))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training rows out of a copy of the model, on whose heads the hooks are, and out of its file."""
        return vars(self) | {"rows": {}, "_batch": None}

    @contextmanager
    def of(self, labels: Tensor | None, row_ids: Tensor | None) -> Iterator[None]:
        """Name the classes (batch,) and numbers (batch,) of the rows that the heads are about to read.

        Where either is None no row is left out.
        """
        self._batch = None if labels is None or row_ids is None else (labels, row_ids)
        try:
            yield
        finally:
            self._batch = None

    @torch.compiler.disable  # what it notes grows at each step, and would be compiled anew
    def _change(self, path: str, head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        rows = self.rows.get(path)
        if self._batch is None or rows is None:
            return None
        (features, *_), (labels, row_ids) = inputs, self._batch
        if len(features) != len(row_ids):  # part of a batch: which rows these are is not known
            return None
        if self.notes and features[0].numel() == rows.features.shape[1]:  # else it reads each token
            rows.note(row_ids, features.flatten(1))
        if not self.leaves_out:
            return None
        if isinstance(head, nn.Conv2d):
            moved = rows.logits(logits.movedim(1, -1), features.movedim(1, -1), row_ids, labels)
            return moved.movedim(-1, 1)
        return rows.logits(logits, features, row_ids, labels)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it holds but the forms of the rows, for a file: ``PATH/NAME``."""
        return {f"{path}/{name}": value for path, rows in self.rows.items() for name, value in rows.tensors().items()}

    def forms(self) -> dict[str, Any]:
        """Return the forms of the rows by the path of their head."""
        return {path: vars(rows.form) for path, rows in self.rows.items()}

    def restore(self, tensors: Mapping[str, Tensor], forms: Mapping[str, Any], device: torch.device) -> None:
        """Take up what ``tensors`` and ``forms`` returned."""
        self.rows = {}
        for path, form in forms.items():
            parts = {key.removeprefix(f"{path}/"): part for key, part in tensors.items() if key.startswith(f"{path}/")}
            self.rows[path] = SeenRows.restored(parts, form).to(device)
