"""How long a text a model can read."""

from __future__ import annotations

from typing import Any

from torch import nn

from etf_adapt.data.text import DEFAULT_MAX_LENGTH, REAL_LENGTH


def max_positions(model: nn.Module) -> int | None:
    """Return the most tokens of a text that a model has positions for; None where it has no limit of its own."""
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    declared = getattr(config, "max_position_embeddings", None) or 0
    # RoBERTa and its kin number positions from behind the padding index: the table says so by a padding index of its own.
    usable = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name.rpartition(".")[2]
    ]
    return min([declared, *usable]) if declared > 0 else None  # XLNet declares -1


def token_limit(model: nn.Module, tokenizer: Any, max_length: int | None = None) -> int:
    """Return the length that texts are cut to: by default what tokenizer (512 where it knows no limit) and model allow."""
    positions = max_positions(model)
    if max_length is not None and positions is not None and max_length > positions:
        raise ValueError(f"`max_length` (={max_length}) must be at most {positions}: the model has no more.")
    own = tokenizer.model_max_length if tokenizer.model_max_length < REAL_LENGTH else DEFAULT_MAX_LENGTH
    return max_length or min(filter(None, (own, positions)))
