"""The head of ERNIE-4.5, mixture of experts."""

from __future__ import annotations

import mlx.nn as nn

from ..head import Trunk, Unit
from .family import Config, Family, Weights, norms


class Ernie(Family):
    """x = mtp_linear_proj([mtp_emb_norm(embed(t+1)), mtp_hidden_norm(h_t)]), a dense layer.

    Hidden states: after the final norm; x goes through the trunk's own final norm
    before the lm_head, and that is fed back. FastDeploy has it so, and a comparison
    of eight variants in vMLX found it best; vLLM leaves the last norm out.
    Order: embedding first. Norms: of both inputs, as they multiply; the last one is
    the trunk's. Embedding and lm_head: the trunk's. Heads: one.
    Source: vLLM, ernie_mtp.py (names).
    """

    names = (
        (r"model\.mtp_emb_norm\.(\d+)\.(.+)", r"units.\1.embed_norm.\2"),
        (r"model\.mtp_hidden_norm\.(\d+)\.(.+)", r"units.\1.hidden_norm.\2"),
        (r"model\.mtp_linear_proj\.(\d+)\.(.+)", r"units.\1.join.\2"),
        (r"model\.mtp_block\.(\d+)\.(.+)", r"units.\1.blocks.0.\2"),
    )

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        return {"num_hidden_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": None}

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        return Unit(norms(config), config["hidden_size"], stub.layers, norm=trunk.norm)
