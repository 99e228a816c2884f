"""What the logits of a training row are, where a head was set from the training rows: without the row, or for a unit feature.

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

_TINY = 1e-12


@dataclass(frozen=True)
class LeftOutRows:
    r"""By how much the head's row of a training row's own class changes where the training row is left out.

    A head that is set from the training rows knows them: the mean of a class of two rows is half of each, and a row is
    always near a mean that it is half of. Its margin over other classes says little about that of a new row, and where the
    margin is reached nothing draws the two together. With row i of class y left out, the logit of its own class becomes

    .. math:: u_y^{(-i)} = u_y + (w_y^{(-i)} - w_y)^\top h + b_y^{(-i)} - b_y

    which is what a new row of that class would have got. Classes of one row are left as they are.

    Attributes:
        row_ids: Numbers of the training rows (rows,), ascending.
        weight: Change of the row of the head (rows, in_features).
        bias: Change of its bias (rows,).

    Example:
        >>> left_out = LeftOutRows(torch.tensor([3, 8]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, 0.0]))
        >>> left_out.changes(torch.ones(3, 2), torch.tensor([8, 4, 3])).tolist()
        [2.0, 0.0, 1.5]
    """

    row_ids: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, row_ids: Tensor, weight: Tensor, bias: Tensor) -> LeftOutRows:
        """Return the changes (rows, in_features) and (rows,) of rows in any order, in float32.

        Raises:
            ValueError: Two rows have one number.
        """
        order = row_ids.argsort()
        repeated = row_ids[order][1:][row_ids[order].diff() == 0]
        if len(repeated):
            raise ValueError(f"`row_id` (={int(repeated[0])}) is the number of two training rows: number them apart.")
        return cls(row_ids[order], weight[order].float(), bias[order].float())

    def scaled(self, factor: float) -> LeftOutRows:
        """Return the changes of a head whose rows were multiplied by a factor."""
        return LeftOutRows(self.row_ids, factor * self.weight, factor * self.bias)

    def to(self, device: torch.device) -> LeftOutRows:
        """Return a copy on a device."""
        return LeftOutRows(self.row_ids.to(device), self.weight.to(device), self.bias.to(device))

    def changes(self, features: Tensor, row_ids: Tensor) -> Tensor:
        """Return by how much the logits of the rows' own classes change.

        Args:
            features: Tensor (batch, ..., in_features): with positions between, for a head that scores each.
            row_ids: Numbers of the rows (batch,); those of rows that are not held here change nothing.

        Returns:
            Tensor (batch, ...), float32.
        """
        places = torch.searchsorted(self.row_ids, row_ids).clamp_max(len(self.row_ids) - 1)
        held = self.row_ids[places] == row_ids
        positions = (1,) * (features.ndim - 2)
        weight = self.weight[places].view(len(row_ids), *positions, -1)
        change = (features.float() * weight).sum(dim=-1) + self.bias[places].view(-1, *positions)
        return change * held.view(-1, *positions)

    def logits(self, logits: Tensor, features: Tensor, row_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of a head, each row's as if the head had been set without it.

        Args:
            logits: What the head returned: (batch, ..., num_classes), as many positions as it scores.
            features: What it read: (batch, ..., in_features).
            row_ids: Numbers of the rows (batch,).
            labels: Their classes (batch,).

        Returns:
            Tensor of the shape of ``logits``.
        """
        own = torch.nn.functional.one_hot(labels, logits.shape[-1]).view(len(labels), *(1,) * (logits.ndim - 2), -1)
        return logits + (own * self.changes(features, row_ids).unsqueeze(-1)).to(logits.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it holds, by name, for a file."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LeftOutRows:
        """Return what ``tensors`` was made of."""
        return cls(**tensors)


@dataclass(frozen=True)
class FeatureLengths:
    r"""Lengths of features in the metric of their class means, relative to their mean.

    With S the matrix of the frame's closed form, and x the mean of the class means,

    .. math:: |h|_S = \sqrt{(h - x)^\top S^{-1} (h - x)}

    In the ``"whitened"`` frame the logits over this length are the cosines between feature and class means where the
    within-class covariance is white, in the ``"means"`` frame (S the identity) the cosines as they are. This is the
    normalisation by the length of the *feature* of Yang et al.: a margin cannot be had by a longer feature. It changes no
    argmax, and the saved layer is the same with and without.

    Attributes:
        center: The centre x (in_features,).
        root: A matrix R (in_features, in_features) with :math:`R^\top R = S^{-1}`; the identity where None.
        unit: The length that counts as one.

    Example:
        >>> FeatureLengths(torch.zeros(2), None, 2.5).relative(torch.tensor([[3.0, 4.0]])).tolist()
        [2.0]
    """

    center: Tensor
    root: Tensor | None
    unit: float

    def to(self, device: torch.device) -> FeatureLengths:
        """Return a copy on a device, in float32."""
        root = None if self.root is None else self.root.to(device, torch.float32)
        return FeatureLengths(self.center.to(device, torch.float32), root, self.unit)

    def relative(self, features: Tensor) -> Tensor:
        """Return the lengths of features (..., in_features) over ``unit``: (...), float32, above 0."""
        offsets = features.float() - self.center
        with torch.autocast(features.device.type, enabled=False):
            lengths = (offsets if self.root is None else offsets @ self.root.T).norm(dim=-1)
        return lengths.clamp_min(_TINY) / self.unit

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it holds, by name, for a file."""
        held = {"center": self.center, "unit": torch.tensor(self.unit, dtype=torch.float64)}
        return held if self.root is None else held | {"root": self.root}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureLengths:
        """Return what ``tensors`` was made of."""
        return cls(tensors["center"], tensors.get("root"), float(tensors["unit"]))


class TrainingLogits:
    """Changes the logits of the heads of a model while the batch that they read is named, and only then.

    Args:
        heads: The heads by path; a hook is put on each.

    Attributes:
        left_out: What changes for which rows, by the path of the head.
        lengths: What the logits are divided by, by the path of the head. Heads without an entry score as they are.

    Example:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> logits = TrainingLogits({"head": head})
        >>> logits.left_out["head"] = LeftOutRows(torch.tensor([3]), torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]))
        >>> features, plain = torch.ones(1, 2), head(torch.ones(1, 2))
        >>> with logits.of(torch.tensor([1]), torch.tensor([3])):
        ...     print((head(features) - plain).tolist())
        [[0.0, 1.5]]
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        self.left_out: dict[str, LeftOutRows] = {}
        self.lengths: dict[str, FeatureLengths] = {}
        self._batch: tuple[Tensor | None, Tensor | None] | None = None
        self._hooks = [head.register_forward_hook(partial(self._change, path)) for path, head in heads.items()]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def of(self, labels: Tensor | None = None, row_ids: Tensor | None = None) -> Iterator[None]:
        """Name the batch that the heads are about to read.

        Args:
            labels: Classes of the rows (batch,).
            row_ids: Their numbers (batch,). Where either is None no row is left out.
        """
        self._batch = labels, row_ids
        try:
            yield
        finally:
            self._batch = None

    def _change(self, path: str, head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if self._batch is None:
            return None
        (features, *_), (labels, row_ids) = inputs, self._batch
        channels = 1 if isinstance(head, nn.Conv2d) else -1
        features, logits = features.movedim(channels, -1), logits.movedim(channels, -1)
        rows, lengths = self.left_out.get(path), self.lengths.get(path)
        # Not of a part of a batch, whose rows are not known.
        if rows is not None and labels is not None and row_ids is not None and len(features) == len(row_ids):
            logits = rows.logits(logits, features, row_ids, labels)
        if lengths is not None:
            logits = (logits / lengths.relative(features).unsqueeze(-1)).to(logits.dtype)
        return logits.movedim(-1, channels)

    def clear(self) -> None:
        """Forget all rows and lengths: the heads score as they are."""
        self.left_out.clear()
        self.lengths.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it holds by kind, path and name, for a file."""
        return {
            f"{kind}/{path}/{name}": value
            for kind, held in (("left_out", self.left_out), ("lengths", self.lengths))
            for path, part in held.items()
            for name, value in part.tensors().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up what ``tensors`` returned."""
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, path, name = key.split("/")
            parts.setdefault((kind, path), {})[name] = value
        self.left_out = {
            path: LeftOutRows.from_tensors(part).to(device)
            for (kind, path), part in parts.items()
            if kind == "left_out"
        }
        self.lengths = {
            path: FeatureLengths.from_tensors(part).to(device)
            for (kind, path), part in parts.items()
            if kind == "lengths"
        }
