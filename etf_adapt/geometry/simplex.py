"""The simplex equiangular tight frame: its vertices, and the cosines of logits with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw the vertices of a simplex equiangular tight frame, in a random rotation.

    With :math:`K` classes and :math:`\text{dim} \ge K - 1` the rows :math:`m_k` have the Gram matrix

    .. math:: m_i^\top m_j = \frac{K}{K-1}\,\delta_{ij} - \frac{1}{K-1}

    (Yang et al., definition of the simplex ETF; their form needs :math:`\text{dim} \ge K`, while the vertices span
    :math:`K - 1` dimensions). The rotation is uniform (Haar). Below ``dim = K - 1`` no simplex fits: the rows are then the
    vertices projected onto a random subspace, which still sum to zero and still form a tight frame.

    The frame is computed in float64 on the CPU. Keep the result rather than the seed: orthogonalisation may differ in
    the last bits with the number of threads.

    Args:
        num_classes: Number of classes K, at least 2.
        dim: Dimension of the space, at least 1.
        generator: Source of the rotation; the global CPU generator where None.
        dtype: Floating type of the result.

    Returns:
        Tensor (num_classes, dim): one vertex a row.

    Raises:
        ValueError: ``num_classes`` is below 2 or ``dim`` below 1.

    References:
        Yang, Chen, Li, Xie, Lin, Tao (2022). Inducing Neural Collapse in Imbalanced Learning.
        https://arxiv.org/abs/2203.09081

    Example:
        >>> vertices = simplex_etf(3, 8, generator=torch.Generator().manual_seed(0))
        >>> torch.round(vertices @ vertices.T, decimals=4).tolist()
        [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    if num_classes < 2:
        raise ValueError(
            f"`num_classes` (={num_classes}) must be at least 2: a classifier needs two classes; check the label column."
        )
    if dim < 1:
        raise ValueError(f"`dim` (={dim}) must be at least 1: the vertices need a space to stand in.")
    span = num_classes - 1
    gaussian = torch.randn(max(span, dim), min(span, dim), generator=generator, dtype=torch.float64, device="cpu")
    orthonormal, triangular = torch.linalg.qr(gaussian)
    orthonormal = orthonormal * torch.sign(torch.diagonal(triangular))  # the sign that makes the draw uniform
    coordinates = orthonormal if span >= dim else orthonormal.T  # (span, dim)
    return (math.sqrt(num_classes / span) * _embed(coordinates)).to(dtype)


def rotated_simplex_etf(targets: Tensor) -> Tensor:
    r"""Rotate the simplex onto given directions: the orthogonal Procrustes solution.

    Of all simplex frames of the space it is the one with the greatest sum of inner products
    :math:`\sum_k m_k^\top t_k` with the targets.

    Args:
        targets: Tensor (num_classes, dim), such as centred class means.

    Returns:
        Tensor (num_classes, dim), float64 on the CPU: the vertices; projected ones where ``dim < num_classes - 1``.

    References:
        Schönemann (1966). A generalized solution of the orthogonal Procrustes problem.

    Example:
        >>> vertices = simplex_etf(4, 6, dtype=torch.float64)
        >>> torch.allclose(rotated_simplex_etf(2.5 * vertices), vertices)
        True
    """
    num_classes = targets.shape[0]
    left, _, right = torch.linalg.svd(_project(targets.to("cpu", torch.float64)), full_matrices=False)
    return math.sqrt(num_classes / (num_classes - 1)) * _embed(left @ right)


def simplex_cosines(logits: Tensor) -> Tensor:
    r"""Compute the cosine between centred logits and each vertex of the simplex.

    .. math:: \cos_k = \frac{m_k^\top P u}{|P u|} = \sqrt{\frac{K}{K-1}}\,\frac{u_k - \bar u}{|u - \bar u|}

    where :math:`P = I - \mathbf{1}\mathbf{1}^\top / K` and :math:`m_k = \sqrt{K/(K-1)}\,P e_k`. The order of the
    cosines of a row is the order of its logits. With K = 2 each cosine is +1 or -1.

    Args:
        logits: Tensor (batch, num_classes), any floating type.

    Returns:
        Tensor (batch, num_classes) in [-1, 1], float32 (float64 for float64 logits); zero for a row of equal logits.

    Example:
        >>> simplex_cosines(torch.tensor([[3.0, 0.0, 0.0]])).round(decimals=4).tolist()
        [[1.0, -0.5, -0.5]]
    """
    dots, lengths = vertex_products(logits)
    return dots / lengths.clamp_min(torch.finfo(dots.dtype).tiny).unsqueeze(-1)


def vertex_products(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the inner products of the centred logits with the vertices, and the length of the centred logits.

    Args:
        logits: Tensor (batch, num_classes), any floating type; computed in float32 at least, outside autocast.

    Returns:
        Inner products (batch, num_classes) and lengths (batch,), float32 (float64 for float64 logits).

    Example:
        >>> products, lengths = vertex_products(torch.tensor([[2.0, 0.0]]))
        >>> products, lengths
        (tensor([[ 1.4142, -1.4142]]), tensor([1.4142]))
    """
    num_classes = logits.shape[-1]
    with torch.autocast(logits.device.type, enabled=False):
        precise = logits if logits.dtype == torch.float64 else logits.float()
        centred = precise - precise.mean(dim=-1, keepdim=True)
        return math.sqrt(num_classes / (num_classes - 1)) * centred, torch.linalg.vector_norm(centred, dim=-1)


def _embed(coordinates: Tensor) -> Tensor:
    """Map coordinates in the K - 1 dimensions orthogonal to the ones vector to K rows, isometrically.

    The basis is the Householder reflection that takes the first axis to the ones direction, without its first column;
    it is applied without being formed.
    """
    num_classes = coordinates.shape[0] + 1
    total = coordinates.sum(dim=0, keepdim=True)
    root = math.sqrt(num_classes)
    return torch.cat([total / root, coordinates - total / (num_classes - root)])


def _project(rows: Tensor) -> Tensor:
    """Apply the transpose of ``_embed``: the coordinates of K rows, less their mean, in K - 1 dimensions."""
    num_classes = rows.shape[0]
    root = math.sqrt(num_classes)
    return rows[1:] + rows[:1] / root - rows[1:].sum(dim=0, keepdim=True) / (num_classes - root)


def reachable_cosine(num_classes: int, dim: int) -> float:
    r"""Return the cosine with the simplex's vertices that logits of so many features can reach.

    .. math:: \sqrt{\min(1, \text{dim} / (K - 1))}

    Centred logits of a linear layer lie in a subspace of at most ``dim`` of their :math:`K - 1` dimensions. The best cosine
    with a vertex is the length of its projection onto that subspace, whose mean square over the vertices, a tight frame,
    is :math:`\text{dim} / (K - 1)`.

    Args:
        num_classes: Number of classes K, at least 2.
        dim: Width of the features, at least 1.

    Returns:
        The root mean square over the vertices, above 0 and at most 1.

    Example:
        >>> reachable_cosine(1001, 250), reachable_cosine(10, 64)
        (0.5, 1.0)
    """
    return math.sqrt(min(1.0, dim / (num_classes - 1)))
