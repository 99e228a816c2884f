"""Small configurations of transformers' classes, so that each can be built, trained a step and saved on any machine."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "pooler_hidden_size", "width",
          "cross_attention_hidden_size")  # fmt: skip
SMALL = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
                     "hidden_dim", "ffn_hidden_size", "ffn_size", "moe_intermediate_size",
                     "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "rotary_dim", "relative_attention_num_buckets", "kv_lora_rank",
                     "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64,
}  # fmt: skip
"""Greatest value of the settings that most configurations share."""

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    **{key: {"num_key_value_heads": 4} for key in ("axk1", "axk2", "deepseek_v3", "minicpm3", "esmc")},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "efficientnet": {"image_size": 64, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "efficientloftr": {"hidden_size": 256},
    "esm": {"vocab_size": 99, "mask_token_id": 3},
    **{key: {"head_dim": 8} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{key: {"num_hidden_layers": 8} for key in ("jamba", "zamba")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"num_key_value_heads": 2},
    **{key: {"num_hidden_layers": 4} for key in ("qwen3_5", "qwen3_5_text", "qwen3_next")},
    "perceiver": {"num_cross_attention_heads": 1},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 8, "layer_types": ["mamba"] * 6 + ["hybrid", "mamba"], "hybrid_layer_ids": [6]},
}
"""Further settings by model type."""


def small_config(model_type: str, *, num_labels: int) -> PreTrainedConfig:
    """Return a small configuration of a model type (a key of `CONFIG_MAPPING`); unusual settings keep their defaults."""
    return _small(CONFIG_MAPPING[model_type], MORE.get(model_type, {}), num_labels=num_labels)


def _small(kind: type[PreTrainedConfig], more: dict[str, Any], **given: Any) -> PreTrainedConfig:
    default = kind()
    plain = default.to_dict()
    is_transformer = any(isinstance(plain.get(width), int) for width in WIDTHS)
    settings = {
        name: min(plain[name], value)
        for name, value in SMALL.items()
        if is_transformer and isinstance(plain.get(name), int) and not isinstance(plain[name], bool)
    }
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    settings |= {name: _small(type(part), MORE.get(part.model_type, {})).to_dict() for name, part in parts.items()}
    tokens = TOKENS if "vocab_size" in plain or parts else {}
    return kind(**{**settings, **tokens, **more, **given})
