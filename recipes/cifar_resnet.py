"""A residual network for images of 32 x 32 pixels (He et al. 2016, section 4.2), 32 layers and double width, known to timm.

Importing this module registers it as ``cifar_resnet32_double``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

NAME = "cifar_resnet32_double"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

default_cfgs = {
    NAME: {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "mean": MEAN,
        "std": STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }
}


class Block(nn.Module):
    """Two convolutions and a shortcut, which takes every other pixel and pads channels where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, side, side) to (batch, outputs, side / stride, side / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of five blocks each, of 32, 64 and 128 channels; 1.9 million weights with 100 classes."""

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 128
        self.conv1 = nn.Conv2d(in_chans, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        widths = [32] * 6 + [64] * 5 + [128] * 5
        steps = pairwise(widths)
        self.blocks = nn.Sequential(*(Block(before, after, after // before) for before, after in steps))
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to (batch, 128, 8, 8)."""
        return self.blocks(F.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, and score unless the features are wanted."""
        features = x.mean(dim=(2, 3))
        return features if pre_logits else self.fc(features)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))


@register_model
def cifar_resnet32_double(pretrained: bool = False, **options: Any) -> CifarResNet:
    """Build the network; there are no pretrained weights."""
    return build_model_with_cfg(CifarResNet, NAME, pretrained, **options)
