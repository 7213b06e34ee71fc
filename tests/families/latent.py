"""Tiny configurations of the families with latent attention, alone or beside recurrent layers."""

from __future__ import annotations

from .parts import GROUPED, MLA, WINDOW, YARN, Config, bailing, config, nested

_KDA: Config = {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}

_DEEPSEEK_V3 = config("deepseek_v3", GROUPED, MLA, rope_scaling=YARN)

_DEEPSEEK_V32 = config(
    "deepseek_v32",
    GROUPED,
    MLA,
    rope_scaling=YARN,
    index_head_dim=32,
    index_n_heads=4,
    index_topk=16,
)

_MISTRAL4 = config(
    "mistral4",
    GROUPED,
    MLA,
    rope_parameters={
        **YARN,
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.1,
    },
)

_LONGCAT = config(
    "longcat_flash",
    MLA,
    attention_method="MLA",
    zero_expert_type="identity",
    ffn_hidden_size=128,
    expert_ffn_hidden_size=64,
    moe_topk=4,
    n_routed_experts=8,
    zero_expert_num=4,
    num_layers=2,
    routed_scaling_factor=1.5,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)

LATENT: dict[str, Config] = {
    "bailing_hybrid": bailing(
        "bailing_hybrid",
        **MLA | {"q_lora_rank": None},
        layer_group_size=2,
        group_norm_size=2,
        num_hidden_layers=4,
    ),
    "bailing_moe_v3": bailing(
        "bailing_hybrid",
        **MLA,
        architectures=["BailingMoeV3ForCausalLM"],
        moe_shared_expert_intermediate_size=64,
        layer_group_size=2,
        num_hidden_layers=4,
        short_conv_kernel_size=4,
    ),
    "deepseek_v2": config(
        "deepseek_v2", GROUPED, MLA, topk_method="group_limited_greedy", rope_scaling=YARN
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V32,
    "deepseek_v41": config(
        "deepseek_v41",
        num_hidden_layers=4,
        head_dim=64,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        o_groups=2,
        o_lora_rank=64,
        n_routed_experts=8,
        sliding_window=WINDOW,
        compress_ratios=[0, 4, 4, 1],
        kv_source_layer_ids=[1, 3],
        index_source_layer_ids=[1, 3],
        index_n_heads=4,
        index_head_dim=32,
        index_topk=4,
        hc_mult=2,
        hc_sinkhorn_iters=4,
    ),
    "glm4_moe_lite": config("glm4_moe_lite", GROUPED, MLA),
    "glm_moe_dsa": {
        **_DEEPSEEK_V32,
        "model_type": "glm_moe_dsa",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "kimi_k25": nested("kimi_k25", _DEEPSEEK_V3),
    "kimi_k3": nested(
        "kimi_k3",
        config(
            "kimi_linear",
            MLA,
            num_hidden_layers=4,
            linear_attn_config={
                **_KDA,
                "kda_layers": [1, 2, 4],
                "full_attn_layers": [3],
                "gate_lower_bound": -5.0,
            },
            hidden_act="situ",
            activation_situ_beta=2.0,
            activation_situ_linear_beta=2.0,
            attn_res_block_size=2,
            mla_use_output_gate=True,
            num_experts=8,
            num_experts_per_token=2,
            num_shared_experts=1,
            first_k_dense_replace=1,
            routed_expert_hidden_size=64,
            latent_moe_use_norm=True,
        ),
    ),
    "kimi_linear": config(
        "kimi_linear",
        MLA,
        num_hidden_layers=4,
        linear_attn_config={**_KDA, "kda_layers": [1, 2, 4], "full_attn_layers": [3]},
        model_max_length=1024,
        num_experts=8,
        num_experts_per_token=2,
        num_shared_experts=1,
        first_k_dense_replace=1,
        num_expert_group=2,
    ),
    "kimi_vl": nested("kimi_vl", _DEEPSEEK_V3),
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {
        **_LONGCAT,
        "model_type": "longcat_flash_ngram",
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mistral3": nested("mistral3", _MISTRAL4),
    "mistral4": _MISTRAL4,
}
