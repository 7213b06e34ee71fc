"""What the tiny configurations share: sizes, and blocks of fields that families have in common."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

VOCABULARY = 320
WINDOW = 16  # sliding windows are shorter than the tests' prompts

BASE: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

# DeepSeek's routing: groups of experts, a correction bias, a first dense layer
GROUPED: Config = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

# multi-head latent attention
MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}

YARN: Config = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def config(model_type: str, *parts: Config, **fields: Any) -> Config:
    config = {**BASE, "model_type": model_type}
    for part in parts:
        config |= part
    return config | fields


def nested(model_type: str, text: Config) -> Config:
    return {"model_type": model_type, "text_config": text}


def bailing(model_type: str, **fields: Any) -> Config:
    defaults = {
        "num_experts": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": True,
    }
    return config(model_type, defaults, **fields)
