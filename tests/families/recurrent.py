"""Tiny configurations of the families with gated delta, Mamba, convolution or linear layers."""

from __future__ import annotations

from .parts import GROUPED, Config, bailing, config, nested

_GATED_DELTA: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

RECURRENT: dict[str, Config] = {
    "bailing_moe_linear": bailing(
        "bailing_moe_linear", layer_group_size=2, group_norm_size=2, num_hidden_layers=4
    ),
    "granitemoehybrid": config(
        "granitemoehybrid",
        intermediate_size=64,
        shared_intermediate_size=64,
        num_local_experts=8,
        layer_types=["mamba", "attention", "mamba"],
        logits_scaling=2.0,
        attention_multiplier=0.25,
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_proj_bias=False,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_n_groups=2,
        mamba_conv_bias=True,
        position_embedding_type="nope",
    ),
    "jamba": config(
        "jamba",
        num_hidden_layers=4,
        intermediate_size=64,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=8,
        mamba_expand=2,
        num_experts=8,
        mamba_dt_rank=8,
    ),
    "lfm2_moe": config(
        "lfm2_moe",
        num_experts=8,
        use_expert_bias=True,
        num_dense_layers=1,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "nemotron_h": config(
        "nemotron_h",
        GROUPED,
        num_hidden_layers=5,
        hybrid_override_pattern=["M", "E", "*", "-", "E"],
        mamba_num_heads=4,
        mamba_head_dim=32,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=2,
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
        moe_shared_expert_intermediate_size=64,
        moe_latent_size=64,
    ),
    "qwen3_5_moe": nested(
        "qwen3_5_moe",
        config(
            "qwen3_5_moe_text",
            _GATED_DELTA,
            num_hidden_layers=4,
            num_experts=16,
            num_experts_per_tok=4,
            rope_parameters={
                "type": "default",
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
    ),
    "qwen3_next": config(
        "qwen3_next",
        _GATED_DELTA,
        num_hidden_layers=4,
        num_experts=8,
        mlp_only_layers=[0],
        partial_rotary_factor=0.5,
    ),
}

DENSE_RECURRENT: dict[str, Config] = {
    "qwen3_5": nested(
        "qwen3_5",
        {
            name: value
            for name, value in RECURRENT["qwen3_5_moe"]["text_config"].items()
            if "expert" not in name
        }
        | {"model_type": "qwen3_5_text"},
    )
}
