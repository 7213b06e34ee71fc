"""Heads of DeepSeek-V3 and V3.2 and of GLM-4.5 to 4.7 and 5, appended as further layers."""

from __future__ import annotations

import re
from typing import ClassVar

import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache

from ..head import Trunk, Unit
from .family import Config, Family, Weights, norms

_LAYER = re.compile(r"\bmodel\.layers\.(\d+)\.")
_COPIES = r"(embed_tokens|shared_head\.head|shared_head\.output|self_attn\.rotary_emb)\..+"


class Appended(Family):
    """Heads that lie behind the trunk's last layer: `model.layers.{N}.*` with N the trunk's count.

    x = eh_proj([enorm(embed(t+1)), hnorm(h_t)]), a decoder layer, shared_head.norm.
    """

    names = ((r"model\.layers\.(\d+)\.(?:transformer\.)?(.+)", ""),)
    tails: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"enorm\.(.+)", r"embed_norm.\1"),
        (r"hnorm\.(.+)", r"hidden_norm.\1"),
        (r"eh_proj\.(.+)", r"join.\1"),
        (r"shared_head\.norm\.(.+)", r"norm.\1"),
        (_COPIES, ""),
        (r"(.+)", r"blocks.0.\1"),
    )

    def may_be(self, name: str, config: Config) -> bool:
        match = _LAYER.search(name)
        return int(match[1]) >= config["num_hidden_layers"] if match else "mtp" in name

    def place(self, match: re.Match[str], to: str, config: Config) -> str | None:
        unit = int(match[1]) - config["num_hidden_layers"]
        for pattern, name in self.tails:
            if tail := re.fullmatch(pattern, match[2]):
                return f"units.{unit}.{tail.expand(name)}" if name else ""
        return None


class Glm4(Appended):
    """GLM-4.5, 4.6 and 4.7: a decoder layer with plain attention and experts.

    Hidden states: after the final norm, and shared_head.norm(x) is fed back.
    Contested: llama.cpp (#24025) and exllamav3 take the state before it. For it
    speak transformers' MtpModel (the tests compare with it), DeepSeek's own modeling
    code, and what was measured: feeding back the normed state took DeepSeek-R1 from
    61 to 65% accepted and GLM-5.2 from 3.04 to 3.46 tokens a pass (ROCm/ATOM #1764,
    #1742; vLLM #45895, #46075).
    Order: embedding first. Norms: of both inputs and before the lm_head, as they
    multiply. Embedding and lm_head: the trunk's; the checkpoint's copies are left
    out. Heads: one, applied again. Source: vLLM, glm4_moe_mtp.py.
    """

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        return {"num_hidden_layers": 1, "first_k_dense_replace": 0, "moe_layer_freq": 1}


class DeepSeek(Glm4):
    """DeepSeek-V3 and GLM-4.7-Flash (glm4_moe_lite): as `Glm4` with latent attention.

    Heads: one is published; checkpoints with more are read as one unit each.
    Source: vLLM, deepseek_mtp.py.
    """

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        width = config["hidden_size"]
        return Unit(norms(config), width, stub.layers, mask_array=True)


class DeepSeek32(DeepSeek):
    """DeepSeek-V3.2 and GLM-5: as `DeepSeek`, with the indexer of sparse attention."""

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Unit:
        caches = [lambda: CacheList(KVCache(), KVCache())]
        return Unit(norms(config), config["hidden_size"], stub.layers, caches, mask_array=True)
