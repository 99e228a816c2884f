"""Classification heads: ordinary linear layers whose rows are set, not learned, and the two that fold into one."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etf_adapt.geometry.simplex import simplex_etf

HEAD_KINDS = ("etf", "linear", "cosine", "paper")


class ClassifierHead(nn.Module):
    """Common part of all heads made here: what the head is, whether it trains, and how its rows are read and set.

    Attributes:
        kind: One of ``HEAD_KINDS``.
        frame: Where the rows come from: one of ``etf_adapt.geometry.frames.FRAMES``, or ``"initialised"`` for rows that
            are there to be learned.
        trainable: Whether weight and bias receive gradients.
        is_stock_layer: Whether it is the layer that stock classes have, as it stands; others are folded into one.
        is_set_from_data: Whether it is of a kind that an alignment sets before the first step.
    """

    kind = "linear"
    is_stock_layer = True
    is_set_from_data = False
    weight: Any  # parameters of nn.Linear and nn.Conv2d, whose declarations differ; a missing bias is None
    bias: Any

    @property
    def is_fixed(self) -> bool:
        """Whether no gradient changes it."""
        return not self.trainable

    def _describe(self, *, frame: str, trainable: bool) -> None:
        self.frame = frame
        self.trainable = trainable
        self.fix()

    def fix(self) -> None:
        """Give weight and bias back the gradient switch that ``trainable`` says.

        ``model.requires_grad_(True)``, a usual way to unfreeze a backbone, frees a fixed head too.
        """
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(self.trainable)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[0]

    def class_vectors(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows (num_classes, in_features) and biases (num_classes,) in float64 on the CPU."""
        weight = self.weight.detach().to("cpu", torch.float64).flatten(1)
        return weight, None if self.bias is None else self.bias.detach().to("cpu", torch.float64)

    @torch.no_grad()
    def set_class_vectors(self, weight: Tensor, bias: Tensor | None = None, *, frame: str | None = None) -> None:
        """Write rows and biases, rounded once to the layer's own dtype.

        Args:
            weight: Tensor (num_classes, in_features), any floating type and device.
            bias: Tensor (num_classes,); zero where None.
            frame: What the rows are, kept in ``frame``.

        Raises:
            ValueError: A bias that is not zero was given for a layer without one.
        """
        self.weight.copy_(weight.reshape(self.weight.shape))
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)
        elif bias is not None and bool((bias != 0).any()):
            raise ValueError("`bias` was given, but this layer has none: align it without an intercept.")
        if frame is not None:
            self.frame = frame

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return rows and biases of the stock layer with this head's argmax, in float64 on the CPU."""
        return self.class_vectors()


class LinearHead(ClassifierHead, nn.Linear):
    """Trainable linear layer with torch's own initialisation.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes.
        bias: Whether the layer has a bias.
        trainable: Whether weight and bias receive gradients.
    """

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True, trainable: bool = True) -> None:
        nn.Linear.__init__(self, in_features, num_classes, bias=bias)
        self._describe(frame="initialised", trainable=trainable)


class Conv2dHead(ClassifierHead, nn.Conv2d):
    """Trainable 1x1 convolution, the form of the classifier in some mobile networks."""

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True, trainable: bool = True) -> None:
        nn.Conv2d.__init__(self, in_features, num_classes, 1, bias=bias)
        self._describe(frame="initialised", trainable=trainable)


class ETFHead(LinearHead):
    """Linear layer whose rows are the vertices of a simplex equiangular tight frame, fixed.

    The state dict is that of ``nn.Linear``: ``weight`` (num_classes, in_features) and ``bias`` (num_classes,). A new
    head holds a random frame (``simplex_etf``) and a zero bias; ``etf_adapt.align_head`` sets it in closed form.

    Args:
        in_features: Width of the features, at least 1.
        num_classes: Number of classes, at least 2.
        bias: Whether the layer has a bias.
        trainable: Whether the rows learn on from their start. That is a learnable classifier, no longer a fixed one.
        generator: Source of the random frame; the global CPU generator where None.

    References:
        Yang et al. (2022). https://arxiv.org/abs/2203.09081

    Example:
        >>> head = ETFHead(8, 3)
        >>> [name for name, parameter in head.named_parameters() if parameter.requires_grad]
        []
    """

    kind = "etf"
    is_set_from_data = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        trainable: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        vertices = simplex_etf(num_classes, in_features, generator=generator)
        super().__init__(in_features, num_classes, bias=bias, trainable=trainable)
        self.set_class_vectors(vertices, frame="random")


