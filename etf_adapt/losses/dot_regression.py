"""Dot regression on stock logits: towards the vertices of the simplex, and along its edges to a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.errors import check_choice
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.losses.terms import LabelMargins, combine_terms, log_prior, soft_labels, soft_margins

DOT_REGRESSION_FORMS = ("one_sided", "sphere")


def dot_regression_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    lengths: Tensor | None = None,
    form: str = "one_sided",
    target: float = 1.0,
    class_weights: Tensor | None = None,
    balance: str = "none",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Regress the cosine between the centred logits and the label's simplex vertex to a target.

    With :math:`p_k = m_k^\top P u` the inner product of the centred logits with vertex k and :math:`r` their norm,

    .. math:: L = \sum_k y_k\,\tfrac12\,(\tau - c_k)^2, \qquad
        c_k = \begin{cases} p_k / r & \text{sphere} \\
        p_k / \max(1, r) \text{ if } p_k > 0, \text{ else } p_k & \text{one-sided} \end{cases}

    *sphere* is the dot-regression loss of Yang et al. with unit norms (the half is theirs); with K = 2 it has no gradient.
    *one-sided* pulls every row that is not at its vertex, for every K >= 2.

    Args:
        logits: Tensor (batch, num_classes), any floating type.
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        lengths: Tensor (batch,) or scalar in place of r; ``sqrt(K / (K - 1)) * |h|`` normalises by the feature h as in the
            paper.
        form: ``"one_sided"`` or ``"sphere"``.
        target: The cosine :math:`\tau` in (0, 1]; below one where there are more classes than features
            (``etf_adapt.geometry.simplex.reachable_cosine``).
        class_weights: Tensor (num_classes,): factor of each class's term. The mean is over rows, not over weights: that of a
            batch is that of its equal parts.
        balance: ``"none"``, or ``"in_batch"`` as in the authors' published code: the mean over the classes in the batch of
            each one's mean loss. It depends on the batch size and the number of processes.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar tensor (0 at the vertex, 2 at its antipode), or (batch,) with ``reduction="none"``; float32 at least.

    Raises:
        ValueError: An option is not one of those above, or labels and logits do not fit.

    References:
        Yang et al. (2022). https://arxiv.org/abs/2203.09081

    Example:
        >>> logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
        >>> dot_regression_loss(logits, torch.tensor([0, 2])).item() < 1e-12
        True
    """
    check_choice("form", form, DOT_REGRESSION_FORMS)
    if not 0.0 < target <= 1.0:
        raise ValueError(f"`target` (={target}) must lie in (0, 1]: it is a cosine.")
    soft = soft_labels(logits, labels, label_smoothing)
    products, norms = vertex_products(logits)
    if soft is None:
        products = products.gather(1, labels.unsqueeze(1))  # (batch, 1): with the label's own vertex
    if lengths is not None:
        norms = torch.as_tensor(lengths, device=products.device).to(products.dtype).expand(len(products))
    norms = norms.unsqueeze(1)
    if form == "sphere":
        cosines = products / norms.clamp_min(torch.finfo(products.dtype).tiny)
    else:
        cosines = torch.where(products > 0, products / norms.clamp_min(1.0), products)
    terms = 0.5 * (target - cosines) ** 2
    return combine_terms(terms, labels, soft, class_weights=class_weights, balance=balance, reduction=reduction)


def margin_dot_regression_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | Sequence[int] | None = None,
    margin: float = 0.25,
    temperature: float = 1.0 / 16.0,
    prior_strength: float = 1.0 / 16.0,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Regress the inner product with the edges of the simplex, from the label's vertex to the others, to a margin.

    With :math:`p_k = m_k^\top P u` the inner product of the centred logits with vertex k, and :math:`\pi` the class
    frequencies of the training rows,

    .. math:: L = \tfrac12 \max(0,\, \delta - z_y)^2, \qquad z_y = a_y - \tau \log \sum_{k \ne y} e^{a_k / \tau}, \qquad
        a_k = p_k + t \log \pi_k

    For :math:`\tau \to 0` the margin is that over the nearest rival, :math:`(m_y - m_k)^\top P u`; with even priors the vertex
    itself has :math:`K / (K - 1)`. With K = 2 the loss is a squared hinge on the difference of the logits. Loss and gradient
    are zero once the margin is reached; until then the gradient pulls *and* pushes, where regression on the vertices only
    pulls: :math:`-(\delta - z_y)\sqrt{K/(K-1)}\,(e_y - \sum_{k \ne y} q_k e_k)`, q the softmax of :math:`a / \tau` over the
    rivals. Logit adjustment is another function of this margin, :math:`\log(1 + e^{-z_y / \tau})`, and never stops pulling.

    Args:
        logits: Tensor (batch, num_classes), any floating type.
        labels: As in ``dot_regression_loss``, like the last three arguments.
        class_counts: Training rows of each class (num_classes,), all positive; even priors where None.
        margin: The margin :math:`\delta`, in inner products with edges between unit vertices.
        temperature: The temperature :math:`\tau` of the maximum over the rivals, at least 0; 0 takes the nearest.
        prior_strength: The factor t of the log prior, at least 0; :math:`t = \tau` is full logit adjustment.
        class_weights: Tensor (num_classes,).
        label_smoothing: In [0, 1).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar tensor, at least 0, or (batch,) with ``reduction="none"``; float32 at least.

    Raises:
        ValueError: An option is outside its range, or labels, counts and logits do not fit.

    References:
        Menon et al. (2021), for the prior in the margin. https://arxiv.org/abs/2007.07314
        Crammer, Singer (2001). On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> margin_dot_regression_loss(logits, torch.tensor([0, 2]), margin=1.0, temperature=0.0, reduction="none").tolist()
        [0.0, 0.5]
    """
    if not prior_strength >= 0.0:
        raise ValueError(f"`prior_strength` (={prior_strength}) must be at least 0.")
    soft = soft_labels(logits, labels, label_smoothing)
    # The margins are those of the logits as they are: centring takes the same from all scores of a row.
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scale = math.sqrt(logits.shape[1] / (logits.shape[1] - 1))
    prior = precise.new_zeros(logits.shape[1]) if class_counts is None else log_prior(class_counts, precise)
    offsets = prior_strength * prior
    if soft is None and temperature > 0.0 and not torch.compiler.is_compiling():
        margins = LabelMargins.apply(precise, labels, scale, offsets, temperature)
    else:
        margins = soft_margins(scale * precise + offsets, temperature=temperature)
        if soft is None:
            margins = margins.gather(1, labels.unsqueeze(1))
    terms = 0.5 * F.relu(margin - margins) ** 2
    return combine_terms(terms, labels, soft, class_weights=class_weights, reduction=reduction)
