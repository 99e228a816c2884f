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
    r"""Draw the vertices of a simplex equiangular tight frame in a uniformly random (Haar) rotation.

    With :math:`K` classes and :math:`\text{dim} \ge K - 1` the vertices :math:`m_k` have the Gram matrix

    .. math:: m_i^\top m_j = \frac{K}{K-1}\,\delta_{ij} - \frac{1}{K-1}

    (Yang et al., definition of the simplex ETF; they ask for :math:`\text{dim} \ge K`, but the vertices span :math:`K - 1`
    dimensions). Where ``dim < K - 1`` no simplex fits: the result is the vertices projected onto a random subspace, which
    still sum to zero and still form a tight frame.

    Args:
        num_classes: Number of classes K, at least 2.
        dim: Dimension of the space, at least 1.
        generator: Source of the rotation; the global CPU generator where None.
        dtype: Floating type of the result; the frame is computed in float64 on the CPU.

    Returns:
        Tensor (num_classes, dim), one vertex a row. Keep it rather than the seed: the last bits of a QR decomposition depend
        on the number of threads.

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
    orthonormal = orthonormal * torch.sign(torch.diagonal(triangular))  # the sign that makes the rotation uniform
    coordinates = orthonormal if span >= dim else orthonormal.T  # (span, dim)
    return (math.sqrt(num_classes / span) * _embed(coordinates)).to(dtype)


def _embed(coordinates: Tensor) -> Tensor:
    """Map coordinates (K - 1, dim) isometrically to K vectors that sum to zero (K, dim).

    The basis is the Householder reflection that takes the first axis to the ones direction, without its first column;
    it is applied without being formed.
    """
    num_classes = coordinates.shape[0] + 1
    total = coordinates.sum(dim=0, keepdim=True)
    root = math.sqrt(num_classes)
    return torch.cat([total / root, coordinates - total / (num_classes - root)])


def simplex_cosines(logits: Tensor) -> Tensor:
    r"""Compute the cosine between centred logits and each vertex of the simplex.

    .. math:: \cos_k = \frac{m_k^\top P u}{|P u|} = \sqrt{\frac{K}{K-1}}\,\frac{u_k - \bar u}{|u - \bar u|}

    where :math:`P = I - \mathbf{1}\mathbf{1}^\top / K` and :math:`m_k = \sqrt{K/(K-1)}\,P e_k`. The cosines have the order
    of the logits. With K = 2 each is +1 or -1.

    Args:
        logits: Tensor (batch, num_classes), any floating type.

    Returns:
        Tensor (batch, num_classes) in [-1, 1], float32 (float64 for float64 logits); zero where all logits are equal.

    Example:
        >>> simplex_cosines(torch.tensor([[3.0, 0.0, 0.0]])).round(decimals=4).tolist()
        [[1.0, -0.5, -0.5]]
    """
    products, norms = vertex_products(logits)
    return products / norms.clamp_min(torch.finfo(products.dtype).tiny).unsqueeze(-1)


def vertex_products(logits: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute the inner products :math:`m_k^\top P u` (batch, num_classes) and the norms :math:`|P u|` (batch,).

    In float32 at least, whatever autocast is active.
    """
    num_classes = logits.shape[-1]
    with torch.autocast(logits.device.type, enabled=False):
        precise = logits if logits.dtype == torch.float64 else logits.float()
        centred = precise - precise.mean(dim=-1, keepdim=True)
        return math.sqrt(num_classes / (num_classes - 1)) * centred, torch.linalg.vector_norm(centred, dim=-1)


def reachable_cosine(num_classes: int, dim: int) -> float:
    r"""Return the cosine with a vertex that the logits of ``dim`` features can reach: :math:`\sqrt{\min(1, dim / (K - 1))}`.

    Centred logits of a linear layer lie in at most ``dim`` of their :math:`K - 1` dimensions. The best cosine with a vertex is
    the norm of its projection onto that subspace; this is the root of its mean square over the vertices, a tight frame.
    """
    return math.sqrt(min(1.0, dim / (num_classes - 1)))
