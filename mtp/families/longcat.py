"""The head of LongCat-Flash: a dense layer with one latent attention."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head import Trunk, Unit
from .family import Config, Family, Weights, arguments, module_of, norms


class Block(nn.Module):
    """mlx-lm's LongCat attention and MLP in a plain layer; the trunk's layers have two of each."""

    def __init__(self, config: Config):
        super().__init__()
        longcat, args = module_of(config), arguments(config)
        self.self_attn = longcat.LongcatFlashMLA(args)
        self.mlp = longcat.LongcatFlashMLP(args)
        self.input_layernorm = norms(config)()
        self.post_attention_layernorm = norms(config)()

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class LongCat(Family):
    """x = eh_proj([enorm(embed(t+1)), hnorm(h_t)]), a dense layer, mtp.norm.

    Hidden states: after the final norm, and mtp.norm(x) is fed back (vLLM).
    Order: embedding first. Norms: of both inputs and before the lm_head, as they
    multiply. Embedding and lm_head: the trunk's; the checkpoint's copy of the
    embedding is left out. Heads: one, applied again. Source: vLLM,
    longcat_flash_mtp.py.
    """

    names = (
        (r"mtp\.layers\.0\.enorm(?:\.m)?\.(.+)", r"units.0.embed_norm.\1"),
        (r"mtp\.layers\.0\.hnorm(?:\.m)?\.(.+)", r"units.0.hidden_norm.\1"),
        (r"mtp\.layers\.0\.eh_proj\.(.+)", r"units.0.join.\1"),
        (r"mtp\.norm\.(.+)", r"units.0.norm.\1"),
        (r"mtp\.embed_tokens\..+", ""),
        (r"mtp\.layers\.0\.(?:transformer_layer\.)?(.+)", r"units.0.blocks.0.\1"),
    )

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        return {"num_layers": 1}

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        return Unit(norms(config), config["hidden_size"], [Block(config)], mask_array=True)

    def sanitize(self, stub: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        # the trunk's attentions are numbered, and kv_b_proj is split there only
        numbered = {n.replace(".self_attn.", ".self_attn.0."): a for n, a in weights.items()}
        clean = super().sanitize(stub, numbered)
        return {n.replace(".self_attn.0.", ".self_attn."): a for n, a in clean.items()}
