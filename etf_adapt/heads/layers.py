"""Classification heads: ordinary linear layers whose class vectors are set, not learned, and two that fold into one."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etf_adapt.errors import check_choice
from etf_adapt.geometry.closed_form import MEAN_FRAMES
from etf_adapt.geometry.simplex import simplex_etf

HEAD_KINDS = ("etf", "linear", "cosine", "paper")


class ClassifierHead(nn.Module):
    """What all heads share: what the head is, whether it trains, and how its class vectors are read and set."""

    kind = "linear"  # one of HEAD_KINDS
    is_stock_layer = True  # the layer of stock classes as it stands; others are folded into one
    is_set_from_data = False  # of a kind that an alignment sets before the first step
    folded_from: str | None = None  # the kind of head that this stock layer was folded from
    weight: Any  # parameters of nn.Linear and nn.Conv2d, whose declarations differ; a missing bias is None
    bias: Any

    @property
    def is_aligned(self) -> bool:
        """Whether an alignment set it; not known of class vectors that were "loaded" or "changed"."""
        return self.is_set_from_data and self.frame in MEAN_FRAMES

    def _describe(self, *, frame: str, trainable: bool) -> None:
        # Origin of the class vectors: one of geometry.closed_form's, "initialised", "loaded" or "changed".
        self.frame = frame
        self.trainable = trainable
        self.fix()

    def fix(self) -> None:
        """Set ``requires_grad`` of weight and bias to ``trainable`` again."""
        # model.requires_grad_(True), a usual way to unfreeze a backbone, frees a fixed head too.
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(self.trainable)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[0]

    def class_vectors(self) -> tuple[Tensor, Tensor | None]:
        """Return class vectors (num_classes, in_features) and biases (num_classes,) in float64 on the CPU."""
        weight = self.weight.detach().to("cpu", torch.float64).flatten(1)
        return weight, None if self.bias is None else self.bias.detach().to("cpu", torch.float64)

    @torch.no_grad()
    def set_class_vectors(self, weight: Tensor, bias: Tensor | None = None, *, frame: str | None = None) -> None:
        """Write class vectors (num_classes, in_features), biases (num_classes,; zero where None) and their origin.

        They may be of any dtype and device, and are rounded once to the layer's own.
        """
        self.weight.copy_(weight.reshape(self.weight.shape))
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)
        elif bias is not None and bool((bias != 0).any()):
            raise ValueError("`bias` was given, but this layer has none: align it without an intercept.")
        if frame is not None:
            self.frame = frame

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return class vectors and biases of the stock layer with this head's argmax, in float64 on the CPU."""
        return self.class_vectors()


class LinearHead(ClassifierHead, nn.Linear):
    """Linear layer with torch's own initialisation."""

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True, trainable: bool = True) -> None:
        nn.Linear.__init__(self, in_features, num_classes, bias=bias)
        self._describe(frame="initialised", trainable=trainable)


class Conv2dHead(ClassifierHead, nn.Conv2d):
    """1x1 convolution, the classifier of some mobile networks, with torch's own initialisation."""

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True, trainable: bool = True) -> None:
        nn.Conv2d.__init__(self, in_features, num_classes, 1, bias=bias)
        self._describe(frame="initialised", trainable=trainable)


class _RandomFrame(ClassifierHead):
    """Sets a layer to the vertices of a random simplex, and fixes it."""

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


class ETFHead(_RandomFrame, LinearHead):
    """Linear layer whose class vectors are the vertices of a simplex equiangular tight frame, fixed.

    The state dict is that of ``nn.Linear``: ``weight`` (num_classes, in_features) and ``bias`` (num_classes,). A new
    head holds a random frame (``simplex_etf``) and a zero bias; ``etf_adapt.align_head`` sets it in closed form.

    Args:
        in_features: Width of the features, at least 1.
        num_classes: Number of classes, at least 2.
        bias: Whether the layer has a bias.
        trainable: Whether the class vectors learn on from their start: a learnable classifier, no longer a fixed one.
        generator: Source of the random frame; the global CPU generator where None.

    References:
        Yang et al. (2022). https://arxiv.org/abs/2203.09081

    Example:
        >>> head = ETFHead(8, 3)
        >>> [name for name, parameter in head.named_parameters() if parameter.requires_grad]
        []
    """


