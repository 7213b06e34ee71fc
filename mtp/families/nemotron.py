"""The head of Nemotron-H: a short stack of attention and expert blocks."""

from __future__ import annotations

import re

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..head import Trunk, Unit
from .family import Config, Family, Weights, norms

# what is found right in a block's mixer
_KINDS = {"q_proj": "*", "gate": "E", "up_proj": "-", "in_proj": "M"}


class Nemotron(Family):
    """x = eh_proj([enorm(embed(t+1)), hnorm(h_t)]), blocks as the pattern has them ("*E").

    Hidden states: after the final norm, and final_layernorm(x) is fed back (vLLM;
    Megatron, which trained it, hands over the normed state).
    Order: embedding first. Norms: of both inputs, with the first block; before the
    lm_head, with the last; as they multiply. Embedding and lm_head: the trunk's.
    Heads: one, applied again. Source: vLLM, nemotron_h_mtp.py.
    """

    layers = "backbone.layers"
    names = (
        (r"mtp\.layers\.0\.enorm\.(.+)", r"units.0.embed_norm.\1"),
        (r"mtp\.layers\.0\.hnorm\.(.+)", r"units.0.hidden_norm.\1"),
        (r"mtp\.layers\.0\.eh_proj\.(.+)", r"units.0.join.\1"),
        (r"mtp\.layers\.\d+\.final_layernorm\.(.+)", r"units.0.norm.\1"),
        (r"mtp\.layers\.(\d+\..+)", r"units.0.blocks.\1"),
    )

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        found: dict[int, str] = {}
        for name in names:
            match = re.fullmatch(r"blocks\.(\d+)\.mixer\.(\w+)\..+", name)
            if match and match[2] in _KINDS:
                found[int(match[1])] = _KINDS[match[2]]
        pattern = [found.get(i, "") for i in range(max(found, default=-1) + 1)]
        if not set(pattern) <= {"*", "E", "-"}:
            raise ValueError(f"its blocks are {''.join(pattern)!r}, of which some are unknown")
        return {
            "hybrid_override_pattern": pattern,
            "layers_block_type": None,
            "layer_types": None,
            "num_hidden_layers": len(pattern),
        }

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        caches = [KVCache if block.block_type == "*" else None for block in stub.layers]
        return Unit(norms(config), config["hidden_size"], stub.layers, caches)
