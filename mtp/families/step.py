"""Heads of Step-3.5: three further layers, each with its own lm_head."""

from __future__ import annotations

import mlx.nn as nn

from ..head import Trunk, Unit
from .deepseek import Appended
from .family import Config, Weights, norms

_BY_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits")


class Step(Appended):
    """x = eh_proj([enorm(embed(t+1)), hnorm(h_t)]), a dense layer with sliding attention.

    Hidden states: before the final norm, and x is fed back unnormed (vLLM, whose
    trunk returns the state before it; Rapid-MLX). Contested: transformers' MtpModel
    takes both after it.
    Order: embedding first. Norms: of both inputs and before the lm_head;
    zero-centred in original checkpoints. Embedding: the trunk's. lm_head: each
    head's own where the checkpoint has it, else the trunk's. Heads: three, one per
    depth. Source: vLLM, step3p5_mtp.py.
    """

    hidden = "pre_norm"
    zero_centred = True
    tails = (
        (r"shared_head\.(?:output|head)\.(.+)", r"lm_head.\1"),
        *Appended.tails,
    )

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        at = config["num_hidden_layers"] + unit
        changes: Config = {
            "num_hidden_layers": 1,
            "moe_layers_enum": "",
            "swiglu_limits_shared": None,
        }
        for key in _BY_LAYER:
            values = config.get(key)
            if isinstance(values, list):
                changes[key] = values[at : at + 1] or [_sliding(config, key)]
        return changes

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        window = config["sliding_window"] if stub.layers[0].is_sliding else None
        width, lm_head = config["hidden_size"], None
        if any(name.startswith("lm_head.") for name in names):
            lm_head = nn.Linear(width, config["vocab_size"], bias=False)
        return Unit(norms(config), width, stub.layers, lm_head=lm_head, window=window)


def _sliding(config: Config, key: str) -> object:
    """What the trunk's first sliding layer has, for a list that ends with the trunk."""
    types = config.get("layer_types") or []
    if key == "layer_types":
        return "sliding_attention"
    return config[key][types.index("sliding_attention") if "sliding_attention" in types else -1]
