"""Losses on stock logits: dot regression in its forms, and the logit-adjusted cross-entropy to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.simplex import vertex_products

LOSS_NAMES = ("dot_regression", "cross_entropy", "logit_adjusted")
DOT_REGRESSION_FORMS = ("one_sided", "ball", "sphere")
BALANCES = ("none", "in_batch")

Loss = Callable[[Tensor, Tensor], Tensor]


def dot_regression_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    lengths: Tensor | None = None,
    form: str = "one_sided",
    class_weights: Tensor | None = None,
    balance: str = "none",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Regress the cosine between the centred logits and the label's simplex vertex to one.

    With :math:`p_k = m_k^\top P u` the inner product of the centred logits with vertex k and :math:`r` their length,

    .. math:: L = \sum_k y_k\,\tfrac12\,(1 - c_k)^2, \qquad
        c_k = \begin{cases} p_k / r & \text{sphere} \\ p_k / \max(1, r) & \text{ball} \\
        p_k / \max(1, r) \text{ if } p_k > 0, \text{ else } p_k & \text{one-sided} \end{cases}

    *sphere* is the dot-regression loss of Yang et al. (with unit lengths; the half is theirs). *ball* is the
    same with features inside the unit ball rather than on its surface (the norm constraint of their layer-peeled model).
    With K = 2 the first has no gradient anywhere, the second none for a misclassified row outside the ball. *one-sided*,
    the default, keeps the ball's value for rows on the right side of the vertex and is linear in the logits for the others,
    so that every row that is not at its vertex is pulled towards it, for every K >= 2.

    ``balance="in_batch"`` is what the authors' published code computes: the mean over the classes *present in the
    batch* of each class's mean loss. It depends on the batch size and on the number of processes.

    Args:
        logits: Tensor (batch, num_classes), any floating type.
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        lengths: Tensor (batch,) or scalar that replaces r. For the paper's normalisation by the length of the
            feature h, pass ``sqrt(K / (K - 1)) * |h|`` for unit rows.
        form: ``"one_sided"``, ``"ball"`` or ``"sphere"``.
        class_weights: Tensor (num_classes,): factor of each class's term. The mean is over rows, not over weights, so
            that the mean of a batch is the mean of its equal parts.
        balance: ``"none"`` or ``"in_batch"``.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar tensor, or (batch,) with ``reduction="none"``; float32 (float64 for float64 logits). From 0 (at the
        vertex) to 2 (at its antipode) for the sphere and the ball, unbounded for the one-sided form.

    Raises:
        ValueError: An option is not one of those above, or labels and logits do not fit.

    References:
        Yang et al. (2022). https://arxiv.org/abs/2203.09081

    Example:
        >>> logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
        >>> dot_regression_loss(logits, torch.tensor([0, 2])).item() < 1e-12
        True
    """
    _check_choice("form", form, DOT_REGRESSION_FORMS)
    _check_choice("balance", balance, BALANCES)
    soft = _soft_labels(logits, labels, label_smoothing)
    products, own_lengths = vertex_products(logits)
    length = own_lengths if lengths is None else torch.as_tensor(lengths, device=products.device).to(products.dtype)
    if soft is None:
        products = products.gather(1, labels.unsqueeze(1))  # (batch, 1): the other classes play no part
    length = length.expand(products.shape[0]).unsqueeze(1)
    if form == "sphere":
        cosines = products / length.clamp_min(torch.finfo(products.dtype).tiny)
    else:
        cosines = products / length.clamp_min(1.0)
        if form == "one_sided":
            cosines = torch.where(products > 0, cosines, products)
    terms = 0.5 * (1.0 - cosines) ** 2
    if soft is not None:
        terms = terms * soft
    weights = _term_weights(labels, soft, class_weights, balance, logits)
    if weights is not None:
        terms = terms * weights
    return _reduce(terms.sum(dim=1), reduction)


