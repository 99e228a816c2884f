"""Losses by name: what their settings make, and what they may not be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.losses.dot_regression import dot_regression_loss
from etf_adapt.losses.registry import LOSS_NAMES, known_options, make_loss
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
    assert set(known_options("dot_regression")) == {"form", "target", "balance", "unit_features", "label_smoothing"}
    with pytest.raises(ValueError, match="did you mean 'cross_entropy'"):
        known_options("crossentropy")


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        ({"name": "focal"}, None, "'focal'"),
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
