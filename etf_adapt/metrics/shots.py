"""Classification metrics for unevenly filled classes, as `evaluate` metrics that keep sums and no rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from numpy.typing import NDArray

from etf_adapt.data.long_tail import check_labels

SHOT_BOUNDS = (20, 100)
CALIBRATION_BINS = 15

_BIN_EDGES = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)


class StreamingMetric(evaluate.Metric):
    """Base of metrics that add up batches: `evaluate`'s interface without its cache files, so that nothing is written."""

    def _build_data_dir(self) -> str:
        # `evaluate` would make a folder in the user's cache here, for rows that are never stored.
        return ""


class ShotAccuracy(StreamingMetric):
    r"""Measure accuracy over all rows, over classes and over groups of classes, and calibration.

    With :math:`r_c` the recall of class c, over the classes that have test rows:

    - ``accuracy``: share of rows that are right; ``balanced_accuracy``: mean of all :math:`r_c`; ``macro_f1``: mean
      F1 over the classes that have test rows or predictions (scikit-learn's default).
    - ``many``, ``medium``, ``few``: mean of :math:`r_c` over the classes of `shot_groups`; ``head_third``,
      ``middle_third``, ``tail_third``: the same over those of `class_thirds`. They need the *training* counts, and
      are None for a group that has no class with test rows.
    - ``ece``: expected calibration error :math:`\sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|` over
      15 bins of equal width, each open below and closed above (Guo et al.); ``loss``: mean loss of the rows. None
      where no confidences or losses were added.

    All are fractions from 0 to 1, except ``loss``. Sums are integers or float64, so that batches of any size and in
    any order give the same result. Kept are three counts a class, three sums a bin and one for the loss.

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

    class_counts: NDArray[np.int64] | None
    shot_bounds: tuple[float, float]
    _closed: bool
    _true_positives: NDArray[np.int64]
    _support: NDArray[np.int64]
    _predicted: NDArray[np.int64]
    _bin_rows: NDArray[np.int64]
    _bin_correct: NDArray[np.int64]
    _bin_confidence: NDArray[np.float64]
    _loss_rows: int
    _loss_sum: float

    def __init__(
        self,
        class_counts: Sequence[int] | NDArray[np.int64] | None = None,
        *,
        shot_bounds: tuple[float, float] = SHOT_BOUNDS,
    ) -> None:
        super().__init__()
        self.class_counts = None if class_counts is None else _check_counts(class_counts)
        self.shot_bounds = _check_bounds(shot_bounds)
        self._reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy over rows, classes and groups of classes by training count, and calibration.",
            citation="",
            inputs_description="",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def __len__(self) -> int:
        return int(self._support.sum())

    def add_batch(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        confidences: Any = None,
        losses: Any = None,
    ) -> None:
        """Add a batch of rows; the first batch after `compute` begins anew.

        Args:
            predictions: Predicted class ids (batch,): list, array or tensor on any device.
            references: True class ids (batch,).
            confidences: Probability of each prediction (batch,), from 0 to 1; for all batches or none.
            losses: Loss of each row (batch,); for all batches or none.

        Raises:
            ValueError: Lengths differ, a class id is out of range or a confidence is outside 0..1.
        """
        num_classes = None if self.class_counts is None else len(self.class_counts)
        predicted = check_labels(predictions, name="predictions", num_classes=num_classes)
        true = check_labels(references, name="references", num_classes=num_classes)
        _check_length("predictions", predicted, true)
        confident = None if confidences is None else _check_confidences(confidences, true)
        row_losses = None if losses is None else to_float64(losses)
        if row_losses is not None:
            _check_length("losses", row_losses, true)

        if self._closed:
            self._reset()
        correct = predicted == true
        self._true_positives = _add_counts(self._true_positives, true[correct])
        self._support = _add_counts(self._support, true)
        self._predicted = _add_counts(self._predicted, predicted)
        if confident is not None:
            bins = np.digitize(confident, _BIN_EDGES[1:-1], right=True)
            self._bin_rows += np.bincount(bins, minlength=CALIBRATION_BINS)
            self._bin_correct += np.bincount(bins[correct], minlength=CALIBRATION_BINS)
            self._bin_confidence += np.bincount(bins, weights=confident, minlength=CALIBRATION_BINS)
        if row_losses is not None:
            self._loss_rows += len(row_losses)
            self._loss_sum += float(row_losses.sum())

    def add(self, *, prediction: Any = None, reference: Any = None, confidence: Any = None, loss: Any = None) -> None:
        """Add one row; arguments as `add_batch`, without the plural."""
        self.add_batch(
            predictions=[prediction],
            references=[reference],
            confidences=None if confidence is None else [confidence],
            losses=None if loss is None else [loss],
        )

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        confidences: Any = None,
        losses: Any = None,
        class_counts: Sequence[int] | NDArray[np.int64] | None = None,
        shot_bounds: tuple[float, float] | None = None,
    ) -> dict[str, float | None]:
        """Compute all metrics of the rows added, after adding those given here.

        Args:
            predictions: As `add_batch`, as are ``references``, ``confidences`` and ``losses``.
            references: True class ids.
            confidences: Probabilities of the predictions.
            losses: Losses of the rows.
            class_counts: Training rows of each class; those of the constructor by default.
            shot_bounds: Bounds of the ``medium`` group; those of the constructor by default.

        Returns:
            The metrics by name: ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``many``, ``medium``, ``few``,
            ``head_third``, ``middle_third``, ``tail_third``, ``ece``, ``loss``.

        Raises:
            ValueError: No rows were added, confidences or losses were added for some rows only, or the class counts
                do not fit.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, confidences=confidences, losses=losses)
        _check_coverage("confidences", int(self._bin_rows.sum()), len(self))
        _check_coverage("losses", self._loss_rows, len(self))
        results = classification_metrics(
            *_pad_together(self._true_positives, self._support, self._predicted),
            class_counts=self.class_counts if class_counts is None else class_counts,
            shot_bounds=self.shot_bounds if shot_bounds is None else shot_bounds,
        )
        gaps = np.abs(self._bin_correct - self._bin_confidence)
        results["ece"] = float(gaps.sum() / len(self)) if self._bin_rows.any() else None
        results["loss"] = self._loss_sum / self._loss_rows if self._loss_rows else None
        self._closed = True
        return results

    def class_recalls(self) -> NDArray[np.float64]:
        """Give the recall of each class, before or after `compute`.

        Returns:
            Array (num_classes,) of float64, NaN for classes without test rows. It ends at the greatest class id added
            where the constructor was given no class counts.
        """
        true_positives, support, _ = _pad_together(self._true_positives, self._support, self._predicted)
        return _recalls(true_positives, support)

    def _reset(self) -> None:
        classes = 0 if self.class_counts is None else len(self.class_counts)
        self._closed = False
        self._true_positives = np.zeros(classes, np.int64)
        self._support = np.zeros(classes, np.int64)
        self._predicted = np.zeros(classes, np.int64)
        self._bin_rows = np.zeros(CALIBRATION_BINS, np.int64)
        self._bin_correct = np.zeros(CALIBRATION_BINS, np.int64)
        self._bin_confidence = np.zeros(CALIBRATION_BINS, np.float64)
        self._loss_rows = 0
        self._loss_sum = 0.0


