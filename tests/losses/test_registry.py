"""Losses by name: what their settings make, and what they may not be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from etf_adapt.losses.dot_regression import dot_regression_loss
from etf_adapt.losses.registry import LOSS_NAMES, LOSSES, make_loss
from etf_adapt.losses.softmax import logit_adjusted_loss


def draw(num_classes, batch=32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_name_makes_a_loss_with_a_gradient(name):
    logits, labels = draw(3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(make_loss({"name": name}, class_counts=[9, 3, 1])(logits, labels), logits)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_settings_are_the_arguments_of_the_function():
    logits, labels = draw(3)
    adjusted = make_loss({"name": "logit_adjusted", "scale": 2.0, "tau": 0.5}, class_counts=[5, 3, 1])
    torch.testing.assert_close(
        adjusted(logits, labels), logit_adjusted_loss(2.0 * logits, labels, class_counts=[5, 3, 1], tau=0.5)
    )
    smoothed = make_loss({"name": "cross_entropy", "label_smoothing": 0.1})
    torch.testing.assert_close(smoothed(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))
    unit = make_loss({"name": "dot_regression", "form": "sphere", "unit_features": True})
    lengths = torch.tensor(math.sqrt(3 / 2))
    torch.testing.assert_close(
        unit(logits, labels), dot_regression_loss(logits, labels, form="sphere", lengths=lengths)
    )


def test_options_of_a_loss_are_known():
    options = {"form", "target", "balance", "unit_features", "class_weights", "label_smoothing"}
    assert set(LOSSES["dot_regression"].options) == options
    with pytest.raises(ValueError, match="did you mean 'cross_entropy'"):
        make_loss({"name": "crossentropy"})


@pytest.mark.parametrize("name", [name for name in LOSS_NAMES if "class_weights" in LOSSES[name].options])
def test_balanced_weights_are_those_of_scikit_learn_and_weigh_each_class_alike(name):
    counts = [20, 8, 4]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    by_class = [make_loss({"name": name}, class_counts=counts)(logits[k : k + 1], torch.tensor([k])) for k in range(3)]
    for weights in ("balanced", expected.tolist()):
        loss = make_loss({"name": name, "class_weights": weights}, class_counts=counts)
        torch.testing.assert_close(loss(logits[labels], labels), torch.stack(by_class).mean())
        torch.testing.assert_close(
            loss(logits[:1], labels[:1]), torch.tensor(expected[0], dtype=torch.float32) * by_class[0]
        )


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        ({"name": "focul"}, None, "did you mean 'focal'"),
        ({"name": "focal", "gamma": -1.0}, None, "`gamma`"),
        ({"name": "cross_entropy", "class_weights": "balanced"}, None, "`class_counts` .*class_weights='balanced'"),
        ({"name": "cross_entropy", "class_weights": "balanced"}, [3, 0, 1], r"class_counts\[1\]"),
        ({"name": "cross_entropy", "class_weights": "balance"}, [9, 3, 1], "did you mean 'balanced'"),
        ({"name": "cross_entropy", "class_weights": [1.0, 2.0]}, [9, 3, 1], "`class_weights`"),
        ({"name": "focal", "class_weights": [1.0, -2.0]}, None, "`class_weights`"),
        ({"name": "logit_adjusted", "class_weights": "balanced"}, [9, 3, 1], "no option 'class_weights'"),
        ({"name": "dot_regression", "form": "cube"}, None, "'cube'"),
        ({"name": "dot_regression", "tau": 1.0}, None, "no option 'tau'"),
        ({"name": "margin_dot_regression", "temperature": -1.0}, [9, 3, 1], "`temperature`"),
        ({"name": "margin_dot_regression", "prior_strength": -1.0}, [9, 3, 1], "`prior_strength`"),
        ({"name": "logit_adjusted"}, None, "`class_counts`"),
        ({"name": "logit_adjusted"}, [3, 0, 1], r"class_counts\[1\]"),
    ],
)
def test_settings_that_cannot_be_are_named_when_the_loss_is_made(settings, counts, message):
    with pytest.raises(ValueError, match=message):
        make_loss(settings, class_counts=counts)
