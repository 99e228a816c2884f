"""Neural collapse of features and head: the measures NC1 to NC4."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from datasets import List, Value

from etf_adapt.data.long_tail import Ids, check_labels
from etf_adapt.metrics.shots import Floats, InMemoryMetric, to_float64

_EPS = np.finfo(np.float64).eps


class NeuralCollapse(InMemoryMetric):
    r"""Measure how far features and head are from neural collapse, NC1 to NC4 (Papyan, Han, Donoho).

    With :math:`\mu_c` the mean feature of class c, :math:`\bar\mu` the mean of the class means, M the matrix of the
    :math:`m_c = \mu_c - \bar\mu`, and K the number of classes that have rows:

    - ``nc1`` :math:`= \operatorname{tr}(S_w S_b^+) / K`: spread within the classes relative to that between them;
    - ``nc2`` :math:`= \bigl\| MM^\top / \|MM^\top\|_F - (I - \mathbf{1}\mathbf{1}^\top / K) / \sqrt{K-1} \bigr\|_F`: distance
      of the Gram matrix from the simplex's (Zhu et al., here on the class means); ``nc2_norms``: standard deviation over mean
      of the :math:`|m_c|`; ``nc2_angles``: mean over pairs of :math:`|\cos(m_i, m_j) + 1/(K-1)|`;
    - ``nc3`` :math:`= \bigl\| \tilde W / \|\tilde W\|_F - M / \|M\|_F \bigr\|_F`: distance of the head from the means, 0 to 2;
    - ``nc4``: share of rows that the head and the nearest class mean put into different classes.

    All are 0 at collapse; they are invariant to rotations, shifts and scale of the feature space. With fewer than K - 1
    features nc2 cannot reach 0. A measure that is not defined, as with class means that coincide, is None. Variant: every
    class weighs the same in nc1 to nc3 (:math:`S_w` is the mean of the classes' covariances, :math:`S_b` that of the
    :math:`m_c m_c^\top`), which is the original where the classes are equally filled; :math:`\tilde W` is the head's weight
    less its mean class vector, which no decision depends on; nc3 is not squared.

    To measure the logit space, pass the centred logits as features and the identity as weight. Features are held in memory.

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

    columns: ClassVar = {"features": List(Value("float64")), "references": Value("int64")}

    def __init__(self, weight: Any, bias: Any = None) -> None:
        super().__init__()
        self._weight = to_float64(weight)
        if self._weight.ndim != 2:
            raise ValueError(f"`weight` has shape {self._weight.shape}, but must be (num_classes, in_features).")
        classes = len(self._weight)
        self._bias = np.zeros(classes) if bias is None else to_float64(bias)
        if self._bias.shape != (classes,):
            raise ValueError(f"`bias` has shape {self._bias.shape}, but `weight` has {classes} classes: ({classes},).")

    def add_batch(self, *, features: Any = None, references: Any = None) -> None:
        """Add features (batch, in_features) and true class ids (batch,); the first batch after `compute` begins anew."""
        labels = check_labels(references, name="references", num_classes=len(self._weight))
        rows = to_float64(features)
        if rows.shape != (len(labels), self._weight.shape[1]):
            raise ValueError(
                f"`features` has shape {rows.shape}, but {len(labels)} references and a head of "
                f"{self._weight.shape[1]} features ask for one row each."
            )
        if not np.isfinite(rows).all():
            raise ValueError("`features` holds NaN or infinite values: the model's output is not finite.")
        self._hold({"features": rows, "references": labels})

    def _compute(self, features: Floats, references: Ids) -> dict[str, float | None]:
        return collapse_measures(features, references, self._weight, self._bias)


def collapse_measures(features: Floats, labels: Ids, weight: Floats, bias: Floats) -> dict[str, float | None]:
    """Compute the measures of `NeuralCollapse` of all rows: features (rows, in_features), labels (rows,)."""
    classes, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    num_classes = len(classes)
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes have rows, but collapse is measured between two or more: add rows.")
    means = np.zeros((num_classes, features.shape[1]))
    np.add.at(means, own, features)
    means /= counts[:, None]
    centre = means.mean(axis=0)
    offsets, centred = means - centre, features - centre
    if np.linalg.norm(offsets) <= num_classes * _EPS * np.linalg.norm(means):
        offsets[:] = 0.0  # means that coincide, but for rounding

    results: dict[str, float | None] = dict.fromkeys(("nc1", "nc2", "nc2_norms", "nc2_angles", "nc3", "nc4"))
    # |h - m|^2 orders the classes as |m|^2 / 2 - h m does.
    nearest = classes[(centred @ offsets.T - 0.5 * (offsets**2).sum(axis=1)).argmax(axis=1)]
    results["nc4"] = float((nearest != (features @ weight.T + bias).argmax(axis=1)).mean())
    if not offsets.any():
        return results

    # The mean square of the deviations times R, with R R' (in_features, in_features) the pseudo-inverse of M'M. The offsets
    # sum to zero: of K that are not zero, the K-th singular value is rounding, whatever its size.
    _, scales, directions = np.linalg.svd(offsets, full_matrices=False)
    rank = int((scales > scales[0] * max(offsets.shape) * _EPS).sum())
    rank = min(rank, int(offsets.any(axis=1).sum()) - 1)
    spreads = (((centred - offsets[own]) @ (directions[:rank].T / scales[:rank])) ** 2).sum(axis=1)
    results["nc1"] = float((np.bincount(own, weights=spreads) / counts).mean())

    gram = offsets @ offsets.T
    simplex = (np.eye(num_classes) - 1.0 / num_classes) / np.sqrt(num_classes - 1.0)
    results["nc2"] = float(np.linalg.norm(gram / np.linalg.norm(gram) - simplex))
    norms = np.linalg.norm(offsets, axis=1)
    results["nc2_norms"] = float(norms.std() / norms.mean())
    units = offsets / np.where(norms > 0, norms, 1.0)[:, None]
    gaps = np.abs(units @ units.T + 1.0 / (num_classes - 1.0))
    results["nc2_angles"] = float(gaps[~np.eye(num_classes, dtype=bool)].mean())

    head = weight[classes] - weight[classes].mean(axis=0)
    if head.any():
        results["nc3"] = float(np.linalg.norm(head / np.linalg.norm(head) - offsets / np.linalg.norm(offsets)))
    return results
