"""Dot regression on stock logits: towards the vertices of the simplex, and along its edges to a margin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etf_adapt.errors import check_choice
from etf_adapt.geometry.simplex import vertex_products
from etf_adapt.losses.terms import combine_terms, log_prior, of_labels, soft_labels, soft_margins

DOT_REGRESSION_FORMS = ("one_sided", "ball", "sphere")
MARGIN_FORMS = ("open", "ball", "sphere")


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
    r"""Regress the cosine between the centred logits and the label's simplex vertex to one, or to what can be reached.

    With :math:`p_k = m_k^\top P u` the inner product of the centred logits with vertex k and :math:`r` their length,

    .. math:: L = \sum_k y_k\,\tfrac12\,(\tau - c_k)^2, \qquad
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
        target: The cosine :math:`\tau` in (0, 1] that is regressed to: one, or
            ``etf_adapt.geometry.simplex.reachable_cosine`` where there are more classes than features, whose vertices can
            then not all be reached.
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
    check_choice("form", form, DOT_REGRESSION_FORMS)
    if not 0.0 < target <= 1.0:
        raise ValueError(f"`target` (={target}) must lie in (0, 1]: it is a cosine.")
    soft = soft_labels(logits, labels, label_smoothing)
    all_products, own_lengths = vertex_products(logits)
    products = of_labels(all_products, labels, soft)
    length = own_lengths if lengths is None else torch.as_tensor(lengths, device=products.device).to(products.dtype)
    length = length.expand(products.shape[0]).unsqueeze(1)
    if form == "sphere":
        cosines = products / length.clamp_min(torch.finfo(products.dtype).tiny)
    else:
        cosines = products / length.clamp_min(1.0)
        if form == "one_sided":
            cosines = torch.where(products > 0, cosines, products)
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
    form: str = "open",
    huber: float | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Regress the inner product with the edges of the simplex, from the label's vertex to the others, to a margin.

    With :math:`p_k = m_k^\top P u` the inner product of the centred logits with vertex k, :math:`r` their length, and
    :math:`\pi` the class frequencies of the training rows,

    .. math:: L = \tfrac12 \max(0,\, \delta - z_y)^2, \qquad z_y = a_y - \tau \log \sum_{k \ne y} e^{a_k / \tau}, \qquad
        a_k = c_k + t \log \pi_k

    where :math:`c_k` is :math:`p_k` (*open*), :math:`p_k / \max(1, r)` (*ball*) or the cosine :math:`p_k / r` (*sphere*).
    For :math:`\tau \to 0` the margin is that over the nearest rival, :math:`(m_y - m_k)^\top P u`, which is dot
    regression on the edges of the simplex where ``dot_regression_loss`` regresses on its vertices:

    - It is zero, with a zero gradient, once the prior-adjusted margin is reached. The vertex itself has
      :math:`z_y = K / (K - 1)` for even priors and :math:`\tau = 0`: a greater margin than that cannot be had on the ball.
    - Below the margin it pulls and pushes: the gradient with respect to the logits is
      :math:`-(\delta - z_y)\sqrt{K/(K-1)}\,(e_y - \sum_{k \ne y} q_k e_k)` for the open form, with q the softmax of
      :math:`a / \tau` over the rivals. Plain dot regression only pulls.
    - It is live for every K >= 2: with K = 2 the open form is a squared hinge on the difference of the two logits.
    - Logit adjustment is the same margin under another function: the cross-entropy of :math:`a / \tau` is
      :math:`\log(1 + e^{-z_y / \tau})`. For a row far on the wrong side both pull in the same direction, this loss in
      proportion to the shortfall; that one goes on for ever where this one stops.

    ``huber`` bounds the pull of a row far from its margin: the square goes over into a straight line at that shortfall.

    Args:
        logits: Tensor (batch, num_classes), any floating type.
        labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.
        class_counts: Training rows of each class (num_classes,), all positive; even priors where None.
        margin: The margin :math:`\delta`, in edge products (unit vertices).
        temperature: The temperature :math:`\tau` of the maximum over the rivals, at least 0; 0 takes the nearest.
        prior_strength: The factor t of the log prior, at least 0. With :math:`t = \tau` the adjustment is that of
            logit adjustment with :math:`\tau_{LA} = 1`.
        form: ``"open"``, ``"ball"`` or ``"sphere"``. With K = 2 the last has no gradient, and the ball none outside it.
        huber: Shortfall from which the loss is linear; never where None.
        class_weights: Tensor (num_classes,): factor of each class's term. The mean is over rows.
        label_smoothing: Share in [0, 1) of each label that is spread evenly over all classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Scalar tensor, or (batch,) with ``reduction="none"``; float32 (float64 for float64 logits), at least 0.

    Raises:
        ValueError: An option is outside its range, or labels, counts and logits do not fit.

    References:
        Yang et al. (2022), for dot regression. https://arxiv.org/abs/2203.09081
        Menon et al. (2021), for the prior in the margin. https://arxiv.org/abs/2007.07314
        Crammer, Singer (2001). On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> margin_dot_regression_loss(logits, torch.tensor([0, 2]), margin=1.0, temperature=0.0, reduction="none").tolist()
        [0.0, 0.5]
    """
    check_choice("form", form, MARGIN_FORMS)
    for name, value in (("prior_strength", prior_strength), ("huber", huber)):
        if value is not None and not value >= 0.0:
            raise ValueError(f"`{name}` (={value}) must be at least 0.")
    soft = soft_labels(logits, labels, label_smoothing)
    scores, lengths = vertex_products(logits)
    if form == "ball":
        scores = scores / lengths.clamp_min(1.0).unsqueeze(1)
    elif form == "sphere":
        scores = scores / lengths.clamp_min(torch.finfo(scores.dtype).tiny).unsqueeze(1)
    if class_counts is not None:
        scores = scores + prior_strength * log_prior(class_counts, scores)
    shortfall = F.relu(margin - soft_margins(scores, labels if soft is None else None, temperature=temperature))
    terms = 0.5 * shortfall**2
    if huber is not None:
        terms = torch.where(shortfall <= huber, terms, huber * (shortfall - 0.5 * huber))
    return combine_terms(terms, labels, soft, class_weights=class_weights, reduction=reduction)
