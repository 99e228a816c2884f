"""Passes over held-out rows that keep a few numbers a row: predictions, and the calibration of confidences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from etf_adapt.heads.in_model import evaluation_mode, head_modules, logits_of, to_device
from etf_adapt.metrics.calibration import TemperatureFit, fit_prior_adjustment
from etf_adapt.metrics.shots import pooled_balanced_accuracy
from etf_adapt.models.etf_model import STOCK_SHAPED, ETFModel
from etf_adapt.models.names import ENTRY
from etf_adapt.models.pooling import ENCODER_CLASSES

TAUS = tuple(step / 10 for step in range(21))
"""Powers that ``tau_normalize`` chooses from: 0 to 2 in tenths."""


@dataclass(frozen=True)
class RowPredictions:
    """What a model says of each row; all arrays (rows,), in order of ``row_ids``.

    Attributes:
        row_ids: Number of the row in its data set.
        labels: True class.
        predictions: Class of the greatest logit.
        unadjusted: Class of the greatest logit without the offsets that ``predict_rows`` was told of.
        confidences: Its softmax probability.
        losses: Negative log-likelihood of the true class.
    """

    row_ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    unadjusted: np.ndarray
    confidences: np.ndarray
    losses: np.ndarray


def load_stock(folder: str | Path, task: str) -> PreTrainedModel:
    """Load a saved folder as its users do without this library: by transformers, or as sentence-transformers would.

    Args:
        folder: What ``save_pretrained`` left.
        task: ``"image"`` or ``"text"``.

    Returns:
        A model of a stock class, or an encoder with its pooling and the linear layer that lies beside it.

    Raises:
        ValueError: The folder is a training checkpoint whose head or adapters stock classes do not have.
    """
    saved = getattr(AutoConfig.from_pretrained(folder), ENTRY, None) or {}
    head = saved.get("head", {"kind": "linear", "folded": False})
    if saved.get("adapters") or (head["kind"] not in STOCK_SHAPED and not head["folded"]):
        raise ValueError(
            f"{folder} is a training checkpoint with {'adapters' if saved.get('adapters') else 'a head'} that stock classes do "
            "not have: take the finished folder, or save the model once more to a folder that is no checkpoint."
        )
    if (pooling := saved.get("pooling", "stock")) != "stock":
        return ENCODER_CLASSES[pooling].from_folder(folder)
    stock = AutoModelForImageClassification if task == "image" else AutoModelForSequenceClassification
    return cast(PreTrainedModel, stock.from_pretrained(folder))


def predict_rows(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_rows: int | None = None,
    offsets: Sequence[float] | None = None,
) -> RowPredictions:
    """Predict each row once, over all processes, keeping no logits.

    Args:
        model: Classification model; it is left in the mode in which it was.
        batches: This process's batches as the model's forward takes them, with ``labels`` (batch,) and ``row_id``
            (batch,). Rows that were repeated to fill a batch are counted once, by their id. Without ``row_id`` rows are
            numbered as they come, which needs a single process.
        num_rows: Number of rows that there are in all; checked where given.
        offsets: What a prior adjustment added to the logits (num_classes,); none where None.

    Returns:
        The predictions of all rows, the same on every process.

    Raises:
        RuntimeError: A row is missing, or row ids are needed and absent.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=3)
        >>> predict_rows(model, [{"x": torch.randn(2, 3, 160, 160), "labels": torch.tensor([0, 2])}]).labels.tolist()
        [0, 2]
    """
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(RowPredictions)}
    for row_ids, labels, logits in _scored(model, batches):
        confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        before = prediction if offsets is None else (logits - logits.new_tensor(offsets)).argmax(dim=-1)
        for name, part in zip(columns, (row_ids, labels, prediction, before, confidence, losses), strict=True):
            columns[name].append(part.cpu().numpy())
    if PartialState().num_processes > 1:
        columns = {name: gather_object(chunks) for name, chunks in columns.items()}
    arrays = {name: np.concatenate(chunks) for name, chunks in columns.items()}
    unique, first = np.unique(arrays["row_ids"], return_index=True)
    if num_rows is not None and len(unique) != num_rows:
        raise RuntimeError(f"{len(unique)} of {num_rows} rows were predicted: the data loader leaves rows out.")
    return RowPredictions(**{name: values[first] for name, values in arrays.items()})


def calibrate(
    model: ETFModel,
    batches: Iterable[Mapping[str, Any]],
    class_counts: Sequence[int] | np.ndarray | None = None,
) -> tuple[float, float]:
    r"""Fold into a trained head what held-out rows say: a factor of the logits and, with counts, offsets by the prior.

    .. math:: W \leftarrow s W, \qquad b \leftarrow s b - t \log \pi

    A cosine or paper head becomes the stock layer whose confidences are meant.

    Args:
        model: Adapted model; its head is changed in place, and what was folded in before is replaced.
        batches: This process's batches of held-out rows, with ``labels`` and, on several processes, ``row_id``.
        class_counts: Training rows of each class, where the prior :math:`\pi` is to be adjusted for.

    Returns:
        The factor s and the strength t, the same on every process; t is 0 without counts.

    Raises:
        ValueError: An adjustment cannot be folded into this head.
    """
    model.fold_heads()
    model.set_temperature(1.0)
    if class_counts is None:
        factor, strength = fit_temperature(model, batches), 0.0
        model.set_temperature(factor)
    else:
        counts = np.asarray(class_counts)
        factor, strength = fit_adjustment(model, batches, counts)
        model.set_temperature(factor, (-strength * np.log(counts / counts.sum())).tolist())
    return factor, strength


def tau_normalize(model: ETFModel, batches: Iterable[Mapping[str, Any]]) -> float:
    r"""Divide the rows of a trained linear head by a power of their lengths, chosen on held-out rows: a baseline.

    .. math:: w_k \leftarrow w_k / |w_k|^\tau, \qquad b_k \leftarrow 0

    Heads trained on a long tail have longer rows for frequent classes, which :math:`\tau = 1` takes away; the power of the best
    balanced accuracy is taken of ``TAUS``, of equals the smallest.

    Args:
        model: Adapted model with one head; it is folded first, and its rows are changed in place.
        batches: This process's batches of held-out rows, with ``labels`` and, on several processes, ``row_id``.

    Returns:
        The power, the same on every process.

    Raises:
        ValueError: The model has several heads, or one that is set from the data.

    References:
        Kang et al. (2020). Decoupling Representation and Classifier for Long-Tailed Recognition.
        https://arxiv.org/abs/1910.09217
    """
    model.fold_heads()
    model.set_temperature(1.0)
    heads = list(head_modules(model).values())
    if len(heads) != 1 or heads[0].kind != "linear":
        raise ValueError(
            f"`model` has {len(heads)} head(s), the first of kind {heads[0].kind!r}: rows of one trained linear or cosine head "
            "have lengths to normalise."
        )
    weight, bias = heads[0].class_vectors()
    logits, labels = _held_out(model, batches)
    products = logits.double() - (0.0 if bias is None else bias)
    lengths = weight.norm(dim=1)
    predicted = ((products / lengths**tau).argmax(dim=1).numpy() for tau in TAUS)
    scores = [pooled_balanced_accuracy(classes, labels.numpy(), min_rows=1) for classes in predicted]
    best = TAUS[int(np.argmax(scores))]
    heads[0].set_class_vectors(weight / lengths.unsqueeze(1) ** best)
    return best


def fit_temperature(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Fit the factor of a model's logits that makes its confidences fair on held-out rows.

    Args:
        model: Classification model; it is left in the mode in which it was.
        batches: This process's batches of held-out rows, with ``labels``.

    Returns:
        The factor (``etf_adapt.metrics.calibration.TemperatureFit``), the same on every process.
    """
    fit = TemperatureFit()
    for _, labels, logits in _scored(model, batches):
        fit.add_batch(logits, labels)
    if PartialState().num_processes > 1:
        device = next(model.parameters()).device
        fit.sums = reduce(fit.sums.to(device), "sum").cpu()
        fit.rows = int(reduce(torch.tensor(fit.rows, device=device), "sum"))
    return fit.factor()


