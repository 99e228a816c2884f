"""What a head read of each training row when it was last seen: the head set anew from it, and without one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor

from etf_adapt.geometry.closed_form import TINY, closed_form_vectors, penalized_covariance, unit_vectors
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.layers import ClassifierHead

SEEN_PENALTY = 1.0  # where features have seen the rows, and no held-out row chooses: finished models want 10 to 100
MAX_MEASURED_LOGITS = 2**24


@dataclass(frozen=True)
class Form:
    """How class vectors follow from statistics: one of ``geometry.closed_form.MEAN_FRAMES``, its options, and a factor."""

    frame: str
    penalty: float | None
    intercept: bool
    scale: float


class SeenRows:
    r"""Features of training rows as a head last read them, the closed form of their statistics, and that without each row.

    A head set from the training rows knows them: the mean of a class of two rows is half of each, and a row is always near a
    mean that it is half of. Its margin says little about that of a new row, and once the margin is reached nothing draws the
    two rows together. With row i of class y left out, its own logit is that of a new row of the class,

    .. math:: u_y^{(-i)} = u_y + (w_y^{(-i)} - w_y)^\top h + b_y^{(-i)} - b_y

    where the mean of the class is that of its other rows, all else as it is. A class of one row is that row, and stays.
    """

    def __init__(
        self, row_ids: Tensor, labels: Tensor, features: Tensor, statistics: ClassStatistics, form: Form
    ) -> None:
        self.row_ids, self.labels = row_ids, labels  # (rows,): ascending numbers, and classes
        self.features, self.statistics = features, statistics  # (rows, in_features), and what follows from them
        # (rows,): the last pass before it was read, counted from 1; 0 where it has not been read and is not in the statistics.
        self.passes = torch.ones_like(row_ids)
        self._noted: list[tuple[Tensor, Tensor]] = []  # of this process, since the head was set
        self._pending: list[tuple[Tensor, Tensor]] = []  # of all processes
        self._take(form)

    @classmethod
    def of(cls, row_ids: Tensor, labels: Tensor, features: Tensor, means: Tensor, form: Form) -> SeenRows:
        """Hold rows in any order; a class that has none here stands by its mean, of ``means`` (num_classes, in_features)."""
        order = row_ids.argsort()
        repeated = row_ids[order][1:][row_ids[order].diff() == 0]
        if len(repeated):
            raise ValueError(f"`row_id` (={int(repeated[0])}) is the number of two training rows: number them apart.")
        labels, features = labels[order], features[order].float()
        statistics = ClassStatistics.of(features, labels, len(means))
        absent = torch.nonzero(statistics.counts == 0)[:, 0]
        statistics.add_(means[absent], absent)
        return cls(row_ids[order], labels, features, statistics, form)

    def hold_all(self, labels: Tensor) -> None:
        """Hold all rows of classes ``labels`` (rows,), numbered from 0: those held so far, and others yet to be read."""
        features = self.features.new_zeros(len(labels), self.features.shape[1])
        passes = self.passes.new_zeros(len(labels))
        features[self.row_ids], passes[self.row_ids] = self.features, self.passes
        self.row_ids, self.labels = torch.arange(len(labels), device=features.device), labels
        self.features, self.passes = features, passes

    def _take(self, form: Form) -> None:
        """Compute from the statistics what leaves a row out, in float32 on the device of the features."""
        self.form, statistics, device = form, self.statistics, self.features.device
        inverse = None
        if form.frame == "whitened":
            inverse = torch.linalg.inv(penalized_covariance(statistics, form.penalty)).to(device, torch.float32)
        center = statistics.center if form.intercept else torch.zeros_like(statistics.center)
        self._inverse, self._center = inverse, center.to(device, torch.float32)
        self._offsets = (statistics.means - center).to(device, torch.float32)  # o
        self._solved = self._solve(self._offsets)  # S⁻¹ o
        self._counts = statistics.counts.to(device, torch.float32)

    def to(self, device: torch.device) -> SeenRows:
        """Move what a step reads to a device."""
        for name in ("row_ids", "features", "passes", "_inverse", "_center", "_offsets", "_solved", "_counts"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else part.to(device))
        self._pending = [(row_ids.to(device), features.to(device)) for row_ids, features in self._pending]
        return self

    def logits(self, logits: Tensor, features: Tensor, row_ids: Tensor, labels: Tensor) -> Tensor:
        """Change a head's logits (batch, ..., num_classes) for features (batch, ..., in_features): each row is left out.

        ``row_ids`` and ``labels`` are (batch,). Rows that are not held here keep their logits. In place: where classes are many
        a copy costs a good part of what the head costs.
        """
        places, is_held = self._places(row_ids)
        is_held = is_held & (self.passes[places] > 0)
        positions = (1,) * (features.ndim - 2)  # a head may score each token or pixel
        offsets, solved, others = self._offsets[labels], self._solved[labels], self._counts[labels] - 1.0
        shift = (self.features[places] - self._center - offsets) / others.clamp_min(1.0).unsqueeze(1)
        change = unit_vectors(offsets - shift, solved - self._solve(shift)) - unit_vectors(offsets, solved)
        change = ((self.form.scale * is_held).unsqueeze(1) * change).view(len(labels), *positions, -1)
        moved = ((features.float() - self._center) * change).sum(dim=-1, keepdim=True)
        own = labels.view(-1, *positions, 1).expand(*logits.shape[:-1], 1)
        return logits.scatter_add_(-1, own, moved.to(logits.dtype))

    def _solve(self, offsets: Tensor) -> Tensor:
        """Return S⁻¹ of offsets (batch, in_features); of the frame of means they are what they are."""
        return offsets if self._inverse is None else offsets @ self._inverse

    def _places(self, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return where rows (batch,) have their place, and whether they have one."""
        places = torch.searchsorted(self.row_ids, row_ids).clamp_max(len(self.row_ids) - 1)
        return places, self.row_ids[places] == row_ids

    def note(self, row_ids: Tensor, features: Tensor) -> None:
        """Note what the head reads of rows (batch,) in a step: (batch, in_features)."""
        self._noted.append((row_ids, features.detach().float()))

    def gather(self) -> list[tuple[Tensor, Tensor]]:
        """Return what all processes have noted since the head was set, in the same order on each."""
        self._pending += [gather(part) for part in self._noted]
        self._noted = []
        return self._pending

    def stale(self) -> Tensor:
        """Return the numbers of the rows that have not been read since the last pass."""
        self._put_pending()
        return self.row_ids[self.passes < self.passes.max()]

    def read_again(self, row_ids: Tensor, features: Tensor) -> None:
        """Take what a pass over some of the rows has read: (batch,) and (batch, in_features), the same on all processes."""
        self._put_pending()
        self._put(row_ids.to(self.features.device), features.to(self.features.device), int(self.passes.max()) + 1)

    def _put_pending(self) -> bool:
        """Take what the steps have read; return whether that is anything."""
        pending, self._pending = self.gather(), []
        if pending:
            row_ids, features = map(torch.cat, zip(*pending, strict=True))
            self._put(row_ids, features, int(self.passes.max()))
        return bool(pending)

    def _put(self, row_ids: Tensor, features: Tensor, number: int) -> None:
        """Put what a head has read of rows (batch,), (batch, in_features), in place of what it read before."""
        places, is_held = self._places(row_ids)
        places, order = places[is_held].sort(stable=True)
        is_last = torch.ones_like(places, dtype=torch.bool)  # of a row that was drawn twice
        is_last[:-1] = places.diff() != 0
        places, features = places[is_last], features[is_held][order][is_last].float()
        was_read, labels = self.passes[places] > 0, self.labels[places.cpu()]
        self.statistics.replace_(self.features[places[was_read]], features[was_read], labels[was_read.cpu()])
        self.statistics.add_(features[~was_read], labels[~was_read.cpu()])
        self.features[places], self.passes[places] = features, number
        if not bool(self.statistics.moment.diagonal().isfinite().all()):
            raise FloatingPointError(
                "The features of the last steps are not finite. The last checkpoint is good: lower `learning_rate`, set "
                "`max_grad_norm`, or train in float32."
            )

    def realign(self, head: ClassifierHead) -> bool:
        """Set a head from the rows as the steps have read them; return whether any were read since the last time."""
        if has_read := self._put_pending():
            self.set_head(head)
        return has_read

    def set_head(self, head: ClassifierHead, form: Form | None = None) -> None:
        """Set a head from the rows as they were read last; in another form its logits are scaled to a mean norm of one."""
        form, is_new = form or self.form, form is not None
        weight, bias = closed_form_vectors(self.statistics, form.frame, penalty=form.penalty, intercept=form.intercept)
        if is_new:
            form = replace(form, scale=1.0 / max(TINY, mean_norm(weight, bias, self.features[self.passes > 0])))
        head.set_class_vectors(form.scale * weight, form.scale * bias)
        self._take(form)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it holds but its form, for a file."""
        pending = [torch.cat(parts) for parts in zip(*self.gather(), strict=True)]
        names = ("row_ids", "labels", "features", "passes")
        held = {name: getattr(self, name) for name in names} | vars(self.statistics)
        return held | dict(zip(("pending_ids", "pending_features"), pending, strict=False))

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], form: Mapping[str, Any]) -> SeenRows:
        """Return what ``tensors`` and ``form`` were of."""
        statistics = ClassStatistics(*(tensors[name] for name in ("counts", "sums", "moment")))
        found = cls(tensors["row_ids"], tensors["labels"], tensors["features"], statistics, Form(**form))
        found.passes = tensors["passes"]
        if "pending_ids" in tensors:
            found._pending.append((tensors["pending_ids"], tensors["pending_features"]))
        return found


def mean_norm(weight: Tensor, bias: Tensor | None, features: Tensor) -> float:
    """Return the mean norm of the centred logits of features (rows, in_features); where logits are many of every n-th."""
    rows = features[:: max(1, len(features) * len(weight) // MAX_MEASURED_LOGITS)]
    weight, bias = weight.to(rows), None if bias is None else bias.to(rows)
    chunks = rows.split(max(1, 2**21 // len(weight)))
    total = sum(vertex_products(F.linear(chunk, weight, bias))[1].sum().item() for chunk in chunks)
    return total / max(1, len(rows))
