"""Passes over held-out rows: predictions of each row, and calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, send_to_device
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from etf_adapt.data.batches import leave_pass
from etf_adapt.data.long_tail import check_labels
from etf_adapt.data.progress import announced
from etf_adapt.errors import DataError
from etf_adapt.heads.in_model import evaluation_mode, logits_of
from etf_adapt.metrics.calibration import fit_logit_scale, fit_prior_adjustment
from etf_adapt.metrics.shots import ShotAccuracy
from etf_adapt.models.etf_model import ETFModel, is_live
from etf_adapt.models.names import ENTRY
from etf_adapt.models.pooling import ENCODER_CLASSES
from etf_adapt.models.weights import load_noting_new
from etf_adapt.results.tables import UNADJUSTED

UNLABELLED = -1


@dataclass(frozen=True)
class RowPredictions:
    """Predictions of each row; all arrays (rows,), in order of ``row_ids``, the row's number in its data set."""

    row_ids: np.ndarray
    labels: np.ndarray  # -1 where a batch had none
    predictions: np.ndarray  # class of the greatest logit
    unadjusted: np.ndarray  # the same without the prior adjustment
    confidences: np.ndarray  # softmax probability of the prediction
    losses: np.ndarray  # negative log-likelihood of the label; 0 without one
    kept: np.ndarray | None = None  # (rows, ...): what was asked to be kept of the logits


