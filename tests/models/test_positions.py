"""Laws of positions: a text of the greatest length is read, and one token more is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_models import stock_bert
from transformers import AutoConfig, AutoModelForSequenceClassification

from etf_adapt.models.positions import max_positions, token_limit

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}


def build(kind, **settings):
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "length"),
    [
        ("bert", {"max_position_embeddings": 12}, 12),
        ("roberta", {"max_position_embeddings": 12, "pad_token_id": 1}, 10),
        ("roberta", {"max_position_embeddings": 12, "pad_token_id": 0}, 11),
        ("xlm-roberta", {"max_position_embeddings": 12, "pad_token_id": 3}, 8),
        ("camembert", {"max_position_embeddings": 12, "pad_token_id": 1}, 10),
        ("mpnet", {"max_position_embeddings": 12, "pad_token_id": 1}, 10),
        ("electra", {"max_position_embeddings": 12}, 12),
        ("distilbert", {"max_position_embeddings": 12, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, 12),
    ],
)
def test_a_text_of_the_greatest_length_is_read_and_no_longer_one(kind, settings, length):
    model = build(kind, **settings)
    assert max_positions(model) == length
    model(input_ids=torch.full((1, length), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 7))


def test_minus_one_is_no_limit():
    assert max_positions(build("xlnet", d_model=16, n_layer=1, n_head=2, d_inner=32)) is None


def test_texts_are_cut_to_what_tokenizer_and_model_allow():
    tokenizer = SimpleNamespace(model_max_length=10**30)
    assert token_limit(stock_bert(), tokenizer) == 32 and token_limit(stock_bert(), tokenizer, 8) == 8
    assert token_limit(stock_bert(), SimpleNamespace(model_max_length=16)) == 16
    far = build("bert", max_position_embeddings=4096)
    assert token_limit(far, SimpleNamespace(model_max_length=2048)) == 2048 and token_limit(far, tokenizer) == 512
    with pytest.raises(ValueError, match=r"`max_length` \(=33\) must be at most 32"):
        token_limit(stock_bert(), tokenizer, 33)
