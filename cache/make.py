"""A model's caches with those compressed that can be.

Compressed: mlx-lm's KVCache of a layer whose attention goes through mlx-lm's function, and
DeepSeek's latent. Left as mlx-lm makes them: sliding windows (RotatingKVCache: short, and their
tokens are all recent), recurrent states, lists of caches, and layers with attention of their own
(gemma2's softcap).

    cache = make_cache(model, key_bits=3.5, value_bits=3.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from .attention import install
from .codebook import BITS
from .compressed import CompressedKVCache

LayerBits = tuple[float, float]  # of keys and of values


def make_cache(
    model: nn.Module,
    key_bits: float = 4,
    value_bits: float = 4,
    layers: Sequence[LayerBits | None] | None = None,
) -> list[Any]:
    """mlx-lm's prompt cache with compressed caches in it; `layers` sets bits one by one.

    layers: for each cache the bits of keys and of values; None leaves that cache as it is.
    Raises ValueError for bits that there is no codebook for.
    """
    for wanted in [(key_bits, value_bits), *(layers or [])]:
        if wanted is not None and not set(wanted) <= set(BITS):
            raise ValueError(f"KV bits are of {', '.join(map(str, BITS))}, not {wanted}")
    caches = mlx_cache.make_prompt_cache(model)
    kinds = kinds_of(model, caches)
    bits = [(key_bits, value_bits)] * len(caches) if layers is None else list(layers)
    install()
    # mlx-lm's load_prompt_cache looks classes up by name there
    mlx_cache.CompressedKVCache = CompressedKVCache
    return [
        cache if kind is None or wanted is None else CompressedKVCache(*wanted, kind == "latent")
        for cache, kind, wanted in zip(caches, kinds, bits, strict=True)
    ]


def kinds_of(model: nn.Module, caches: Sequence[Any]) -> list[str | None]:
    """For each cache "full", "latent", or None where it is to stay as it is."""
    layers = getattr(model, "layers", [])
    if len(layers) != len(caches):  # which layer has which cache is not known
        return [None] * len(caches)
    return [
        _kind(layer) if type(cache) is mlx_cache.KVCache else None
        for layer, cache in zip(layers, caches, strict=True)
    ]


def _kind(layer: nn.Module) -> str | None:
    for module in layer.modules():
        code = getattr(type(module).__call__, "__code__", None)
        names = code.co_names if code else ()
        if "scaled_dot_product_attention" in names and "update_and_fetch" in names:
            return "latent" if "embed_q" in names else "full"
    return None