def load_stock(
    folder: str | Path,
    task: str,
    *,
    config: Any = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> PreTrainedModel:
    """Load a saved folder of an ``"image"`` or ``"text"`` model without this library, as its users do.

    With a pooling of its own that is the encoder, its pooling and the linear layer beside it, as sentence-transformers would.
    ``config`` stands in for the folder's; ``revision`` is of a Hub id; other arguments are transformers'.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    found = AutoConfig.from_pretrained(folder, **options) if config is None else config
    saved = getattr(found, ENTRY, None) or {}
    if saved.get("adapters") or is_live(saved):
        raise ValueError(
            f"{folder} is a training checkpoint with {'adapters' if saved.get('adapters') else 'a head'} that stock classes do "
            "not have: take the finished folder, or save the model once more to a folder that is no checkpoint."
        )
    if (pooling := saved.get("pooling", "stock")) != "stock":
        return ENCODER_CLASSES[pooling].from_folder(folder, config=config, revision=revision)
    stock = AutoModelForImageClassification if task == "image" else AutoModelForSequenceClassification
    return load_noting_new(stock, folder, config=found, **options)


def predict_rows(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_rows: int | None = None,
    offsets: Sequence[float] | None = None,
    keep: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> RowPredictions:
    """Predict each row once, over all processes, keeping no logits but what ``keep(logits, labels)`` returns of a batch's.

    A ``row_id`` that is repeated to fill a batch counts once; without it rows are numbered as they come, on a single process.
    ``offsets`` (num_classes,) were added to the logits by a prior adjustment.
    """

    def reduced() -> Iterator[tuple[Tensor, ...]]:
        for row_ids, labels, logits in _scored(model, batches):
            kept = () if keep is None else (keep(logits, labels),)
            if kept and not (isinstance(kept[0], Tensor) and len(kept[0]) == len(labels)):
                raise ValueError(
                    f"`preprocess_logits_for_metrics` (={type(kept[0]).__name__}) must return one tensor with a line for each "
                    "row of the batch: logits come as a single tensor (batch, num_classes)."
                )
            yield *_reduced(row_ids, labels, logits, offsets), *kept

    rows = RowPredictions(*(column.numpy() for column in _each_row_once(reduced())))
    if num_rows is not None and len(rows.row_ids) != num_rows:
        raise RuntimeError(f"{len(rows.row_ids)} of {num_rows} rows were predicted: the data loader leaves rows out.")
    return rows


def predictions_of(
    row_ids: Tensor, labels: Tensor, logits: Tensor, offsets: Sequence[float] | None = None
) -> RowPredictions:
    """Return the predictions of rows whose logits (rows, num_classes) are at hand; arguments as in ``predict_rows``."""
    order = row_ids.argsort()
    columns = _reduced(row_ids[order], labels[order], logits[order], offsets)
    return RowPredictions(*(column.numpy() for column in columns))


def _reduced(row_ids: Tensor, labels: Tensor, logits: Tensor, offsets: Sequence[float] | None) -> tuple[Tensor, ...]:
    """Return the columns of ``RowPredictions``."""
    confidences, predictions = logits.softmax(dim=-1).max(dim=-1)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED)
    before = predictions if offsets is None else (logits - logits.new_tensor(offsets)).argmax(dim=-1)
    return row_ids, labels, predictions, before, confidences, losses


def score_rows(
    rows: RowPredictions, class_counts: Sequence[int] | np.ndarray | None, shot_bounds: Sequence[float]
) -> dict[str, float | None]:
    """Return the metrics of ``ShotAccuracy`` for predictions of rows with labels."""
    check_labels(rows.labels)
    return ShotAccuracy(class_counts, shot_bounds=(shot_bounds[0], shot_bounds[1])).compute(
        predictions=rows.predictions, references=rows.labels, confidences=rows.confidences, losses=rows.losses
    )


def score_both(
    rows: RowPredictions, class_counts: Sequence[int] | np.ndarray | None, shot_bounds: Sequence[float]
) -> dict[str, float | None]:
    """Return these metrics and, with the ending ``_unadjusted``, the main ones before the adjustment by the prior."""
    before = score_rows(replace(rows, predictions=rows.unadjusted), class_counts, shot_bounds)
    scores = score_rows(rows, class_counts, shot_bounds)
    return scores | {f"{name}_unadjusted": before[name] for name in UNADJUSTED}


def calibrate(
    model: ETFModel, batches: Iterable[Mapping[str, Any]], class_counts: Sequence[int] | np.ndarray | None = None
) -> tuple[float, float]:
    """Fit a factor s of the logits, and with class counts an adjustment t by the prior, on held-out rows; return both.

    W <- s W and b <- s b - t log prior, in place of what was folded in before; the head becomes a stock layer if it is none.
    """
    model.fold_heads()
    model.set_calibration(1.0)
    _, labels, logits = _each_row_once(_scored(model, batches))
    check_labels(labels)
    counts = None if class_counts is None else np.asarray(class_counts)
    with announced("fitting the calibration"):
        if counts is None:
            factor, strength = fit_logit_scale(logits, labels), 0.0
        else:
            factor, strength = fit_prior_adjustment(logits, labels, torch.as_tensor(counts))
    adjustment = None if counts is None else (-strength * np.log(counts / counts.sum())).tolist()
    model.set_calibration(factor, adjustment)
    return factor, strength


def _each_row_once(parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Gather columns, the first of them row ids, over all processes on the CPU; each row once, in order of the ids."""
    own: list[Any] = []
    try:
        own += (tuple(column.cpu() for column in part) for part in parts)
    except DataError as error:
        # The other processes wait for this one's rows: they get its message. (Where weights are split, they wait for its part
        # of the forward pass, and end with it.)
        if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise
        own = [leave_pass(error)]
    gathered = gather_object(own)
    if message := next((part for part in gathered if part and isinstance(part, str)), None):
        raise DataError(message)
    if not gathered:
        raise ValueError("There are no rows to predict: the data loader gives no batch.")
    columns = [torch.cat(chunks) for chunks in zip(*gathered, strict=True)]
    first = torch.from_numpy(np.unique(columns[0].numpy(), return_index=True)[1])
    return [column[first] for column in columns]


def _scored(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield row ids, labels (``UNLABELLED`` where there are none) and float32 logits of each batch, in evaluation mode."""
    device = next(model.parameters()).device
    seen = 0
    with evaluation_mode(model):
        for batch in batches:
            inputs = dict(send_to_device(batch, device))
            labels = inputs.pop("labels", None)
            row_ids = inputs.pop("row_id", None)
            logits = logits_of(model(**inputs)).float()
            if row_ids is None:
                if PartialState().num_processes > 1:
                    raise RuntimeError("Batches without `row_id` cannot be told apart over several processes: add it.")
                row_ids = torch.arange(seen, seen + len(logits))
            seen += len(logits)
            if labels is None:
                labels = torch.full((len(logits),), UNLABELLED, device=device)
            yield row_ids, labels.clamp_min(UNLABELLED), logits
