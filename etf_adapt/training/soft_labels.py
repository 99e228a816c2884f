"""Labels made soft by mixup, CutMix and smoothing."""

from __future__ import annotations

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor


class SoftLabels:
    """Mix pairs of images by mixup and CutMix (timm's ``Mixup``), and the uniform distribution into labels by smoothing.

    Pairs are the first with the last row of a process's batch, and so on, with one weight per batch; with both alphas positive,
    each batch is mixed by one of the two.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.mixes = bool(mixup or cutmix)
        self.is_active = self.mixes or bool(smoothing)
        self._mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes) if self.mixes else None

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (batch, ...) and soft labels (batch, num_classes) for labels (batch,)."""
        if self._mix is None:
            return inputs, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise ValueError(
                f"`mixup` and `cutmix` mix images, and this model reads {tuple(inputs.shape)} of {inputs.dtype}: set both "
                "to 0."
            )
        return self._mix(inputs, labels)
