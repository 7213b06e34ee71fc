"""Heads of MiMo: the dense 7B and the mixture of experts V2-Flash."""

from __future__ import annotations

import mlx.nn as nn

from ..head import Trunk, Unit
from .family import Config, Family, Weights, norms


class MiMo(Family):
    """x = input_proj([hidden_layernorm(h_t), token_layernorm(embed(t+1))]), a dense layer.

    Hidden states: after the final norm, and final_layernorm(x) is fed back (vLLM).
    Contested: exllamav3 (#238) takes both before it and reports .88 on code.
    Order: hidden state first. Norms: of both inputs and before the lm_head, as they
    multiply. Embedding and lm_head: the trunk's. Heads: one is published.
    Source: vLLM, mimo_mtp.py.
    """

    names = (
        (r"model\.mtp_layers\.(\d+)\.token_layernorm\.(.+)", r"units.\1.embed_norm.\2"),
        (r"model\.mtp_layers\.(\d+)\.hidden_layernorm\.(.+)", r"units.\1.hidden_norm.\2"),
        (r"model\.mtp_layers\.(\d+)\.input_proj\.(.+)", r"units.\1.join.\2"),
        (r"model\.mtp_layers\.(\d+)\.final_layernorm\.(.+)", r"units.\1.norm.\2"),
        (r"model\.mtp_layers\.\d+\.self_attn\.rotary_emb\..+", ""),
        (r"model\.mtp_layers\.(\d+)\.(.+)", r"units.\1.blocks.0.\2"),
    )

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        return Unit(norms(config), config["hidden_size"], stub.layers, embedding_first=False)


class MiMoV2(Family):
    """x = eh_proj([enorm(embed(t+1)), hnorm(h_t)]), a dense layer with sliding attention.

    Hidden states: before the final norm, and x is fed back unnormed, as in SGLang
    (mimo_v2_nextn.py), whose support the model's makers wrote. Contested: vLLM
    (mimo_v2_mtp.py) takes both after it.
    Order: embedding first. Norms: of both inputs and before the lm_head, as they
    multiply. Embedding and lm_head: the trunk's. Heads: three, one per depth.
    Source: SGLang and vLLM, as named.
    """

    hidden = "pre_norm"
    names = (
        (r"mtp\.layers\.(\d+)\.enorm\.(.+)", r"units.\1.embed_norm.\2"),
        (r"mtp\.layers\.(\d+)\.hnorm\.(.+)", r"units.\1.hidden_norm.\2"),
        (r"mtp\.layers\.(\d+)\.eh_proj\.(.+)", r"units.\1.join.\2"),
        (r"mtp\.layers\.(\d+)\.final_layernorm\.(.+)", r"units.\1.norm.\2"),
        (
            r"mtp\.layers\.(\d+)\.pre_mlp_layernorm\.(.+)",
            r"units.\1.blocks.0.post_attention_layernorm.\2",
        ),
        (r"mtp\.layers\.(\d+)\.(.+)", r"units.\1.blocks.0.\2"),
    )

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        # mlx-lm's model wants a layer of either kind of attention
        return {
            "num_hidden_layers": 2,
            "hybrid_layer_pattern": [1, 0],
            "moe_layer_freq": [0, 0],
        }

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        window = config["sliding_window_size"]
        return Unit(norms(config), config["hidden_size"], stub.layers[:1], window=window)
