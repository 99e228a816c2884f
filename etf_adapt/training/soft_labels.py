"""Labels made soft by mixup, CutMix and smoothing."""

from __future__ import annotations

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor


class SoftLabels:
    """Mix pairs of images by mixup and CutMix (timm's ``Mixup``), and the uniform distribution into labels by smoothing.

    Pairs are the first with the last row of a process's batch, and so on, with one weight per batch; with both alphas positive,
    each batch is mixed by one of the two.

    Example:
        >>> import torch
        >>> soften = SoftLabels(4, smoothing=0.4)
        >>> _, labels = soften(torch.zeros(1, 3, 2, 2), torch.tensor([2]))
        >>> [round(label, 2) for label in labels[0].tolist()]
        [0.1, 0.1, 0.7, 0.1]
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.mixes = bool(mixup or cutmix)
        self.is_active = self.mixes or bool(smoothing)
        self._mix = None
        if self.mixes:
            self._mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (batch, ...) and soft labels (batch, num_classes) for labels (batch,)."""
        if self._mix is None:
            return inputs, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise ValueError(
                f"`mixup` and `cutmix` mix images, and this model reads {tuple(inputs.shape)} of {inputs.dtype}: set both "
                "to 0."
            )
        mixed, soft = self._mix(inputs, labels)
        return mixed, soft
