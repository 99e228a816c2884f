"""Set the heads of a model in closed form from one pass over the training rows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce, send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etf_adapt.data.batches import as_batches, count_classes, own_batches, raised_everywhere, read_counts, split_batch
from etf_adapt.data.long_tail import even_cap, even_sample
from etf_adapt.data.progress import progress
from etf_adapt.errors import DataError
from etf_adapt.geometry.closed_form import MEAN_FRAMES, closed_form_vectors
from etf_adapt.geometry.leave_one_out import PENALTIES, choose_penalty
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.in_model import (
    call_model,
    evaluation_mode,
    has_dropout,
    head_modules,
    logits_of,
    read_features,
    seeded_torch,
)
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.heads.seen_rows import Form, SeenRows, mean_norm

MAX_SAMPLED_ROWS = 20_000  # rows on which the penalty is chosen
MAX_KEPT_NUMBERS = 2**26  # of the features of rows that are seen again in training: 256 MiB
MIN_MEASURED_ROWS = 256  # rows on which the norm of the logits is measured


@dataclass(frozen=True)
class AlignmentResult:
    """What an alignment did."""

    frame: str
    penalties: tuple[float | None, ...]  # of each head, in mean eigenvalues; None for frames without one
    balanced_accuracy: float | None  # leave-one-out, of the first head with a chosen penalty, on a sample
    rows: int  # training rows in the statistics
    # Of each head; None for the other frames, and where the batches have no ``row_id``.
    rows_seen: tuple[SeenRows | None, ...] = field(repr=False)
    statistics: tuple[ClassStatistics, ...] = field(repr=False)  # of what each head reads of these rows


def align_head(
    model: nn.Module,
    data: Iterable[Any],
    *,
    class_counts: Any = None,
    collator: Callable[[list[Any]], Any] | None = None,
    frame: str = "whitened",
    penalty: float | None = None,
    seed: int = 0,
) -> AlignmentResult:
    r"""Set a model's classification head in closed form from the features of its training rows.

    One pass in evaluation mode gathers class counts, means and second moment of what each head reads (float64, summed over
    processes); ``geometry.closed_form.closed_form_vectors`` turns them into class vectors and biases. By default these
    are the unit vectors along the centred class means :math:`o_c = x_c - x` where the within-class covariance is white,

    .. math:: w_c = S^{-1} o_c / \sqrt{o_c^\top S^{-1} o_c}, \qquad b = -W x, \qquad S = S_w + \lambda I

    with the penalty :math:`\lambda` chosen by exact leave-one-out on a sample. They are then scaled by one number so that the
    mean norm of the centred logits is one *in training mode*, in which dropout enlarges it. A cosine head gets the class
    means. An adapted model that knew no class counts knows them afterwards, for its loss.

    Args:
        model: A model whose head was swapped (``etf_adapt.swap_head`` or ``ETFFor...``).
        data: Batches of training rows, each row once: mappings that the model's forward takes, with ``labels`` (batch,), or
            pairs (inputs, labels). Or a data set of such rows. A ``DataLoader`` or data set is shared out over the
            processes; of any other iterable each process takes every n-th batch.
        class_counts: Training rows of each class (num_classes,); or the labels of the rows, or a data set that holds them.
            Where None, the data is walked through once more to count them.
        collator: Makes batches of rows, such as ``DataCollatorWithPadding(tokenizer)``; torch's own where None.
        frame: One of ``etf_adapt.geometry.closed_form.FRAMES``; a cosine head has means only.
        penalty: :math:`\lambda` of the whitened frame, in mean eigenvalues of :math:`S_w`; chosen on the data where None.
        seed: Seed of the sample and of a random frame.

    Returns:
        What was done. The model is changed in place; its mode, gradients and random state are as before.

    Raises:
        ValueError: The model has no head of ours or the paper's, a class has no row, frame or penalty are not valid, or the
            data is in none of these forms.

    Example:
        >>> import timm
        >>> from etf_adapt import swap_head
        >>> model = swap_head(timm.create_model("test_vit"), 3)
        >>> batches = [{"x": torch.randn(6, 3, 160, 160), "labels": torch.arange(6) % 3} for _ in range(2)]
        >>> align_head(model, batches, frame="means").rows
        12
    """
    heads = _alignable_heads(model)
    is_cosine = all(head.kind == "cosine" for head in heads.values())
    frame = "means" if is_cosine else frame
    num_classes = next(iter(heads.values())).num_classes
    if class_counts is None and isinstance(data, Iterator):
        raise DataError("`data` is an iterator, gone after one pass: pass a DataLoader, or `class_counts` too.")
    data = as_batches(data, inspect.signature(model.forward).parameters, collator)
    counts = count_classes(data, num_classes) if class_counts is None else read_counts(class_counts, num_classes)
    rows = read_rows(model, data, counts, seed, max_rows=most_kept_rows(heads.values()))

    parts = zip(heads.values(), rows.statistics, rows.features, strict=True)
    penalties, accuracies = zip(*(_set_head(*part, rows, frame, penalty, seed) for part in parts), strict=True)
    if hasattr(model, "reset_calibration"):  # an adapted model
        adapted: Any = model
        adapted.reset_calibration()  # fitted to class vectors that are gone
        if adapted.etf_settings["class_counts"] is None:  # a loss that knows a prior takes it from here on
            adapted.set_loss(adapted.etf_settings["loss"], class_counts=counts.tolist())

    if len(heads) == 1 and not has_dropout(model):
        length = mean_norm(*next(iter(heads.values())).class_vectors(), rows.features[0])
    else:
        length = _norm_in_training(model, rows.first_batches, seed)
    scale = 1.0 / length if length > 0.0 and not is_cosine else 1.0  # a cosine feels no norm of its class vectors
    for head in heads.values():
        weight, bias = head.class_vectors()
        head.set_class_vectors(scale * weight, None if bias is None else scale * bias)

    return AlignmentResult(
        frame,
        penalties,
        balanced_accuracy=next((accuracy for accuracy in accuracies if math.isfinite(accuracy)), None),
        rows=int(rows.statistics[0].counts.sum()),
        rows_seen=tuple(
            _rows_seen(rows, index, head, Form(frame, penalties[index], head.bias is not None, scale))
            for index, head in enumerate(heads.values())
        ),
        statistics=tuple(rows.statistics),
    )


def _alignable_heads(model: nn.Module) -> dict[str, ClassifierHead]:
    heads = head_modules(model)
    if not heads:
        raise ValueError("`model` has no head made by etf_adapt: call swap_head(model, num_classes) first.")
    for path, head in heads.items():
        if head.kind == "paper":
            raise ValueError(f"`{path}` is a 'paper' head: the published method keeps the frame that it drew.")
    return heads


@dataclass(frozen=True)
class TrainingRows:
    """One pass over rows: what each head reads of them."""

    statistics: list[ClassStatistics]  # of each head, of all rows
    features: list[Tensor]  # of each head, of a sample even over classes: (sampled, in_features)
    labels: Tensor  # of the sample: (sampled,)
    row_ids: Tensor | None  # of the sample: (sampled,); None where the batches have none
    first_batches: list[Any]  # of this process, without labels


def read_rows(
    model: nn.Module,
    data: Iterable[Any],
    counts: np.ndarray,
    seed: int,
    *,
    max_rows: int = MAX_SAMPLED_ROWS,
    what: str = "aligning the head",
) -> TrainingRows:
    """Walk through the data once, in evaluation mode; ``counts`` (num_classes,) decide which rows are sampled."""
    heads, device = head_modules(model), next(model.parameters()).device
    # Each class's chance that a row is sampled.
    keep = torch.from_numpy(np.minimum(1.0, even_cap(counts, max_rows) / np.maximum(counts, 1)))
    statistics = [ClassStatistics.empty(len(counts), head.weight.shape[1]) for head in heads.values()]
    features: list[list[Tensor]] = [[] for _ in heads]
    labels, row_ids, first_batches = list[Tensor](), list[Tensor](), list[Any]()
    num_rows = 0
    num_batches = math.ceil(length_hint(data) / PartialState().num_processes)
    with evaluation_mode(model), raised_everywhere():
        for index, batch in progress(own_batches(data), f"{what}, batches", total=num_batches):
            inputs, batch_labels, batch_ids = split_batch(batch)
            inputs = send_to_device(inputs, device)
            # Drawn by the number of the batch: the same sample whichever process walks it.
            draw = np.random.default_rng([seed, index]).random(len(batch_labels))
            sampled = torch.from_numpy(draw) < keep[batch_labels]
            for head_index, batch_features in enumerate(read_features(model, inputs)):
                statistics[head_index].add_(batch_features, batch_labels)
                sample = batch_features[sampled.to(batch_features.device)]
                features[head_index].append(sample.to("cpu", torch.float32))
            labels.append(batch_labels[sampled])
            if batch_ids is not None:
                row_ids.append(batch_ids[sampled])
            if num_rows * PartialState().num_processes < MIN_MEASURED_ROWS:
                first_batches.append(inputs)
            num_rows += len(batch_labels)
    all_labels, all_ids = _gather(labels), _gather(row_ids)
    return TrainingRows(
        [_sum(part, device) for part in statistics],
        [_gather(part) for part in features],
        all_labels,
        all_ids if len(all_ids) == len(all_labels) else None,
        first_batches,
    )


def _sum(statistics: ClassStatistics, device: torch.device) -> ClassStatistics:
    """Sum statistics over the processes, on the device where these communicate."""
    if PartialState().num_processes == 1:  # some devices have no float64
        return statistics
    return ClassStatistics(*(reduce(part.to(device), "sum").cpu() for part in vars(statistics).values()))


def _gather(parts: list[Tensor]) -> Tensor:
    """Concatenate the parts of all processes."""
    parts = gather_object(parts)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _set_head(
    head: ClassifierHead,
    statistics: ClassStatistics,
    features: Tensor,
    rows: TrainingRows,
    frame: str,
    penalty: float | None,
    seed: int,
) -> tuple[float | None, float]:
    """Set a head; return its penalty, and the accuracy at a chosen one (else NaN)."""
    if head.kind == "cosine":
        head.set_class_vectors(statistics.means, frame="means")
        return None, math.nan
    intercept, accuracy = head.bias is not None, math.nan
    if frame != "whitened":
        penalty = None
    elif penalty is None:
        penalties = progress(PENALTIES, "choosing the penalty")
        sampled = torch.from_numpy(
            even_sample(rows.labels.numpy(), len(statistics.counts), MAX_SAMPLED_ROWS, seed=seed)
        )
        sample = features[sampled], rows.labels[sampled]
        penalty, accuracy = choose_penalty(statistics, *sample, intercept=intercept, penalties=penalties)
    generator = torch.Generator().manual_seed(seed)
    weight, bias = closed_form_vectors(statistics, frame, penalty=penalty, intercept=intercept, generator=generator)
    head.set_class_vectors(weight, bias, frame=frame)
    return penalty, accuracy


def _rows_seen(rows: TrainingRows, index: int, head: ClassifierHead, form: Form) -> SeenRows | None:
    """Return the rows as a head has read them, by which it can be set again, if they are numbered and its frame allows it."""
    is_linear = head.is_stock_layer and form.frame in MEAN_FRAMES  # a cosine head scores otherwise
    if rows.row_ids is None or not is_linear or not keeps_rows(rows.statistics[index].sums):
        return None
    return SeenRows.of(rows.row_ids, rows.labels, rows.features[index], rows.statistics[index].means, form)


def most_kept_rows(heads: Iterable[ClassifierHead]) -> int:
    """Return of how many rows at most the features are kept."""
    return max(MAX_SAMPLED_ROWS, MAX_KEPT_NUMBERS // max(head.weight.shape[1] for head in heads))


def keeps_rows(class_vectors: Tensor) -> bool:
    """Return whether classes (num_classes, in_features) are so few that two rows of each and more are kept."""
    return 2 * class_vectors.numel() <= MAX_KEPT_NUMBERS


def _norm_in_training(model: nn.Module, batches: Sequence[Any], seed: int) -> float:
    """Return the mean norm of the centred logits in training mode, with BatchNorm's statistics left alone."""
    device = next(model.parameters()).device
    totals = torch.zeros(2, device=device)  # sum of the norms, number of rows
    with evaluation_mode(model), seeded_torch(seed, device):
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        for batch in progress(batches, "measuring the norm of the logits, batches"):
            _, norms = vertex_products(logits_of(call_model(model, batch)))
            totals += torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))]).float()
    totals = reduce(totals, "sum")
    return float(totals[0] / totals[1]) if totals[1] > 0 else 0.0
