"""What a head in closed form is made of, kept beside a finished model, so that rows and classes can be added or taken away."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from etf_adapt.geometry.closed_form import TINY, closed_form_vectors
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.losses.terms import log_prior
from etf_adapt.results.run_folder import STATISTICS_FILE

_ROUNDING = 64  # units in the last place of a layer's type by which a head may differ from its closed form


@dataclass(frozen=True)
class HeadStatistics:
    """The statistics of the rows that set a head, and the few numbers that decide the rest of it."""

    rows: ClassStatistics
    frame: str
    penalty: float | None
    intercept: bool
    logit_scale: float = 1.0  # root mean square of the norm of the centred logits of these rows, before the adjustment
    prior_strength: float = 0.0  # t of the adjustment - t log prior
    unread: Tensor | None = None  # (num_classes,): rows beside these of each class, where these are a sample

    @property
    def class_counts(self) -> Tensor:
        """Rows of each class (num_classes,), read or not."""
        return self.rows.counts if self.unread is None else self.rows.counts + self.unread

    def class_vectors(self) -> tuple[Tensor, Tensor]:
        """Return class vectors (num_classes, in_features) and biases (num_classes,) in float64: all of the head."""
        weight, bias = closed_form_vectors(self.rows, self.frame, penalty=self.penalty, intercept=self.intercept)
        factor = self.logit_scale / logit_norm(self.rows, weight, bias)
        return factor * weight, factor * bias + self.offsets

    @property
    def offsets(self) -> Tensor:
        """Adjustment of the logits by the prior (num_classes,)."""
        return -self.prior_strength * log_prior(self.class_counts, self.class_counts)


def by_classes(rows: ClassStatistics, classes: Tensor) -> ClassStatistics:
    """Return statistics by a new list of classes, each an old one or -1 for one without rows; one left out has none either."""
    is_old = classes >= 0
    counts, sums = torch.zeros(len(classes)).double(), torch.zeros(len(classes), rows.sums.shape[1]).double()
    counts[is_old], sums[is_old] = rows.counts[classes[is_old]], rows.sums[classes[is_old]]
    return ClassStatistics(counts, sums, rows.moment)


def logit_norm(rows: ClassStatistics, weight: Tensor, bias: Tensor) -> float:
    """Return the root mean square, over rows, of the norm of the centred logits of a layer."""
    weight, bias = weight - weight.mean(dim=0), bias - bias.mean()
    squares = ((weight @ rows.moment) * weight).sum() + 2 * bias @ weight @ rows.sums.sum(dim=0)
    return float((squares / rows.counts.sum() + bias @ bias).clamp_min(TINY).sqrt())


def set_heads(model: Any, heads: Mapping[str, HeadStatistics]) -> None:
    """Set the heads of an adapted model, rounded once to the layer's type, and its calibration."""
    first = next(iter(heads.values()))
    model.set_calibration(first.logit_scale, first.offsets.tolist() if first.prior_strength else None)
    for path, head in head_modules(model).items():
        weight, bias = heads[path].class_vectors()
        head.set_class_vectors(weight, bias if heads[path].intercept else None, frame=heads[path].frame)


def describe_heads(
    model: Any, rows: Sequence[ClassStatistics], penalties: Sequence[float | None]
) -> dict[str, HeadStatistics]:
    """Return, by path, how heads that are the closed form of these rows follow from them."""
    offsets = torch.tensor(model.etf_settings["prior_adjustment"] or [0.0], dtype=torch.float64)
    found = {}
    for (path, head), part, penalty in zip(head_modules(model).items(), rows, penalties, strict=True):
        weight, bias = head.class_vectors()
        bias = torch.zeros(len(weight)).double() if bias is None else bias - offsets
        logs = log_prior(part.counts, part.counts)
        logs = logs - logs.mean()
        strength = float(-(offsets * logs).sum() / (logs @ logs).clamp_min(TINY))
        scale = logit_norm(part, weight, bias)
        found[path] = HeadStatistics(part, head.frame, penalty, head.bias is not None, scale, strength)
    return found


def follows(head: ClassifierHead, statistics: HeadStatistics) -> bool:
    """Return whether a layer is, to the rounding of its type, the head that statistics give."""
    pairs = zip(head.class_vectors(), statistics.class_vectors(), strict=True)
    limit = _ROUNDING * torch.finfo(head.weight.dtype).eps
    return all(
        own is None or (own.shape == made.shape and bool((own - made).abs().max() <= limit * made.abs().max()))
        for own, made in pairs
    )


def save_statistics(folder: str | Path, heads: Mapping[str, HeadStatistics]) -> None:
    """Write the statistics beside a model, in a file that stock readers pass over; no file where there are none."""
    if not heads:
        return
    tensors: dict[str, Tensor] = {}
    settings = {}
    for path, head in heads.items():
        values = {field.name: getattr(head, field.name) for field in dataclasses.fields(head)}
        parts = {**vars(values.pop("rows")), "unread": values.pop("unread")}
        tensors |= {f"{path}.{name}": part.contiguous() for name, part in parts.items() if part is not None}
        settings[path] = values
    save_file(tensors, Path(folder, STATISTICS_FILE), metadata={"heads": json.dumps(settings)})


def load_statistics(location: str | Path) -> dict[str, HeadStatistics]:
    """Return what ``save_statistics`` wrote, by the path of the head, in a folder or on the Hub; nothing without the file."""
    file = cached_file(str(location), STATISTICS_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as stored:
        settings, found = json.loads(stored.metadata()["heads"]), {}
        for path, values in settings.items():
            rows = ClassStatistics(*(stored.get_tensor(f"{path}.{name}") for name in ("counts", "sums", "moment")))
            name = f"{path}.unread"
            unread = stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118 - no mapping
            found[path] = HeadStatistics(rows, **values, unread=unread)
        return found
