"""Set the heads of a model in closed form from one pass over the training rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etf_adapt.geometry.frames import LEAVABLE, PENALIZED, UNIT, closed_form_vectors, metric_root
from etf_adapt.geometry.leave_one_out import choose_penalty, left_out_changes, nearest_mean_accuracy
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.in_model import (
    evaluation_mode,
    gather_over_processes,
    head_modules,
    logits_of,
    own_batches,
    read_features,
    seeded_torch,
    sum_over_processes,
    to_device,
)
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.heads.training_logits import FeatureLengths, LeftOutRows, TrainingLogits

MAX_SAMPLED_ROWS = 20_000
_LENGTH_ROWS = 256


@dataclass(frozen=True)
class AlignmentResult:
    """What an alignment did.

    Attributes:
        frame: The closed form, as in ``etf_adapt.geometry.frames.closed_form_vectors``.
        penalties: Penalty of each head, in mean eigenvalues; None for frames without one.
        balanced_accuracy: Leave-one-out balanced accuracy of the first head on sampled training rows at that penalty;
            None for frames without a penalty.
        nearest_mean_accuracy: That of the nearest class mean of what the first head reads.
        rows: Training rows that the statistics hold.
        length: Mean length of the centred logits in training mode before they were scaled to one.
        left_out: Of each head how it changes for a training row that is left out (``etf_adapt.training_logits``); None for
            frames without such rows, and where the batches have no ``row_id``.
        lengths: Of each head the lengths of features in the metric in which its rows have one length; None where that was
            not asked for or there is no such metric.
    """

    frame: str
    penalties: tuple[float | None, ...]
    balanced_accuracy: float | None
    nearest_mean_accuracy: float | None
    rows: int
    length: float
    left_out: tuple[LeftOutRows | None, ...] = field(default=(), repr=False)
    lengths: tuple[FeatureLengths | None, ...] = field(default=(), repr=False)


def align_head(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    class_counts: Sequence[int] | np.ndarray | None = None,
    frame: str = "whitened",
    penalty: float | None = None,
    feature_lengths: bool = False,
    max_sampled_rows: int = MAX_SAMPLED_ROWS,
    seed: int = 0,
) -> AlignmentResult:
    r"""Set a model's classification head in closed form from the features of its training rows.

    One pass in evaluation mode gathers class counts, means and second moment of what each head reads (float64, summed
    over processes); ``etf_adapt.geometry.frames.closed_form_vectors`` turns them into rows and biases. A penalty that is not
    given is chosen by exact leave-one-out on sampled rows. The rows are then scaled by one number so that the mean length of
    the centred logits is one *in training mode*, in which dropout lengthens them. A cosine head gets the class means. An
    adapted model that knew no class counts knows them afterwards, for its loss.

    Args:
        model: A model whose head was swapped (``etf_adapt.swap_head`` or ``ETFFor...``).
        data: Batches of training rows, each row once, as the model's forward takes them, with ``labels`` (batch,). A
            ``DataLoader`` is shared out over the processes; of any other iterable each process takes every n-th batch.
        class_counts: Training rows of each class. Where None, the data is walked through once more to count them.
        frame: One of ``etf_adapt.geometry.frames.FRAMES``; a cosine head has means only.
        penalty: Penalty of the frames that have one, in mean eigenvalues; chosen on the data where None.
        feature_lengths: Whether to return the lengths of features in the frame's metric, where it has one.
        max_sampled_rows: Most rows whose features are kept for that choice.
        seed: Seed of the sample and of a random frame.

    Returns:
        What was done. The model is changed in place; its mode, gradients and random state are as before.

    Raises:
        ValueError: The model has no head of ours, a class has no row, or the frame does not fit the layer.

    Example:
        >>> import timm
        >>> from etf_adapt import swap_head
        >>> model = swap_head(timm.create_model("test_vit"), 3)
        >>> batches = [{"x": torch.randn(6, 3, 160, 160), "labels": torch.arange(6) % 3} for _ in range(2)]
        >>> align_head(model, batches, frame="means").rows
        12
    """
    heads = head_modules(model)
    if not heads:
        raise ValueError("`model` has no head made by etf_adapt: call swap_head(model, num_classes) first.")
    for path, head in heads.items():
        if head.kind == "paper":
            raise ValueError(
                f"`{path}` is a 'paper' head: the published method draws its frame at random and keeps it."
            )
    num_classes = next(iter(heads.values())).num_classes
    if all(head.kind == "cosine" for head in heads.values()):
        frame = "means"
    counts = _counted(data, num_classes) if class_counts is None else np.asarray(class_counts)
    with evaluation_mode(model):
        gathered = _gather(model, data, counts, heads, max_sampled_rows, seed)
    found = [
        _set_head(head, statistics, features, labels, gathered.row_ids, frame, penalty, feature_lengths, seed)
        for head, (statistics, features, labels) in zip(heads.values(), gathered.parts, strict=True)
    ]
    if hasattr(model, "reset_temperature"):  # an adapted model: a calibration was of the rows that are gone
        cast(Any, model).reset_temperature()
        settings = cast(Any, model).etf_settings
        if settings["class_counts"] is None:  # a loss that knows a prior takes it from here on
            cast(Any, model).set_loss(settings["loss"], class_counts=counts.tolist())
    length = _training_length(model, gathered.first_batches, seed)
    metrics = {path: part.lengths for path, part in zip(heads, found, strict=True) if part.lengths is not None}
    unit = length / _training_length(model, gathered.first_batches, seed, metrics) if metrics and length > 0.0 else 1.0
    scale = 1.0 / length if length > 0.0 and all(head.kind != "cosine" for head in heads.values()) else 1.0
    _scale(heads, scale)
    nearest = nearest_mean_accuracy(*gathered.parts[0])
    return AlignmentResult(
        frame,
        tuple(part.penalty for part in found),
        next((part.score for part in found if math.isfinite(part.score)), None),
        nearest if math.isfinite(nearest) else None,
        int(gathered.parts[0][0].counts.sum()),
        length,
        tuple(None if part.left_out is None else part.left_out.scaled(scale) for part in found),
        tuple(None if part.lengths is None else replace(part.lengths, unit=unit) for part in found),
    )


@dataclass(frozen=True)
class _SetHead:
    """How a head was set: fields as in ``AlignmentResult``, before the rows were scaled."""

    penalty: float | None = None
    score: float = math.nan
    left_out: LeftOutRows | None = None
    lengths: FeatureLengths | None = None


def _set_head(
    head: ClassifierHead,
    statistics: ClassStatistics,
    features: Tensor,
    labels: Tensor,
    row_ids: Tensor | None,
    frame: str,
    penalty: float | None,
    feature_lengths: bool,
    seed: int,
) -> _SetHead:
    """Set a head from the statistics of what it reads, and from sampled features with their labels and numbers."""
    if head.kind == "cosine":
        head.set_class_vectors(statistics.means, frame="means")
        return _SetHead()
    intercept, score = head.bias is not None, math.nan
    if frame not in PENALIZED:
        penalty = None
    elif penalty is None:
        penalty, score = choose_penalty(statistics, features, labels, frame, intercept=intercept)
    generator = torch.Generator().manual_seed(seed)
    weight, bias = closed_form_vectors(statistics, frame, penalty=penalty, intercept=intercept, generator=generator)
    head.set_class_vectors(weight, bias, frame=frame)
    left_out = lengths = None
    kept = statistics.counts[labels] >= 2
    if row_ids is not None and frame in LEAVABLE and bool(kept.any()):
        own = features[kept], labels[kept]
        changes = left_out_changes(statistics, *own, frame, penalty=penalty, intercept=intercept)
        left_out = LeftOutRows.of(row_ids[kept], *changes)
    if feature_lengths and frame in UNIT:
        center = statistics.center if intercept else torch.zeros_like(statistics.center)
        root = metric_root(statistics, frame, penalty=penalty, intercept=intercept)
        lengths = FeatureLengths(center, root, 1.0).to(head.weight.device)
    return _SetHead(penalty, score, left_out, lengths)


@dataclass
class _Gathered:
    """Per head: statistics of all rows, and sampled features with their labels. Their numbers. This process's first batches."""

    parts: list[tuple[ClassStatistics, Tensor, Tensor]]
    row_ids: Tensor | None
    first_batches: list[dict[str, Any]]


