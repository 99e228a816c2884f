"""Logits of training rows by the head that would have been set without each of them.

The head itself stays an ordinary linear layer; hooks change its logits in the steps of training alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LeftOutRows:
    r"""How the class vector and bias of a training row's own class change when that row is left out.

    A head set from the training rows knows them: the mean of a class of two rows is half of each, and a row is always near a
    mean that it is half of. Its margin says little about that of a new row, and once the margin is reached nothing draws the
    two rows together. With row i of class y left out, its own logit is that of a new row of the class,

    .. math:: u_y^{(-i)} = u_y + (w_y^{(-i)} - w_y)^\top h + b_y^{(-i)} - b_y

    Classes of one row are left as they are.
    """

    row_ids: Tensor  # (rows,), ascending
    weight: Tensor  # (rows, in_features): change of the class vector
    bias: Tensor  # (rows,): change of the bias

    @classmethod
    def of(cls, row_ids: Tensor, weight: Tensor, bias: Tensor) -> LeftOutRows:
        """Return the changes of rows in any order, in float32."""
        order = row_ids.argsort()
        repeated = row_ids[order][1:][row_ids[order].diff() == 0]
        if len(repeated):
            raise ValueError(f"`row_id` (={int(repeated[0])}) is the number of two training rows: number them apart.")
        return cls(row_ids[order], weight[order].float(), bias[order].float())

    def scaled(self, factor: float) -> LeftOutRows:
        """Return the changes of a head that was multiplied by a factor."""
        return LeftOutRows(self.row_ids, factor * self.weight, factor * self.bias)

    def to(self, device: torch.device) -> LeftOutRows:
        """Return a copy on a device."""
        return LeftOutRows(self.row_ids.to(device), self.weight.to(device), self.bias.to(device))

    def logits(self, logits: Tensor, features: Tensor, row_ids: Tensor, labels: Tensor) -> Tensor:
        """Change a head's logits (batch, ..., num_classes) for features (batch, ..., in_features): each row is left out.

        ``row_ids`` and ``labels`` are (batch,). Rows that are not held here keep their logits. In place: where classes are many
        a copy costs a good part of what the head costs.
        """
        places = torch.searchsorted(self.row_ids, row_ids).clamp_max(len(self.row_ids) - 1)
        positions = (1,) * (features.ndim - 2)  # a head may score each token or pixel
        held = (self.row_ids[places] == row_ids).view(-1, *positions)
        weight, bias = self.weight[places].view(len(row_ids), *positions, -1), self.bias[places].view(-1, *positions)
        change = ((features.float() * weight).sum(dim=-1) + bias) * held
        own = labels.view(-1, *positions, 1).expand(*logits.shape[:-1], 1)
        return logits.scatter_add_(-1, own, change.unsqueeze(-1).to(logits.dtype))


class TrainingLogits:
    """Leaves each row of a training batch out of the heads of a model, by hooks on these, while the batch is named."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        self.left_out: dict[str, LeftOutRows] = {}  # by the path of the head; heads without an entry score as they are
        self._batch: tuple[Tensor, Tensor] | None = None
        for path, head in heads.items():
            head.register_forward_hook(partial(self._change, path))

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

    def _change(self, path: str, head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        rows = self.left_out.get(path)
        if self._batch is None or rows is None:
            return None
        (features, *_), (labels, row_ids) = inputs, self._batch
        if len(features) != len(row_ids):  # part of a batch: which rows these are is not known
            return None
        if isinstance(head, nn.Conv2d):
            moved = rows.logits(logits.movedim(1, -1), features.movedim(1, -1), row_ids, labels)
            return moved.movedim(-1, 1)
        return rows.logits(logits, features, row_ids, labels)

    def clear(self) -> None:
        """Forget all rows: the heads score as they are."""
        self.left_out.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it holds, for a file: ``PATH/NAME``."""
        held = self.left_out.items()
        return {f"{path}/{name}": value for path, rows in held for name, value in vars(rows).items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up what ``tensors`` returned."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            path, name = key.split("/")
            parts.setdefault(path, {})[name] = value
        self.left_out = {path: LeftOutRows(**part).to(device) for path, part in parts.items()}
