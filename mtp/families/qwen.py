"""Heads of Qwen3.5, Qwen3.6 and Qwen3-Next, mixture of experts and dense."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .family import BLOCK, Config, Family, Weights


class Qwen(Family):
    """x = fc([norm_e(embed(t+1)), norm_h(h_t)]), one gated full-attention layer, mtp.norm.

    Hidden states: after the final norm, and mtp.norm(x) is fed back (llama.cpp
    #24025, LightLLM #1402: accepted length 1.80 to 2.74, Rapid-MLX #3371).
    Order: embedding first. Norms: of both inputs and before the lm_head;
    zero-centred in original checkpoints. Embedding and lm_head: the trunk's.
    Heads: one, applied again for deeper drafts; further `mtp.layers` are the layers
    of further depths, which share all else. Source: vLLM, qwen3_next_mtp.py and
    qwen3_5_mtp.py.
    """

    zero_centred = True
    names = (
        (r"mtp\.fc\.(.+)", r"units.0.join.\1"),
        (r"mtp\.pre_fc_norm_embedding\.(.+)", r"units.0.embed_norm.\1"),
        (r"mtp\.pre_fc_norm_hidden\.(.+)", r"units.0.hidden_norm.\1"),
        (r"mtp\.norm\.(.+)", r"units.0.norm.\1"),
        (r"mtp\.layers\.(\d+\..+)", r"units.0.blocks.\1"),
        (r"mtp\.(embed_tokens|lm_head)\..+", ""),
    )

    def units(self, parts: dict[int, Weights]) -> dict[int, Weights]:
        shared: Weights = {}
        layers: dict[int, Weights] = {0: {}}
        for name, array in parts.pop(0, {}).items():
            if match := BLOCK.match(name):
                layers.setdefault(int(match[1]), {})[f"blocks.0.{match[2]}"] = array
            else:
                shared[name] = array
        return parts | {i: shared | layer for i, layer in layers.items()}

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        changes: Config = {
            "num_hidden_layers": 1,
            "full_attention_interval": 1,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        }
        if not any(".mlp.gate." in name for name in names):
            changes["num_experts"] = 0
        return changes

    def sanitize(self, stub: nn.Module, weights: Weights) -> Weights:
        return super().sanitize(stub, _stacked(weights))


class Qwen35(Qwen):
    """As `Qwen`; mlx-lm keeps this family's text model inside a larger one."""

    layers = "language_model.model.layers"


def _stacked(weights: Weights) -> Weights:
    """Experts one by one, stacked: mlx-lm's Qwen3.5 expects gate and up of all in one tensor."""
    each: dict[str, dict[int, Any]] = {}
    out: Weights = {}
    for name, array in weights.items():
        match = re.fullmatch(r"(.+\.mlp)\.experts\.(\d+)\.(.+)", name)
        if match:
            each.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = array
        else:
            out[name] = array
    for name, experts in each.items():
        out[name] = mx.stack([experts[i] for i in sorted(experts)])
    return out