def classification_metrics(
    true_positives: NDArray[np.int64],
    support: NDArray[np.int64],
    predicted: NDArray[np.int64],
    *,
    class_counts: Sequence[int] | NDArray[np.int64] | None = None,
    shot_bounds: tuple[float, float] = SHOT_BOUNDS,
) -> dict[str, float | None]:
    """Compute the accuracies of `ShotAccuracy` from the three counts of each class.

    Args:
        true_positives: Rows of the class that were predicted as it (num_classes,).
        support: Rows of the class (num_classes,).
        predicted: Rows that were predicted as the class (num_classes,).
        class_counts: Training rows of each class (num_classes,) or more; without them the groups are None.
        shot_bounds: Least and greatest count of the ``medium`` group.

    Returns:
        The metrics by name, from ``accuracy`` to ``tail_third``.

    Raises:
        ValueError: There are no rows, or fewer class counts than classes.

    Example:
        >>> counts = np.array([3, 0]), np.array([3, 1]), np.array([4, 0])
        >>> classification_metrics(*counts)["balanced_accuracy"]
        0.5
    """
    rows = int(support.sum())
    if rows == 0:
        raise ValueError("No rows were added: there is nothing to measure; add batches with `add_batch` first.")
    recalls = _recalls(true_positives, support)
    seen = support + predicted > 0
    f1_scores = 2.0 * true_positives[seen] / (support + predicted)[seen]
    results: dict[str, float | None] = {
        "accuracy": float(true_positives.sum() / rows),
        "balanced_accuracy": _mean_recall(recalls),
        "macro_f1": float(f1_scores.mean()),
    }
    groups: dict[str, NDArray[np.int64]] = dict.fromkeys(
        ("many", "medium", "few", "head_third", "middle_third", "tail_third"), np.array([], np.int64)
    )
    if class_counts is not None:
        counts = _check_counts(class_counts)
        if len(counts) < len(recalls):
            raise ValueError(
                f"`class_counts` has {len(counts)} classes, but class {len(recalls) - 1} occurs: pass the count of each class."
            )
        recalls = np.pad(recalls, (0, len(counts) - len(recalls)), constant_values=np.nan)
        groups = shot_groups(counts, shot_bounds=shot_bounds)
        groups |= {f"{name}_third": classes for name, classes in class_thirds(counts).items()}
    return results | {name: _mean_recall(recalls[classes]) for name, classes in groups.items()}