def fit_adjustment(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], class_counts: Sequence[int] | np.ndarray
) -> tuple[float, float]:
    """Fit the factor of a model's logits and the strength of an adjustment by the prior on held-out rows.

    The logits of these rows are kept, in float32 on the CPU.

    Args:
        model: Classification model; it is left in the mode in which it was.
        batches: This process's batches of held-out rows, with ``labels`` and, on several processes, ``row_id``.
        class_counts: Training rows of each class.

    Returns:
        Factor and strength (``etf_adapt.metrics.calibration.fit_prior_adjustment``), the same on every process.
    """
    logits, labels = _held_out(model, batches)
    return fit_prior_adjustment(logits, labels, torch.as_tensor(np.asarray(class_counts)))


def _held_out(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return logits (rows, num_classes) and labels (rows,) of all rows, over all processes, on the CPU."""
    parts = [(ids.cpu(), labels.cpu(), logits.cpu()) for ids, labels, logits in _scored(model, batches)]
    if PartialState().num_processes > 1:
        parts = gather_object(parts)
    row_ids, labels, logits = (torch.cat(columns) for columns in zip(*parts, strict=True))
    first = torch.from_numpy(np.unique(row_ids.numpy(), return_index=True)[1])  # rows that fill up a batch count once
    return logits[first], labels[first]


def _scored(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Yield row ids, labels and float32 logits of each batch, in evaluation mode."""
    device = next(model.parameters()).device
    seen = 0
    with evaluation_mode(model):
        for batch in batches:
            inputs = {name: to_device(value, device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            row_ids = inputs.pop("row_id", None)
            if row_ids is None:
                if PartialState().num_processes > 1:
                    raise RuntimeError("Batches without `row_id` cannot be told apart over several processes: add it.")
                row_ids = torch.arange(seen, seen + len(labels))
            seen += len(labels)
            yield row_ids, labels, logits_of(model(**inputs)).float()