def _gather(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    counts: np.ndarray,
    heads: Mapping[str, ClassifierHead],
    max_sampled_rows: int,
    seed: int,
) -> _Gathered:
    device = next(model.parameters()).device
    keep = _keep_probability(counts, max_sampled_rows)
    sums: list[ClassStatistics | None] = [None] * len(heads)
    sampled: list[list[Tensor]] = [[] for _ in heads]
    sampled_labels: list[Tensor] = []
    sampled_ids: list[Tensor] = []
    first_batches: list[dict[str, Any]] = []
    rows = 0
    for index, batch in own_batches(data):
        inputs = {name: to_device(value, device) for name, value in batch.items() if name != "row_id"}
        labels = inputs.pop("labels").cpu()
        draw = np.random.default_rng([seed, index]).random(len(labels))  # of the batch, whoever walks it
        chosen = torch.from_numpy(draw < keep[labels.numpy()])
        sampled_labels.append(labels[chosen])
        if "row_id" in batch:
            sampled_ids.append(batch["row_id"].cpu()[chosen])
        for position, features in enumerate(read_features(model, inputs)):
            part = ClassStatistics.of(features, labels, len(counts))
            known = sums[position]
            sums[position] = part if known is None else known + part
            sampled[position].append(features[chosen.to(features.device)].to("cpu", torch.float32))
        if rows * PartialState().num_processes < _LENGTH_ROWS:
            first_batches.append(inputs)
        rows += len(labels)
    all_labels = _concatenate(sampled_labels)
    all_ids = _concatenate(sampled_ids)
    widths = [head.weight.shape[1] for head in heads.values()]
    parts = []
    for own, rows_kept, width in zip(sums, sampled, widths, strict=True):
        statistics = own or ClassStatistics.empty(len(counts), width)
        parts.append((_summed(statistics, device), _concatenate(rows_kept), all_labels))
    return _Gathered(parts, all_ids if len(all_ids) == len(all_labels) else None, first_batches)