def shot_groups(
    class_counts: Sequence[int] | NDArray[np.int64], *, shot_bounds: tuple[float, float] = SHOT_BOUNDS
) -> dict[str, NDArray[np.int64]]:
    """Group the classes by training count: many above the bounds, medium within them, few below.

    Args:
        class_counts: Training rows of each class (num_classes,).
        shot_bounds: Least and greatest count of the medium group; (20, 100) is the field's (Liu et al. 2019).

    Returns:
        Class ids of ``many``, ``medium`` and ``few``, each ascending and possibly empty.

    Raises:
        ValueError: The counts or bounds are invalid.

    Example:
        >>> {name: classes.tolist() for name, classes in shot_groups([101, 100, 20, 19]).items()}
        {'many': [0], 'medium': [1, 2], 'few': [3]}
    """
    counts = _check_counts(class_counts)
    least, greatest = _check_bounds(shot_bounds)
    return {
        "many": np.flatnonzero(counts > greatest),
        "medium": np.flatnonzero((counts >= least) & (counts <= greatest)),
        "few": np.flatnonzero(counts < least),
    }


def class_thirds(class_counts: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Split the classes into thirds by training count, the largest first, ties by class id.

    The head and the tail are equally large and the middle differs from them by one class at most: it has one more
    where num_classes leaves 1 on division by 3, one less where 2. So of two classes the larger is the head, the
    smaller the tail.

    Args:
        class_counts: Training rows of each class (num_classes,).

    Returns:
        Class ids of ``head``, ``middle`` and ``tail``, in order of falling count.

    Example:
        >>> {name: classes.tolist() for name, classes in class_thirds([5, 100]).items()}
        {'head': [1], 'middle': [], 'tail': [0]}
    """
    order = np.argsort(-_check_counts(class_counts), kind="stable")
    size = (len(order) + 1) // 3
    return {"head": order[:size], "middle": order[size : len(order) - size], "tail": order[len(order) - size :]}


def _recalls(true_positives: NDArray[np.int64], support: NDArray[np.int64]) -> NDArray[np.float64]:
    recalls = np.full(len(support), np.nan)
    np.divide(true_positives, support, out=recalls, where=support > 0)
    return recalls


def _mean_recall(recalls: NDArray[np.float64]) -> float | None:
    known = recalls[~np.isnan(recalls)]
    return float(known.mean()) if len(known) else None


def _add_counts(counts: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    added = np.bincount(ids, minlength=len(counts))
    added[: len(counts)] += counts
    return added


def _pad_together(*counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    longest = max(map(len, counts))
    return [np.pad(array, (0, longest - len(array))) for array in counts]


def to_float64(values: Any) -> NDArray[np.float64]:
    """Convert a list, an array or a tensor of any device and floating type to an array of float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def _check_confidences(confidences: Any, references: NDArray[np.int64]) -> NDArray[np.float64]:
    values = to_float64(confidences)
    _check_length("confidences", values, references)
    # A softmax in half precision may pass 1 by a unit in the last place.
    outside = ~((values >= 0.0) & (values <= 1.0 + 1e-2))
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"`confidences` (={values[row]} at row {row}) must lie in 0..1: pass the probability of the prediction; NaN "
            "means that the logits are not finite."
        )
    return np.minimum(values, 1.0)


