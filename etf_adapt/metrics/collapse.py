"""Neural collapse of features and head, as an `evaluate` metric that keeps class means and no rows."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import NDArray

from etf_adapt.data.long_tail import check_labels
from etf_adapt.metrics.shots import StreamingMetric, to_float64


class NeuralCollapse(StreamingMetric):
    r"""Measure how far features and head are from neural collapse, NC1 to NC4 (Papyan, Han, Donoho).

    With :math:`\mu_c` the mean feature of class c, :math:`\bar\mu` the plain mean of the class means, :math:`m_c =
    \mu_c - \bar\mu` the rows of M, and K the number of classes that have rows:

    - ``nc1`` :math:`= \operatorname{tr}(S_w S_b^+) / K`: spread within the classes relative to that between them;
    - ``nc2`` :math:`= \bigl\| MM^\top / \|MM^\top\|_F - (I - \mathbf{1}\mathbf{1}^\top / K) / \sqrt{K-1} \bigr\|_F`:
      distance of the Gram matrix from the simplex's, in lengths and angles (the measure of Zhu et al., here on the
      class means);
      ``nc2_norms``: standard deviation over mean of the :math:`|m_c|`;
      ``nc2_angles``: mean over pairs of :math:`|\cos(m_i, m_j) + 1/(K-1)|`;
    - ``nc3`` :math:`= \bigl\| \tilde W / \|\tilde W\|_F - M / \|M\|_F \bigr\|_F`: distance of the head from the
      means, from 0 to 2;
    - ``nc4``: share of rows that the head and the nearest class mean put into different classes.

    All are 0 at collapse. Variant: every class weighs the same in nc1 to nc3, however many rows it has (:math:`S_w`
    is the mean of the classes' covariances, :math:`S_b` that of the :math:`m_c m_c^\top`), which is the original
    where the classes are equally filled; :math:`\tilde W` is the head's weight less its mean row, which no decision
    depends on; nc3 is not squared. They are invariant to rotations, shifts and scale of the feature space. With fewer
    than K - 1 features nc2 cannot reach 0.

    To measure the logit space instead of the feature space, pass the centred logits as features and the identity as
    weight.

    The rows are seen twice, in any batches: for the means (`add_batch`), then for what is measured from the means
    (`add_second_pass`); without the second pass nc1 and nc4 are None. `compute` does both for rows given to it. A
    measure that is not defined, as with class means that coincide, is None.

    Args:
        weight: Weight of the head (num_classes, in_features): array or tensor.
        bias: Bias of the head (num_classes,); zero where None.

    Raises:
        ValueError: The shapes do not fit.

    References:
        Papyan, Han, Donoho (2020). Prevalence of neural collapse during the terminal phase of deep learning training.
        https://arxiv.org/abs/2008.08186
        Zhu et al. (2021). A Geometric Analysis of Neural Collapse with Unconstrained Features.
        https://arxiv.org/abs/2105.02375

    Example:
        >>> vertices = np.eye(3) - 1 / 3
        >>> results = NeuralCollapse(vertices).compute(features=vertices[[0, 1, 2, 0]], references=[0, 1, 2, 0])
        >>> {name: round(value, 6) for name, value in results.items()}
        {'nc1': 0.0, 'nc2': 0.0, 'nc2_norms': 0.0, 'nc2_angles': 0.0, 'nc3': 0.0, 'nc4': 0.0}
    """

    _weight: NDArray[np.float64]
    _bias: NDArray[np.float64]
    _closed: bool
    _rows: NDArray[np.int64]
    _sums: NDArray[np.float64]
    _measured_from: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None
    _second_rows: NDArray[np.int64]
    _spreads: NDArray[np.float64]
    _disagreements: int

    def __init__(self, weight: Any, bias: Any = None) -> None:
        super().__init__()
        self._weight = to_float64(weight)
        if self._weight.ndim != 2:
            raise ValueError(f"`weight` has shape {self._weight.shape}, but must be (num_classes, in_features).")
        classes = len(self._weight)
        self._bias = np.zeros(classes) if bias is None else to_float64(bias)
        if self._bias.shape != (classes,):
            raise ValueError(f"`bias` has shape {self._bias.shape}, but `weight` has {classes} classes: ({classes},).")
        self._reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Neural collapse of features and head (Papyan, Han, Donoho 2020).",
            citation="",
            inputs_description="",
            features=Features({"features": List(Value("float64")), "references": Value("int64")}),
        )

    def __len__(self) -> int:
        return int(self._rows.sum())

    def add_batch(self, *, features: Any = None, references: Any = None) -> None:
        """Add a batch to the first pass, that of the class means; the first batch after `compute` begins anew.

        Args:
            features: What the head scores (batch, in_features): list, array or tensor on any device.
            references: True class ids (batch,).

        Raises:
            ValueError: Shapes do not fit, a value is not finite, a class id is out of range or the second pass has
                begun.
        """
        if self._closed:
            self._reset()
        if self._measured_from is not None:
            raise ValueError("The second pass has begun: call `compute` before adding rows of another sample.")
        rows, classes = self._check(features, references)
        self._rows += np.bincount(classes, minlength=len(self._rows))
        np.add.at(self._sums, classes, rows)

    def add_second_pass(self, *, features: Any = None, references: Any = None) -> None:
        """Add a batch to the second pass, over the same rows as the first; arguments and errors as `add_batch`."""
        rows, classes = self._check(features, references)
        if self._closed or not len(self):
            raise ValueError("The second pass has no means to measure from: give all rows to `add_batch` first.")
        if self._measured_from is None:
            center, offsets = self._centred_means()
            self._measured_from = center, offsets, _whitener(offsets)
        center, offsets, whitener = self._measured_from
        centred = rows - center
        spreads = (((centred - offsets[classes]) @ whitener) ** 2).sum(axis=1)
        self._spreads += np.bincount(classes, weights=spreads, minlength=len(self._rows))
        self._second_rows += np.bincount(classes, minlength=len(self._rows))
        # |h - m|^2 orders the classes as |m|^2 / 2 - h m does.
        closeness = centred @ offsets.T - 0.5 * (offsets**2).sum(axis=1)
        nearest = np.where(self._rows > 0, closeness, -np.inf).argmax(axis=1)
        decided = (rows @ self._weight.T + self._bias).argmax(axis=1)
        self._disagreements += int((nearest != decided).sum())

    def add(self, *, feature: Any = None, reference: Any = None) -> None:
        """Add one row to the first pass; arguments as `add_batch`, without the plural."""
        self.add_batch(features=[feature], references=[reference])

    def compute(self, *, features: Any = None, references: Any = None) -> dict[str, float | None]:
        """Compute the measures of the rows added, or of those given here.

        Args:
            features: All rows of a sample (rows, in_features), to measure it in one call.
            references: Their class ids (rows,).

        Returns:
            ``nc1``, ``nc2``, ``nc2_norms``, ``nc2_angles``, ``nc3`` and ``nc4``.

        Raises:
            ValueError: Fewer than two classes have rows, or the two passes did not see the same rows.
        """
        if features is not None or references is not None:
            self.add_batch(features=features, references=references)
            self.add_second_pass(features=features, references=references)
        filled = self._rows > 0
        if filled.sum() < 2:
            raise ValueError(
                f"{filled.sum()} classes have rows, but collapse is measured between at least 2: add more rows."
            )
        second_pass = self._measured_from is not None
        if second_pass and (self._second_rows != self._rows).any():
            raise ValueError(
                f"The second pass saw {self._second_rows.sum()} rows and the first {self._rows.sum()}, or other classes: give "
                "both passes the same rows."
            )
        offsets = self._centred_means()[1][filled]
        distinct = bool(offsets.any())
        results: dict[str, float | None] = dict.fromkeys(("nc1", "nc2", "nc2_norms", "nc2_angles", "nc3", "nc4"))
        if distinct:
            results |= _simplex_deviations(offsets)
            results["nc3"] = _duality_distance(self._weight[filled], offsets)
        if second_pass and distinct:
            results["nc1"] = float((self._spreads[filled] / self._rows[filled]).mean())
        if second_pass:
            results["nc4"] = self._disagreements / len(self)
        self._closed = True
        return results

    def _centred_means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give the plain mean of the class means, and the class means less it; zero for classes without rows."""
        filled = self._rows > 0
        means = self._sums[filled] / self._rows[filled, None]
        center = means.mean(axis=0)
        offsets = np.zeros_like(self._sums)
        offsets[filled] = means - center
        if np.linalg.norm(offsets) <= len(means) * np.finfo(np.float64).eps * np.linalg.norm(means):
            offsets[:] = 0.0  # means that coincide, but for rounding
        return center, offsets

    def _check(self, features: Any, references: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        classes = check_labels(references, name="references", num_classes=len(self._weight))
        rows = to_float64(features)
        if rows.shape != (len(classes), self._weight.shape[1]):
            raise ValueError(
                f"`features` has shape {rows.shape}, but {len(classes)} references and a head of "
                f"{self._weight.shape[1]} features ask for one row each."
            )
        if not np.isfinite(rows).all():
            raise ValueError("`features` holds NaN or infinite values: the model's output is not finite.")
        return rows, classes

    def _reset(self) -> None:
        classes, width = self._weight.shape
        self._closed = False
        self._rows = np.zeros(classes, np.int64)
        self._sums = np.zeros((classes, width), np.float64)
        self._measured_from = None
        self._second_rows = np.zeros(classes, np.int64)
        self._spreads = np.zeros(classes, np.float64)
        self._disagreements = 0


def _whitener(offsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give R (in_features, rank) with R Rᵀ the pseudo-inverse of MᵀM: nc1 is the mean square of deviations times R.

    At most K - 1 directions count, as the offsets sum to zero: the last singular value is rounding, whatever its
    size.
    """
    _, scales, directions = np.linalg.svd(offsets, full_matrices=False)
    classes = int(offsets.any(axis=1).sum())
    rank = min(int((scales > scales[0] * max(offsets.shape) * np.finfo(np.float64).eps).sum()), max(classes - 1, 0))
    return directions[:rank].T / scales[:rank]


def _simplex_deviations(offsets: NDArray[np.float64]) -> dict[str, float]:
    classes = len(offsets)
    gram = offsets @ offsets.T
    simplex = (np.eye(classes) - 1.0 / classes) / np.sqrt(classes - 1.0)
    norms = np.linalg.norm(offsets, axis=1)
    units = offsets / np.where(norms > 0, norms, 1.0)[:, None]
    gaps = np.abs(units @ units.T + 1.0 / (classes - 1.0))
    return {
        "nc2": float(np.linalg.norm(gram / np.linalg.norm(gram) - simplex)),
        "nc2_norms": float(norms.std() / norms.mean()),
        "nc2_angles": float(gaps[~np.eye(classes, dtype=bool)].mean()),
    }


def _duality_distance(weight: NDArray[np.float64], offsets: NDArray[np.float64]) -> float | None:
    centred = weight - weight.mean(axis=0)
    length = np.linalg.norm(centred)
    return float(np.linalg.norm(centred / length - offsets / np.linalg.norm(offsets))) if length > 0 else None
