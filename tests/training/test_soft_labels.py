"""Laws of soft labels: they are distributions over the classes that were mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etf_adapt.training.soft_labels import SoftLabels


@pytest.mark.parametrize(("mixup", "cutmix", "smoothing"), [(0.4, 0, 0), (0, 1.0, 0), (0.4, 1.0, 0.2), (0, 0, 0.2)])
def test_soft_labels_are_distributions_over_the_two_classes_mixed(mixup, cutmix, smoothing):
    images, labels = torch.randn(8, 3, 24, 24), torch.arange(8) % 5
    soften = SoftLabels(5, mixup=mixup, cutmix=cutmix, smoothing=smoothing)
    assert soften.is_active
    np.random.seed(0)
    mixed, soft = soften(images.clone(), labels)
    assert torch.allclose(soft.sum(1), torch.ones(8)) and bool((soft >= 0).all())
    one_hot = torch.eye(5)[labels]
    pairs = one_hot + one_hot.flip(0)
    assert torch.allclose(soft[pairs == 0], torch.full_like(soft[pairs == 0], smoothing / 5))
    if mixup or cutmix:
        assert mixed.shape == images.shape and not torch.equal(mixed, images)
    else:
        assert torch.equal(mixed, images)
    if mixup and not cutmix:
        weight = (soft[0, labels[0]] - smoothing / 5) / (1 - smoothing)
        assert torch.allclose(mixed[0], weight * images[0] + (1 - weight) * images[7], atol=1e-5)


def test_only_images_are_mixed():
    assert not SoftLabels(3).is_active
    with pytest.raises(ValueError, match="mix images, and this model reads"):
        SoftLabels(3, mixup=0.2)(torch.zeros(2, 7, dtype=torch.long), torch.tensor([0, 1]))
