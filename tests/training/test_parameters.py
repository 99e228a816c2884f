"""Laws of what is trained: fixed heads are fixed whatever was freed, and nothing goes on that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import bert, resnet
from torch import nn

from etf_adapt.heads.in_model import batch_norms
from etf_adapt.heads.layers import CosineHead, ETFHead, PaperHead
from etf_adapt.training.parameters import (
    fix_parameters,
    require_embeddings,
    require_finite,
    set_head_learning_rate,
)


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.body(x))))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_freed_head_is_fixed_again():
    model = Net(ETFHead(6, 3)).requires_grad_(True)
    assert fix_parameters(model) == ["head"]
    assert fix_parameters(model) == []
    assert trained(model) == {"body.weight", "body.bias", "norm.weight", "norm.bias"}


def test_a_frozen_backbone_leaves_what_the_head_learns():
    cosine, paper = Net(CosineHead(6, 3)), Net(PaperHead(6, 3))
    for model in (cosine, paper):
        fix_parameters(model, freeze="backbone")
    assert trained(cosine) == {"head.weight"}
    assert trained(paper) == {"head.batch_norm.weight", "head.batch_norm.bias"}


def test_a_regular_expression_freezes_the_parameters_that_it_names():
    model = Net(CosineHead(6, 3))
    fix_parameters(model, freeze=r"body|^head")
    assert trained(model) == {"norm.weight", "norm.bias", "head.weight"}, (
        "a head that learns is no part of the backbone"
    )
    biases = Net(ETFHead(6, 3))
    fix_parameters(biases, freeze=r"^(?!.*(bias|norm))")
    assert trained(biases) == {"body.bias", "norm.weight", "norm.bias"}
    with pytest.raises(ValueError, match=r"`freeze` \(='layer'\) is found in none of the 4 names .* norm.bias"):
        fix_parameters(Net(ETFHead(6, 3)), freeze="layer")


def test_nothing_to_train_and_half_precision_are_refused():
    with pytest.raises(ValueError, match="leaves nothing to train under a fixed head"):
        fix_parameters(Net(ETFHead(6, 3)), freeze="backbone")
    assert fix_parameters(Net(ETFHead(6, 3)), freeze="backbone", steps=0) == []
    with pytest.raises(ValueError, match=r"`body.weight` is torch.float16, but weights are trained in float32"):
        fix_parameters(Net(ETFHead(6, 3)).half())


def test_the_heads_groups_keep_all_but_the_learning_rate():
    model = Net(ETFHead(6, 3, trainable=True))
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.1
    )
    set_head_learning_rate(optimizer, [model.head], 0.7)
    groups = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert groups[id(model.head.weight)] == (0.7, 0.3) and groups[id(model.head.bias)] == (0.7, 0.0)
    assert groups[id(model.body.weight)] == (0.1, 0.3) and groups[id(model.norm.bias)] == (0.1, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_batch_norms_inside_the_head_are_the_heads_own():
    assert len(batch_norms(Net(PaperHead(6, 3)))) == 1
    assert batch_norms(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))) == []


@pytest.mark.parametrize("place", ["body.weight", "head.bias", "norm.running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_anything_not_finite_is_named(place, value):
    model = Net(ETFHead(6, 3))
    require_finite(model, step=3)
    model.state_dict()[place].view(-1)[0] = value
    with pytest.raises(FloatingPointError, match=r"no longer finite after step 3"):
        require_finite(model, step=3)


def test_noise_of_embeddings_needs_embeddings():
    require_embeddings(bert(), 5.0)
    require_embeddings(resnet(), None)
    with pytest.raises(ValueError, match=r"`neftune_noise_alpha` \(=5.0\) needs a model of texts"):
        require_embeddings(resnet(), 5.0)