class ETFConv2dHead(Conv2dHead):
    """``ETFHead`` as a 1x1 convolution."""

    kind = "etf"
    is_set_from_data = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        trainable: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        vertices = simplex_etf(num_classes, in_features, generator=generator)
        super().__init__(in_features, num_classes, bias=bias, trainable=trainable)
        self.set_class_vectors(vertices, frame="random")


class CosineHead(LinearHead):
    r"""Linear layer on the cosine between feature and row: the head of LIFT (Shi et al., 2024).

    .. math:: u_k = s\,\frac{w_k^\top h}{|w_k|\,|h|}

    ``folded`` keeps the argmax: rows of length s, no bias.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes.
        scale: The factor s; 25 in LIFT.
        trainable: Whether the rows learn.

    References:
        Shi et al. (2024). Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts.
        https://arxiv.org/abs/2309.10019

    Example:
        >>> CosineHead(8, 3)(torch.randn(2, 8)).abs().max().item() <= 25.001
        True
    """

    kind = "cosine"
    is_stock_layer = False
    is_set_from_data = True

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 25.0, trainable: bool = True) -> None:
        super().__init__(in_features, num_classes, bias=False, trainable=trainable)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Score features (..., in_features) by cosine: (..., num_classes)."""
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.linear(F.normalize(features.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))
        return (self.scale * cosines).to(features.dtype)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return rows of length ``scale`` and no bias, in float64 on the CPU."""
        weight, _ = self.class_vectors()
        return self.scale * F.normalize(weight, dim=1), None


