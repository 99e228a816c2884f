"""Laws of the heads: stock state dicts, rows that stay fixed, folds that keep the argmax."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from etf_adapt.heads.layers import (
    HEAD_KINDS,
    CosineHead,
    ETFConv2dHead,
    ETFHead,
    PaperHead,
    fold_head,
    make_head,
)


def test_state_dict_is_that_of_the_stock_layer():
    for bias in (True, False):
        stock, ours = nn.Linear(8, 3, bias=bias), ETFHead(8, 3, bias=bias)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    stock, ours = nn.Conv2d(8, 3, 1), ETFConv2dHead(8, 3)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


def test_a_linear_head_and_a_convolution_hold_the_same_rows():
    linear = ETFHead(8, 3, generator=torch.Generator().manual_seed(1))
    convolution = ETFConv2dHead(8, 3, generator=torch.Generator().manual_seed(1))
    features = torch.randn(4, 8)
    torch.testing.assert_close(convolution(features[:, :, None, None]).flatten(1), linear(features))


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_only_learned_heads_receive_gradients(kind):
    head = make_head(nn.Linear(8, 1000), 3, kind=kind)
    assert head.kind == kind
    assert head.weight.requires_grad is (kind in ("linear", "cosine"))
    head.requires_grad_(True)
    head.fix()
    assert head.weight.requires_grad is (kind in ("linear", "cosine"))


def test_a_fixed_head_can_be_made_trainable():
    assert make_head(nn.Linear(8, 10), 3, trainable=True).weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_head_takes_dtype_mode_and_bias_from_the_leaf(dtype):
    leaf = nn.Linear(8, 10, bias=False, dtype=dtype).eval()
    head = make_head(leaf, 3)
    assert head.weight.dtype == dtype and head.bias is None and not head.training


def test_paper_head_folds_to_the_same_argmax():
    torch.manual_seed(0)
    head = PaperHead(16, 5)
    nn.init.normal_(head.batch_norm.weight)
    nn.init.normal_(head.batch_norm.bias)
    for _ in range(20):
        head(3.0 * torch.randn(64, 16) + 1.0)
    head.eval()
    features = 3.0 * torch.randn(2000, 16) + 1.0
    layer = fold_head(head, bias=True)
    assert torch.equal(layer(features).argmax(dim=1), head(features).argmax(dim=1))
    assert set(layer.state_dict()) == {"weight", "bias"} and not layer.weight.requires_grad


def test_paper_logits_are_cosines_with_the_frame():
    head = PaperHead(8, 3).eval()
    features = torch.randn(4, 8)
    expected = torch.nn.functional.cosine_similarity(head.batch_norm(features)[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_cosine_head_folds_to_the_same_argmax(bias):
    torch.manual_seed(0)
    head = CosineHead(16, 5)
    features = 5.0 * torch.randn(2000, 16)
    layer = fold_head(head, bias=bias)
    assert torch.equal(layer(features).argmax(dim=1), head(features).argmax(dim=1))
    assert (layer.bias is not None) is bias and layer.weight.requires_grad


def test_cosine_logits_ignore_the_norm_of_the_feature():
    head, features = CosineHead(8, 3), torch.randn(4, 8)
    torch.testing.assert_close(head(7.0 * features), head(features))


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_copies_and_pickles_are_equal(kind):
    head = make_head(nn.Linear(8, 10), 3, kind=kind)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert (other.kind, other.frame, other.trainable) == (head.kind, head.frame, head.trainable)
        assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), other.state_dict().values()))
        assert other.weight.requires_grad == head.weight.requires_grad


@pytest.mark.parametrize(
    ("leaf", "kind", "error"),
    [
        (nn.BatchNorm1d(4), "etf", TypeError),
        (nn.Conv2d(4, 10, 3), "etf", TypeError),
        (nn.Conv2d(4, 10, 1), "paper", ValueError),
        (nn.Linear(4, 10, bias=False), "paper", ValueError),
        (nn.Linear(4, 10), "softmax", ValueError),
    ],
)
def test_leaves_that_cannot_be_replaced_are_refused(leaf, kind, error):
    with pytest.raises(error):
        make_head(leaf, 3, kind=kind)


def test_a_bias_for_a_layer_without_one_is_refused():
    with pytest.raises(ValueError, match="without an intercept"):
        ETFHead(4, 3, bias=False).set_class_vectors(torch.zeros(3, 4), torch.ones(3))
