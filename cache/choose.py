"""Bits for each layer's keys and values from how far its attention logits spread.

Coding keys adds noise to the logits in proportion to their own spread, sigma (the deviation over
keys of q.k / sqrt(d)); coding values adds noise to the output whatever the spread. So the best
b_K - b_V is about log2(sigma), and a layer that attends to everything alike needs few key bits.
Errors are taken as sigma^2 4^-b_K + 4^-b_V per layer, and halves of a bit go where they help most.

    spread = measure(model, tokens); cache = make_cache(model, layers=choose(spread, 3.5))
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from .attention import install
from .make import LayerBits, kinds_of

STEPS = (2.0, 2.5, 3.0, 3.5, 4.0)


class _Listener(KVCache):
    """A full-precision cache that measures the logits of the pass over it."""

    spread: mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self._seen = super().update_and_fetch(keys, values)
        return self, self

    def attend(self, q: mx.array, scale: float, mask: Any, sinks: Any = None) -> mx.array:
        keys, values = self._seen
        B, _, T, D = q.shape
        late = q[:, :, T // 2 :].reshape(B, keys.shape[1], -1, D)  # these see half the keys or more
        logits = late.astype(mx.float32) @ keys[:, :, : T // 2].astype(mx.float32).swapaxes(-1, -2)
        self.spread = scale * mx.sqrt(mx.mean(mx.var(logits, axis=-1)))
        return mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=mask, sinks=sinks
        )


def measure(model: nn.Module, tokens: Sequence[int]) -> list[float | None]:
    """sigma of each cache's layer over `tokens` (some hundreds); None where it is not compressed.

    Layers of DeepSeek's kind, whose latent is keys and values at once, come out as 1.
    """
    caches = make_prompt_cache(model)
    kinds = kinds_of(model, caches)
    install()
    used = [
        _Listener() if kind == "full" else cache for kind, cache in zip(kinds, caches, strict=True)
    ]
    mx.eval(model(mx.array(list(tokens))[None], cache=used))
    return [
        float(cache.spread) if isinstance(cache, _Listener) else (1.0 if kind else None)
        for kind, cache in zip(kinds, used, strict=True)
    ]


def choose(spread: Sequence[float | None], average: float) -> list[LayerBits | None]:
    """Bits of keys and values by layer, `average` on the whole; None where spread is None.

    average 8 and more gives 8 everywhere. Raises ValueError below 2.
    """
    if average < STEPS[0]:
        raise ValueError(f"KV bits are 2 or more, not {average}")
    if average > STEPS[-1]:
        return [None if s is None else (8, 8) for s in spread]
    weights = {
        (layer, side): s * s if side == 0 else 1.0
        for layer, s in enumerate(spread)
        if s is not None
        for side in (0, 1)
    }
    bits = dict.fromkeys(weights, 0)  # indices into STEPS
    left = int((average - STEPS[0]) * 2 * len(weights) + 1e-6)

    def gain(key: tuple[int, int]) -> float:
        return weights[key] * (4 ** -STEPS[bits[key]] - 4 ** -STEPS[bits[key] + 1])

    queue = [(-gain(key), key) for key in weights]
    heapq.heapify(queue)
    while left and queue:
        _, key = heapq.heappop(queue)
        bits[key] += 1
        left -= 1
        if bits[key] + 1 < len(STEPS):
            heapq.heappush(queue, (-gain(key), key))
    return [
        None if s is None else (STEPS[bits[layer, 0]], STEPS[bits[layer, 1]])
        for layer, s in enumerate(spread)
    ]
