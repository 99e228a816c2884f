"""Classification metrics for imbalanced classes: recalls by groups of classes, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from numpy.typing import NDArray

from etf_adapt.data.long_tail import Ids, check_labels

SHOT_BOUNDS = (20, 100)  # least and greatest training count of a medium class (Liu et al. 2019)
CALIBRATION_BINS = 15

Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = Sequence[int] | Ids


class InMemoryMetric(evaluate.Metric):
    """Base of metrics that hold their rows as arrays in memory; subclasses define `add_batch` and `_compute`."""

    columns: ClassVar[dict[str, Any]]  # types of the required columns

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[dict[str, NDArray[Any]]] = []
        self._closed = False  # whether the next batch begins anew

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=Features(self.columns))

    def _build_data_dir(self) -> str:
        # `evaluate` would make a folder in the user's cache here, for rows that are never written.
        return ""

    def __len__(self) -> int:
        return sum(len(batch["references"]) for batch in self._batches)

    def add(self, **row: Any) -> None:
        """Add one row; arguments as `add_batch`, without the plural."""
        plural = {name: "losses" if name == "loss" else f"{name}s" for name in row}
        self.add_batch(**{plural[name]: [value] for name, value in row.items() if value is not None})

    def compute(self, **rows: Any) -> dict[str, float | None]:
        """Compute all measures of the rows added, after adding those given here; arguments as `add_batch`."""
        if any(values is not None for values in rows.values()):
            self.add_batch(**rows)
        results: dict[str, float | None] = self._compute(**self._columns())
        self._closed = True
        return results

    def _hold(self, batch: dict[str, NDArray[Any]]) -> None:
        if self._closed:
            self._batches, self._closed = [], False
        if self._batches and batch.keys() != self._batches[0].keys():
            raise ValueError(
                f"This batch has {sorted(batch)}, the first had {sorted(self._batches[0])}: add confidences and losses for all "
                "batches or for none."
            )
        self._batches.append(batch)

    def _columns(self) -> dict[str, NDArray[Any]]:
        """Join the batches: one array (rows, ...) for each name."""
        if len(self) == 0:
            raise ValueError("No rows were added: there is nothing to measure; add batches with `add_batch` first.")
        return {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}


class ShotAccuracy(InMemoryMetric):
    r"""Measure accuracy over all rows, over classes and over groups of classes, and calibration.

    With :math:`r_c` the recall of class c, over the classes that have test rows:

    - ``accuracy``: share of rows that are right; ``balanced_accuracy``: mean of all :math:`r_c`; ``macro_f1``: mean F1 over
      the classes that have test rows or predictions (scikit-learn's default).
    - ``many``, ``medium``, ``few``: mean of :math:`r_c` over the classes with more training rows than the bounds, within them
      and below; ``head_third``, ``middle_third``, ``tail_third``: the same over thirds of the classes by training rows. None
      without class counts, and for a group that has no class with test rows.
    - ``ece``: expected calibration error :math:`\sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|` over 15 bins
      of equal width, each open below and closed above (Guo et al.); ``loss``: mean loss of the rows;
      ``balanced_loss``: mean of the classes' mean losses, those of fewer than five rows pooled. None where no
      confidences or losses were added.

    All are fractions from 0 to 1, except the losses. Predictions are held in memory until the first batch after `compute`;
    nothing is written to disk.

    Args:
        class_counts: Training rows of each class (num_classes,), 0 for a class that has none.
        shot_bounds: Least and greatest count of the ``medium`` group.

    Raises:
        ValueError: The counts or bounds are invalid.

    References:
        Liu et al. (2019). Large-Scale Long-Tailed Recognition in an Open World. https://arxiv.org/abs/1904.05160
        Guo et al. (2017). On Calibration of Modern Neural Networks. https://arxiv.org/abs/1706.04599

    Example:
        >>> metric = ShotAccuracy(class_counts=[500, 50, 5])
        >>> metric.add_batch(predictions=[0, 0, 1], references=[0, 1, 1])
        >>> metric.add_batch(predictions=[0], references=[2])
        >>> results = metric.compute()
        >>> results["accuracy"], results["balanced_accuracy"], results["medium"], results["few"], results["ece"]
        (0.5, 0.5, 0.5, 0.0, None)
    """

    columns: ClassVar = {"predictions": Value("int64"), "references": Value("int64")}

    def __init__(self, class_counts: Counts | None = None, *, shot_bounds: tuple[float, float] = SHOT_BOUNDS) -> None:
        super().__init__()
        self.shot_bounds, self.class_counts = shot_bounds, None
        if not 0 <= shot_bounds[0] <= shot_bounds[1]:
            raise ValueError(
                f"`shot_bounds` (={tuple(shot_bounds)}) must be the least and greatest count of a medium class, as (20, 100)."
            )
        if class_counts is not None:
            counts = np.asarray(class_counts.cpu() if isinstance(class_counts, torch.Tensor) else class_counts)
            if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any():
                raise ValueError(
                    f"`class_counts` (={np.array2string(counts, threshold=10)}) must hold the training rows of each class, "
                    "integers of at least 0: `etf_adapt.class_counts` counts them."
                )
            self.class_counts = counts.astype(np.int64)

    def add_batch(
        self, *, predictions: Any = None, references: Any = None, confidences: Any = None, losses: Any = None
    ) -> None:
        """Add predicted and true class ids (batch,); the first batch after `compute` begins anew.

        For all batches or none: probabilities of the predictions, from 0 to 1, and losses. Lists, arrays or tensors.
        """
        num_classes = None if self.class_counts is None else len(self.class_counts)
        batch: dict[str, NDArray[Any]] = {
            "predictions": check_labels(predictions, name="predictions", num_classes=num_classes),
            "references": check_labels(references, name="references", num_classes=num_classes),
        }
        measured = {"confidences": confidences, "losses": losses}
        batch |= {name: to_float64(values) for name, values in measured.items() if values is not None}
        for name, values in batch.items():
            if values.shape != batch["references"].shape:
                raise ValueError(
                    f"`{name}` has shape {values.shape}, but `references` has {batch['references'].shape}: one value a row."
                )
        if confidences is not None:
            # A softmax in half precision may pass 1 by a unit in the last place.
            outside = ~((batch["confidences"] >= 0.0) & (batch["confidences"] <= 1.0 + 1e-2))
            if outside.any():
                row = int(outside.argmax())
                raise ValueError(
                    f"`confidences` (={batch['confidences'][row]} at row {row}) must lie in 0..1: pass the probability of the "
                    "prediction; NaN means that the logits are not finite."
                )
            batch["confidences"] = batch["confidences"].clip(max=1.0)
        self._hold(batch)

    def _compute(self, **columns: NDArray[Any]) -> dict[str, float | None]:
        return classification_scores(**columns, class_counts=self.class_counts, shot_bounds=self.shot_bounds)

    def class_recalls(self) -> Floats:
        """Return the recall of each class (num_classes,), before or after `compute`; NaN for classes without test rows."""
        columns = self._columns()
        return _recalls_and_f1(columns["predictions"], columns["references"], self.class_counts)[0]


def classification_scores(
    predictions: Ids,
    references: Ids,
    confidences: Floats | None = None,
    losses: Floats | None = None,
    *,
    class_counts: Counts | None = None,
    shot_bounds: tuple[float, float] = SHOT_BOUNDS,
) -> dict[str, float | None]:
    """Compute the metrics of `ShotAccuracy` from all rows: predicted and true class ids, confidences and losses (rows,)."""
    recalls, f1_scores = _recalls_and_f1(predictions, references, class_counts)
    correct = predictions == references
    counts = [] if class_counts is None else class_counts  # without counts all groups are empty
    return {
        "accuracy": float(correct.mean()),
        "balanced_accuracy": _mean_recall(recalls),
        "macro_f1": float(np.nanmean(f1_scores)),
        **{name: _mean_recall(recalls[classes]) for name, classes in class_groups(counts, shot_bounds).items()},
        "ece": None if confidences is None else _calibration_error(confidences, correct),
        "loss": None if losses is None else float(losses.mean()),
        "balanced_loss": None if losses is None else pooled_class_mean(losses, references),
    }


def class_groups(class_counts: Counts, shot_bounds: Sequence[float] = SHOT_BOUNDS) -> dict[str, Ids]:
    """Return the class ids of ``many``, ``medium`` and ``few``, by the bounds, and of thirds by falling training count."""
    # Ties follow the class id. Of two classes one is head, the other tail.
    counts, (least, greatest) = np.asarray(class_counts, np.int64), shot_bounds
    order = np.argsort(-counts, kind="stable")
    size = (len(order) + 1) // 3
    return {
        "many": np.flatnonzero(counts > greatest),
        "medium": np.flatnonzero((counts >= least) & (counts <= greatest)),
        "few": np.flatnonzero(counts < least),
        "head_third": order[:size],
        "middle_third": order[size : len(order) - size],
        "tail_third": order[len(order) - size :],
    }


def pooled_class_mean(values: NDArray[Any], labels: Ids, *, min_rows: int = 5) -> float:
    """Compute the mean over classes of each one's mean value (rows,); classes of fewer than ``min_rows`` rows share theirs."""
    # The recall of a class with one row is 0 or 1, and a mean over many of those chooses by chance.
    rows, sums = np.bincount(labels), np.bincount(labels, weights=values)
    is_small = (rows > 0) & (rows < min_rows)
    own = rows >= min_rows
    shared = is_small.sum() * sums[is_small].sum() / max(rows[is_small].sum(), 1)
    return float((shared + (sums[own] / rows[own]).sum()) / (rows > 0).sum())


def _recalls_and_f1(predictions: Ids, references: Ids, class_counts: Counts | None) -> tuple[Floats, Floats]:
    """Return recall and F1 of each class; NaN where a class has no rows, or for F1 neither rows nor predictions."""
    from sklearn.metrics import precision_recall_fscore_support  # its import takes a second

    num_classes = max(predictions.max(), references.max()) + 1 if class_counts is None else len(class_counts)
    options = {"labels": np.arange(num_classes), "average": None, "zero_division": np.nan}
    _, recalls, f1_scores, _ = precision_recall_fscore_support(references, predictions, **options)
    return recalls, f1_scores


def _mean_recall(recalls: Floats) -> float | None:
    known = recalls[~np.isnan(recalls)]
    return float(known.mean()) if len(known) else None


def _calibration_error(confidences: Floats, correct: NDArray[np.bool_]) -> float:
    """Sum over bins of |right rows - sum of confidences|, by the number of rows."""
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)[1:-1]
    gaps = np.bincount(np.digitize(confidences, edges, right=True), weights=correct - confidences)
    return float(np.abs(gaps).sum() / len(correct))


def to_float64(values: Any) -> Floats:
    """Copy a list, an array or a tensor of any device and floating type to an array of float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)  # a copy, since callers may fill the same buffer again