def _check_length(name: str, values: NDArray[Any], references: NDArray[np.int64]) -> None:
    if values.shape != references.shape:
        raise ValueError(
            f"`{name}` has shape {values.shape}, but `references` has {references.shape}: one value a row."
        )


def _check_coverage(name: str, rows: int, total: int) -> None:
    if rows not in (0, total):
        raise ValueError(f"`{name}` were added for {rows} of {total} rows: add them for all batches or for none.")


def _check_counts(class_counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    counts = np.asarray(class_counts.cpu() if isinstance(class_counts, torch.Tensor) else class_counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(
            f"`class_counts` (={np.array2string(counts, threshold=10)}) must hold the training rows of each class, "
            "integers of at least 0: `etf_adapt.class_counts` counts them."
        )
    return counts.astype(np.int64)


def _check_bounds(shot_bounds: tuple[float, float]) -> tuple[float, float]:
    least, greatest = shot_bounds
    if not 0 <= least <= greatest:
        raise ValueError(
            f"`shot_bounds` (={tuple(shot_bounds)}) must be the least and the greatest count of the medium "
            "group, such as (20, 100)."
        )
    return least, greatest


def pooled_balanced_accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64], *, min_rows: int = 5) -> float:
    r"""Compute the balanced accuracy with one recall for all classes that have few rows.

    The recall of a class with one row is 0 or 1, and a mean over many of those chooses by chance. With
    :math:`r_c` the recall of a class with at least ``min_rows`` rows, m the number of classes with fewer but at least one,
    and R the share of right rows among all of theirs:

    .. math:: \frac{\sum_c r_c + m R}{\#\{c\} + m}

    so each class keeps its weight and the small ones share a recall. It is the balanced accuracy where no class is small,
    and the accuracy where all are.

    Args:
        predictions: Predicted classes (rows,).
        labels: True classes (rows,).
        min_rows: Rows from which a class has a recall of its own.

    Returns:
        A share from 0 to 1.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 1, 2])
        >>> float(pooled_balanced_accuracy(np.array([0, 0, 0, 0, 1, 0]), labels, min_rows=3))
        0.6666666666666666
    """
    rows = np.bincount(labels)
    right = np.bincount(labels[predictions == labels], minlength=len(rows))
    large, small = rows >= min_rows, (rows > 0) & (rows < min_rows)
    recalls = np.sum(right[large] / rows[large])
    if small.any():
        recalls += small.sum() * right[small].sum() / rows[small].sum()
    return float(recalls / (large.sum() + small.sum()))