class PaperHead(ETFHead):
    r"""The head of Yang et al.'s published code: BatchNorm, a feature of unit length, a random fixed frame.

    .. math:: u_k = m_k^\top \frac{\mathrm{BN}(h)}{|\mathrm{BN}(h)|}

    so that the logits *are* the cosines with the frame's rows. ``folded`` keeps the argmax of evaluation mode: the
    BatchNorm's affine map goes into weight and bias.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes, at least 2.
        generator: Source of the random frame.

    References:
        Yang et al. (2022), code: https://github.com/NeuralCollapseApplications/ImbalancedLearning

    Example:
        >>> PaperHead(8, 3)(torch.randn(4, 8)).shape
        torch.Size([4, 3])
    """

    kind = "paper"
    is_stock_layer = False
    is_set_from_data = False

    def __init__(self, in_features: int, num_classes: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(in_features, num_classes, bias=False, generator=generator)
        self.batch_norm = nn.BatchNorm1d(in_features)

    def forward(self, features: Tensor) -> Tensor:
        """Score features (batch, in_features): the cosines (batch, num_classes)."""
        with torch.autocast(features.device.type, enabled=False):
            normalised = F.normalize(self.batch_norm(features.to(self.weight.dtype)), dim=-1)
            return F.linear(normalised, self.weight).to(features.dtype)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows and biases of BatchNorm and frame as one layer, in float64 on the CPU."""
        weight, _ = self.class_vectors()
        norm = self.batch_norm
        buffers = (cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var), norm.weight, norm.bias)
        mean, variance, gain, shift = (part.detach().to("cpu", torch.float64) for part in buffers)
        gain = gain / torch.sqrt(variance + norm.eps)
        return weight * gain, weight @ (shift - gain * mean)


def make_head(
    leaf: nn.Module,
    num_classes: int,
    *,
    kind: str = "etf",
    trainable: bool | None = None,
    generator: torch.Generator | None = None,
) -> ClassifierHead:
    """Make the head that can stand in the place of a model's last layer, on its device and in its dtype.

    Args:
        leaf: The model's own ``nn.Linear`` or 1x1 ``nn.Conv2d``.
        num_classes: Number of classes of the new head, at least 2.
        kind: ``"etf"``, ``"linear"``, ``"cosine"`` or ``"paper"``.
        trainable: Whether weight and bias learn; by default only ``"linear"`` and ``"cosine"`` do.
        generator: Source of a random frame.

    Returns:
        The new head.

    Raises:
        TypeError: The leaf is neither a linear layer nor a 1x1 convolution.
        ValueError: The kind is unknown or cannot stand in this leaf's place.

    Example:
        >>> make_head(nn.Linear(16, 1000), 5).weight.shape
        torch.Size([5, 16])
    """
    if kind not in HEAD_KINDS:
        raise ValueError(f"`kind` (={kind!r}) must be one of {', '.join(map(repr, HEAD_KINDS))}.")
    if not isinstance(leaf, nn.Linear | nn.Conv2d):
        raise TypeError(
            f"The classifier is a {type(leaf).__name__}; only nn.Linear and 1x1 nn.Conv2d layers can be replaced: "
            "name the layer that makes the logits."
        )
    if isinstance(leaf, nn.Conv2d) and (set(leaf.kernel_size) != {1} or leaf.groups != 1 or set(leaf.stride) != {1}):
        raise TypeError(
            f"The classifier is a convolution of kernel {leaf.kernel_size}, stride {leaf.stride} and {leaf.groups} "
            "group(s); only 1x1 convolutions can be replaced."
        )
    convolution = isinstance(leaf, nn.Conv2d)
    in_features = leaf.in_channels if isinstance(leaf, nn.Conv2d) else leaf.in_features
    bias = leaf.bias is not None
    if kind in ("cosine", "paper") and convolution:
        raise ValueError(f"A {kind!r} head needs a linear layer, and this model's classifier is a 1x1 convolution.")
    if kind == "paper" and not bias:
        raise ValueError("A 'paper' head folds its BatchNorm into a bias, and this model's classifier has none.")
    if kind == "paper" and trainable:
        raise ValueError("`trainable` (=True) contradicts a 'paper' head: the published method fixes its frame.")
    learn = kind in ("linear", "cosine") if trainable is None else trainable
    head: ClassifierHead
    with torch.device("cpu"):  # whatever the caller's default device is: the seed alone decides the rows
        if kind == "cosine":
            head = CosineHead(in_features, num_classes, trainable=learn)
        elif kind == "paper":
            head = PaperHead(in_features, num_classes, generator=generator)
        elif kind == "linear":
            head = (Conv2dHead if convolution else LinearHead)(in_features, num_classes, bias=bias, trainable=learn)
        else:
            make = ETFConv2dHead if convolution else ETFHead
            head = make(in_features, num_classes, bias=bias, trainable=learn, generator=generator)
    head.to(device=leaf.weight.device, dtype=leaf.weight.dtype)
    head.train(leaf.training)
    head.fix()
    return head


def fold_head(head: ClassifierHead, *, bias: bool) -> ClassifierHead:
    """Fold a cosine or paper head into the stock linear layer with the same argmax.

    Args:
        head: Any head made here.
        bias: Whether the stock layer has a bias.

    Returns:
        A fixed or trainable ``LinearHead`` of the head's ``trainable``, on its device and in its dtype; the head itself
        where it is an ordinary layer already.

    Example:
        >>> fold_head(PaperHead(8, 3), bias=True).weight.shape
        torch.Size([3, 8])
    """
    if head.is_stock_layer:
        return head
    weight, offset = head.folded()
    layer = LinearHead(weight.shape[1], weight.shape[0], bias=bias, trainable=head.trainable)
    layer.set_class_vectors(weight, offset, frame=head.frame)
    layer.to(device=head.weight.device, dtype=head.weight.dtype)
    layer.fix()
    return layer


def is_head(module: nn.Module) -> bool:
    """Return whether a module is a head made here."""
    return isinstance(module, ClassifierHead)