class ETFConv2dHead(_RandomFrame, Conv2dHead):
    """``ETFHead`` as a 1x1 convolution."""


class CosineHead(LinearHead):
    r"""Scaled cosine between feature and class vector, the head of LIFT: :math:`u_k = s\,\frac{w_k^\top h}{|w_k|\,|h|}`.

    Shi et al. (2024), Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts. https://arxiv.org/abs/2309.10019
    """

    kind = "cosine"
    is_stock_layer = False
    is_set_from_data = True
    scale = 25.0  # s, as in LIFT

    def __init__(self, in_features: int, num_classes: int, *, trainable: bool = True) -> None:
        super().__init__(in_features, num_classes, bias=False, trainable=trainable)

    def forward(self, features: Tensor) -> Tensor:
        """Score features (..., in_features): logits (..., num_classes)."""
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.linear(F.normalize(features.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))
        return (self.scale * cosines).to(features.dtype)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return class vectors of norm ``scale`` and no bias: the same argmax."""
        weight, _ = self.class_vectors()
        return self.scale * F.normalize(weight, dim=1), None


class PaperHead(ETFHead):
    r"""The head of Yang et al.'s published code: BatchNorm, a unit feature, a random fixed frame.

    The logits :math:`u_k = m_k^\top \mathrm{BN}(h) / |\mathrm{BN}(h)|` are the cosines with the vertices.
    https://github.com/NeuralCollapseApplications/ImbalancedLearning
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
        """Return BatchNorm's affine map and the frame as one layer: the argmax of evaluation mode."""
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
    """Make the head that replaces a model's last layer (``nn.Linear`` or 1x1 ``nn.Conv2d``), on its device, in its dtype.

    By default only ``"linear"`` and ``"cosine"`` heads are trainable. ``generator`` is the source of a random frame.
    """
    check_choice("kind", kind, HEAD_KINDS)
    is_convolution = isinstance(leaf, nn.Conv2d)
    if not isinstance(leaf, nn.Linear | nn.Conv2d) or (
        isinstance(leaf, nn.Conv2d) and {*leaf.kernel_size, *leaf.stride, leaf.groups} != {1}
    ):
        found = leaf if is_convolution else type(leaf).__name__
        raise TypeError(
            f"The classifier is a {found}; only nn.Linear and 1x1 nn.Conv2d layers can be replaced: name the layer that makes "
            "the logits."
        )
    in_features = leaf.in_channels if isinstance(leaf, nn.Conv2d) else leaf.in_features
    bias = leaf.bias is not None
    if kind in ("cosine", "paper") and is_convolution:
        raise ValueError(f"A {kind!r} head needs a linear layer, and this model's classifier is a 1x1 convolution.")
    if kind == "paper" and not bias:
        raise ValueError("A 'paper' head folds its BatchNorm into a bias, and this model's classifier has none.")
    if kind == "paper" and trainable:
        raise ValueError("`trainable` (=True) contradicts a 'paper' head: the published method fixes its frame.")
    learn = kind in ("linear", "cosine") if trainable is None else trainable
    head: ClassifierHead
    with torch.device("cpu"):  # whatever the caller's default device is: the seed alone decides the frame
        if kind == "cosine":
            head = CosineHead(in_features, num_classes, trainable=learn)
        elif kind == "paper":
            head = PaperHead(in_features, num_classes, generator=generator)
        elif kind == "linear":
            head = (Conv2dHead if is_convolution else LinearHead)(in_features, num_classes, bias=bias, trainable=learn)
        else:
            make = ETFConv2dHead if is_convolution else ETFHead
            head = make(in_features, num_classes, bias=bias, trainable=learn, generator=generator)
    head.to(device=leaf.weight.device, dtype=leaf.weight.dtype)
    head.train(leaf.training)
    head.fix()
    return head


def fold_head(head: ClassifierHead, *, bias: bool) -> ClassifierHead:
    """Fold a cosine or paper head into a ``LinearHead`` with the same argmax; return a stock layer as it is."""
    if head.is_stock_layer:
        return head
    weight, offset = head.folded()
    layer = LinearHead(weight.shape[1], weight.shape[0], bias=bias, trainable=head.trainable)
    layer.set_class_vectors(weight, offset, frame=head.frame)
    layer.to(device=head.weight.device, dtype=head.weight.dtype)
    layer.folded_from = head.kind
    layer.fix()
    return layer
