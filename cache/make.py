"""A model's caches with those compressed that can be.

Compressed: mlx-lm's KVCache of a layer whose attention goes through mlx-lm's function, and
DeepSeek's latent. Left as mlx-lm makes them: sliding windows (RotatingKVCache: short, and their
tokens are all recent), recurrent states, lists of caches, and layers with attention of their own
(gemma2's softcap).

    cache = make_cache(model, key_bits=3.5, value_bits=3.5)
    compress(model, 3.5); cache = mlx_lm.models.cache.make_prompt_cache(model)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from .attention import install
from .codebook import BITS
from .compressed import CompressedKVCache

ANY = 1 << 30  # rows
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
    caches = _plain(model)
    kinds = kinds_of(model, caches)
    bits = [(key_bits, value_bits)] * len(caches) if layers is None else list(layers)
    install()
    # mlx-lm's load_prompt_cache looks classes up by name there
    mlx_cache.CompressedKVCache = CompressedKVCache
    return [
        cache if kind is None or wanted is None else CompressedKVCache(*wanted, kind == "latent")
        for cache, kind, wanted in zip(caches, kinds, bits, strict=True)
    ]


def compress(model: nn.Module, bits: float) -> None:
    """Let `model` make compressed caches wherever it is asked for caches, mlx-lm's way."""
    model.make_cache = lambda: make_cache(model, bits, bits)


def most_rows(caches: Sequence[Any]) -> int:
    """The longest pass over `caches` whose rows all read what plain decoding would."""
    return min(map(_rows_alike, caches), default=ANY)


def _rows_alike(cache: Any) -> int:
    if isinstance(cache, CompressedKVCache):
        return cache.rows_alike
    if isinstance(cache, mlx_cache.RotatingKVCache) and cache.keep:
        # once it is full, mlx-lm's mask of several rows hides the tokens that it keeps
        return max(1, cache.max_size - cache.offset)
    return ANY


def _plain(model: nn.Module) -> list[Any]:
    """mlx-lm's caches of a model, whether or not it is to compress them."""
    made = getattr(type(model), "make_cache", None)
    return made(model) if made else [mlx_cache.KVCache() for _ in getattr(model, "layers", [])]


def kinds_of(model: nn.Module, caches: Sequence[Any]) -> list[str | None]:
    """For each cache "full", "latent", or None where it is to stay as it is."""
    kinds = [_kind(layer) for layer in getattr(model, "layers", [])]
    plain = [type(cache) is mlx_cache.KVCache for cache in caches]
    if len(kinds) != len(caches):  # nemotron_h has caches of some layers only
        known = iter([kind for kind in kinds if kind])
        if sum(plain) != sum(kind is not None for kind in kinds):
            return [None] * len(caches)  # which layer has which cache is not known
        kinds = [next(known) if one else None for one in plain]
    return [kind if one else None for kind, one in zip(kinds, plain, strict=True)]


def _kind(layer: nn.Module) -> str | None:
    for module in layer.modules():
        call = inspect.unwrap(type(module).__call__)
        code = getattr(call, "__code__", None)
        names = code.co_names if code else ()
        imported = "scaled_dot_product_attention" in getattr(call, "__globals__", {})
        if imported and {"scaled_dot_product_attention", "update_and_fetch"} <= set(names):
            return "latent" if "embed_q" in names else "full"
    return None