def logit_adjusted_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | Sequence[int],
    tau: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Compute the cross-entropy of logits shifted by the log prior of their classes.

    .. math:: L = -\log \frac{\exp(u_y + \tau \log \pi_y)}{\sum_k \exp(u_k + \tau \log \pi_k)}

    with :math:`\pi` the class frequencies of the training rows (Menon et al.). With :math:`\tau = 1` this is the
    balanced softmax of Ren et al. (2020).

    Args:
        logits: Tensor (batch, num_classes).
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        class_counts: Training rows of each class (num_classes,), all positive.
        tau: Strength of the adjustment, at least 0.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.

    Returns:
        Scalar tensor, float32 (float64 for float64 logits).

    Raises:
        ValueError: A class count is not positive, or their number differs from that of the classes.

    References:
        Menon et al. (2021). Long-tail learning via logit adjustment. https://arxiv.org/abs/2007.07314
        Ren et al. (2020). Balanced Meta-Softmax. https://arxiv.org/abs/2007.10740

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> round(logit_adjusted_loss(logits, torch.tensor([1]), class_counts=[9, 1]).item(), 4)
        2.3026
    """
    counts = torch.as_tensor(class_counts, device=logits.device)
    if counts.shape != logits.shape[-1:]:
        raise ValueError(
            f"`class_counts` has shape {tuple(counts.shape)}, but the logits have {logits.shape[-1]} classes: "
            "one count for each class is needed."
        )
    prior = counts.to(torch.float64) / counts.sum()
    precise = logits if logits.dtype == torch.float64 else logits.float()
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(precise + (tau * prior.log()).to(precise.dtype), labels, label_smoothing=label_smoothing)


def make_loss(settings: Mapping[str, Any], *, class_counts: Sequence[int] | None = None) -> Loss:
    """Build a loss of ``(logits, labels)`` from its settings, as they stand in a model's ``config.json``.

    Args:
        settings: ``{"name": ...}`` and the options of that loss. ``"dot_regression"`` takes ``form``, ``balance``,
            ``label_smoothing`` and ``unit_features`` (True: the logits are those of a unit feature with unit rows, as in
            the paper, so that its length is one). ``"cross_entropy"`` takes ``label_smoothing`` and ``scale`` (factor
            of the logits, 1 by default); ``"logit_adjusted"`` takes these and ``tau``.
        class_counts: Training rows of each class; needed by ``"logit_adjusted"``.

    Returns:
        Function of logits (batch, num_classes) and labels that returns a scalar tensor.

    Raises:
        ValueError: The name or an option is unknown, or the class counts are missing.

    Example:
        >>> loss = make_loss({"name": "dot_regression", "form": "sphere"})
        >>> loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1])).item()
        0.0
    """
    options = dict(settings)
    name = options.pop("name", None)
    _check_choice("name", name, LOSS_NAMES)
    if name == "dot_regression":
        return _make_dot_regression(options)
    return _make_cross_entropy(name, options, class_counts)


def _make_dot_regression(options: dict[str, Any]) -> Loss:
    _check_options("dot_regression", options, ("form", "balance", "label_smoothing", "unit_features"))
    unit_features = bool(options.pop("unit_features", False))
    _check_choice("form", options.get("form", "one_sided"), DOT_REGRESSION_FORMS)
    _check_choice("balance", options.get("balance", "none"), BALANCES)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        num_classes = logits.shape[-1]
        lengths = logits.new_tensor(math.sqrt(num_classes / (num_classes - 1))) if unit_features else None
        return dot_regression_loss(logits, labels, lengths=lengths, **options)

    return loss


def _make_cross_entropy(name: str, options: dict[str, Any], class_counts: Sequence[int] | None) -> Loss:
    allowed = ("label_smoothing", "scale") + (("tau",) if name == "logit_adjusted" else ())
    _check_options(name, options, allowed)
    scale = float(options.pop("scale", 1.0))
    if name == "cross_entropy":

        def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(scale * logits.float(), labels, **options)

        return cross_entropy
    counts = _checked_counts(class_counts)

    def logit_adjusted(logits: Tensor, labels: Tensor) -> Tensor:
        return logit_adjusted_loss(scale * logits.float(), labels, class_counts=counts, **options)

    return logit_adjusted


def _checked_counts(class_counts: Sequence[int] | None) -> Tensor:
    if class_counts is None:
        raise ValueError("`class_counts` (=None) is needed by the logit-adjusted loss: pass the training rows a class.")
    counts = torch.as_tensor(class_counts)
    if (counts <= 0).any():
        empty = int((counts <= 0).nonzero()[0])
        raise ValueError(
            f"`class_counts[{empty}]` (={counts[empty].item()}) must be positive: the log prior of a class without rows is "
            "infinite; drop the class or give it a row."
        )
    return counts


def _soft_labels(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor | None:
    """Return labels as probabilities where they are needed as such: (batch, num_classes), or None for plain indices."""
    batch, num_classes = logits.shape
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` (={label_smoothing}) must lie in [0, 1).")
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)}; probabilities need that of the logits, {tuple(logits.shape)}."
            )
        soft = labels.to(torch.promote_types(logits.dtype, torch.float32))
    else:
        if labels.shape != (batch,):
            raise ValueError(f"`labels` has shape {tuple(labels.shape)}; class indices need shape ({batch},).")
        readable = labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling()
        if readable and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"`labels` reach from {int(labels.min())} to {int(labels.max())}, but the logits have {num_classes} classes: "
                f"indices must lie in [0, {num_classes - 1}]."
            )
        if label_smoothing == 0.0:
            return None
        soft = F.one_hot(labels, num_classes).to(torch.promote_types(logits.dtype, torch.float32))
    return (1.0 - label_smoothing) * soft + label_smoothing / num_classes if label_smoothing else soft


def _term_weights(
    labels: Tensor, soft: Tensor | None, class_weights: Tensor | None, balance: str, logits: Tensor
) -> Tensor | None:
    """Return the factor of each row's (or each row's and class's) term, or None where all are one."""
    if class_weights is None and balance == "none":
        return None
    num_classes = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.ones(num_classes, dtype=dtype, device=logits.device)
    if class_weights is not None:
        weights = weights * class_weights.to(weights)
    if balance == "in_batch":
        rows = torch.bincount(labels, minlength=num_classes).to(dtype) if soft is None else soft.sum(dim=0)
        present = (rows > 0).sum()
        weights = weights * torch.where(rows > 0, labels.shape[0] / (present * rows.clamp_min(1e-12)), 0.0)
    return weights[labels].unsqueeze(1) if soft is None else weights.unsqueeze(0)


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def _check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{argument}` (={value!r}) must be one of {', '.join(map(repr, choices))}.")


def _check_options(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"Loss {name!r} has no option {unknown[0]!r}; its options are {', '.join(allowed)}.")