def _keep_probability(counts: np.ndarray, max_sampled_rows: int) -> np.ndarray:
    """Return, for each class, the chance that a row is sampled: the same number of rows of each class where it can be."""
    cap = np.inf
    if counts.sum() > max_sampled_rows:
        ascending = np.sort(counts)
        smaller = np.concatenate([[0], np.cumsum(ascending)[:-1]])
        caps = (max_sampled_rows - smaller) / np.arange(len(counts), 0, -1)
        cap = caps[np.argmax(caps <= ascending)]
    return np.minimum(1.0, cap / np.maximum(counts, 1))


def _counted(data: Iterable[Mapping[str, Any]], num_classes: int) -> np.ndarray:
    labels = (np.asarray(batch["labels"].cpu()) for batch in data)
    return np.sum([np.bincount(part, minlength=num_classes) for part in labels], axis=0)


def _summed(statistics: ClassStatistics, device: torch.device) -> ClassStatistics:
    parts = (statistics.counts, statistics.sums, statistics.moment)
    return ClassStatistics(*(sum_over_processes(part.to(device)).cpu() for part in parts))


def _concatenate(parts: list[Tensor]) -> Tensor:
    parts = gather_over_processes(parts)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def _training_length(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    seed: int,
    metrics: Mapping[str, FeatureLengths] | None = None,
) -> float:
    """Return the mean length of the centred logits in training mode, with BatchNorm's statistics left alone."""
    scores = TrainingLogits(head_modules(model))
    scores.lengths = dict(metrics or {})
    device = next(model.parameters()).device
    totals = torch.zeros(2, device=device)
    with evaluation_mode(model), seeded_torch(seed, device):
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        for batch in batches:
            with scores.of():
                _, lengths = vertex_products(logits_of(model(**batch)))
            totals += torch.stack([lengths.sum(), lengths.new_tensor(float(len(lengths)))]).float()
    scores.remove()
    totals = sum_over_processes(totals)
    return float(totals[0] / totals[1]) if totals[1] > 0 else 0.0


def _scale(heads: Mapping[str, ClassifierHead], factor: float) -> None:
    if factor == 1.0:
        return
    for head in heads.values():
        weight, bias = head.class_vectors()
        head.set_class_vectors(factor * weight, None if bias is None else factor * bias)
