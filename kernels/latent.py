"""Latent attention (MLA) of several rows over the latents themselves, a block of rows at a time.

mlx-lm's models of DeepSeek's kind attend over the latents where a pass has one row. For more they
make the keys and values of every head from all latents that the cache holds, in every pass: of
GLM-4.7-Flash 20 x 448 numbers a token of context, 9 million multiply-adds, which a pass of two rows
pays like one of two thousand. They also make the scores of all rows at once.

Here every pass goes the way of one row: queries are taken to the latents' space (`embed_q`), the
latents are keys and values of all heads, and what comes out is taken back (`unembed_out`). The sums
are the same in another order. Rows whose scores would take more than `SCORES` go in blocks, one
after the other, as a prompt in shorter passes would, but for this layer alone. The models' code
stays mlx-lm's: `places` puts in what calls it by blocks, and a `Heads` for the keys and values of
all heads, which `kernels.fast.scaled_dot_product_attention` knows what to do with. What the cache
gives as positions multiplies by our kernel (`Positions`), for one row as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import mla

from . import backend
from .query_blocks import rows_at_once
from .weights import float32

SCORES = 32 << 20  # bytes of scores at once, copies included: blocks of 16 rows cost no time yet
# mlx-lm's attention whose cache holds latents and which scores positions apart from them
MODELS = {
    "bailing_hybrid": "MultiLatentAttention",
    "bailing_moe_v3": "BailingMLA",
    "deepseek_v3": "DeepseekV3Attention",
    "deepseek_v32": "DeepseekV32Attention",
    "glm4_moe_lite": "Glm4MoeLiteAttention",
    "kimi_k3": "KimiK3MLAAttention",
    "kimi_linear": "KimiMLAAttention",
    "longcat_flash": "LongcatFlashMLA",
}
INDEXED = frozenset({"deepseek_v32"})  # gathers latents and positions before it multiplies
_MULTI = {kind: kind.__call__ for kind in (mla.MultiLinear, mla.QuantizedMultiLinear)}
_originals: dict[type, Callable[..., mx.array]] = {}
_inside = 0  # calls of those layers under way


@dataclass(frozen=True)
class Heads:
    """What `layer` would make of latents for every head, not made.

    latents: [B, 1, S, rank], or what a cache gives that has an `attend` of its own.
    """

    latents: Any
    layer: nn.Module


@dataclass(frozen=True)
class Positions:
    """The position part `rows` of keys [B, 1, S, D], of which models only ask to be turned."""

    rows: mx.array

    def swapaxes(self, axis1: int, axis2: int) -> mx.array:
        """Of the last two."""
        turned = Turned(0.0)
        turned.rows = self.rows
        return turned


class Turned(mx.array):
    """`Positions` [B, 1, D, S]: q [B, H, T, D] @ it is [B, H, T, S].

    MLX's product on the CPU has one thread, and nothing says that a row's bits do not depend on
    how many come with it. Ours reads rows as they lie. An array, and of nothing, since an array's
    operators take arrays only and an array made of another is a copy.
    """

    rows: mx.array

    def __rmatmul__(self, q: mx.array) -> mx.array:
        keys = self.rows
        if keys.shape[0] > 1 or not backend.available() or not float32(q, keys):
            return mx.matmul(q, keys.swapaxes(-1, -2))
        native = backend.native()
        assert native is not None
        scores = native.linear(q.reshape(-1, q.shape[-1]), keys.reshape(-1, keys.shape[-1]))
        return scores.reshape(*q.shape[:-1], -1)  # type: ignore[no-any-return]


class _Cache:
    """A layer's cache that gives `Positions`."""

    def __init__(self, cache: Any):
        self._cache = cache

    def update_and_fetch(self, latents: mx.array, positions: mx.array) -> tuple[Any, Positions]:
        latents, positions = self._cache.update_and_fetch(latents, positions)
        return latents, Positions(positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def places() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement), of the families loaded so far."""
    found: list[tuple[Any, str, Any]] = [
        (kind, "__call__", _unmade(call)) for kind, call in _MULTI.items()
    ]
    for family, name in MODELS.items():
        module = sys.modules.get(f"mlx_lm.models.{family}")
        if module is not None:
            kind = getattr(module, name)
            call = _originals.setdefault(kind, kind.__call__)
            found.append((kind, "__call__", _blocked(call, family not in INDEXED)))
    return found


def replaced(model: nn.Module) -> bool:
    """Whether latent attention of `model` is run so."""
    names = {(f"mlx_lm.models.{family}", name) for family, name in MODELS.items()}
    return any((type(m).__module__, type(m).__qualname__) in names for m in model.modules())


def attend(
    attention: Callable[..., mx.array],
    q: mx.array,
    keys: Heads,
    values: Heads,
    *,
    scale: float,
    mask: mx.array | None,
    **options: Any,
) -> mx.array:
    """q [B, H, T, nope] over the latents of `keys` -> [B, H, T, Dv]; options: as `attention`'s."""
    q, latents = keys.layer(q), keys.latents
    if isinstance(latents, mx.array):
        y = attention(q, latents, values.latents, scale=scale, mask=mask, **options)
    else:
        y = latents.attend(q, scale, mask)
    return values.layer(y)  # type: ignore[no-any-return]


def inside() -> bool:
    """Whether the caller is latent attention of several rows, which is run so."""
    return _inside > 0


def rows_of(heads: int, keys: int) -> int:
    """Rows of a block over `keys` tokens."""
    return rows_at_once(heads, keys, SCORES)


@cache
def _unmade(call: Callable[..., mx.array]) -> Callable[..., Any]:
    """MultiLinear's call, but within latent attention latents of several rows stay as they are."""

    @wraps(call)
    def run(self: nn.Module, x: mx.array, transpose: bool = True) -> Any:
        latents = not isinstance(x, mx.array) or (x.ndim == 4 and x.shape[1] == 1)
        if _inside and latents and self["weight"].shape[0] > 1:
            return Heads(x, self)
        return call(self, x, transpose)

    return run


@cache
def _blocked(call: Callable[..., mx.array], positions: bool) -> Callable[..., mx.array]:
    """The attention's call, with latents left as they are, a block of rows at a time; positions:
    whether what the cache gives of them is multiplied and nothing else."""

    @wraps(call)
    def run(
        self: nn.Module, x: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        global _inside
        rows = x.shape[1]
        if cache is not None and positions:
            cache = _Cache(cache)
        if rows == 1:
            return call(self, x, mask, cache)
        array = isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] == rows
        keys = mask.shape[-1] if array else rows  # type: ignore[union-attr]
        block = rows_of(x.shape[0] * _heads(self), keys)
        _inside += 1
        try:
            if rows <= block or cache is None or not array:
                return call(self, x, mask, cache)
            before, outputs = keys - rows, []
            for first in range(0, rows, block):
                last = min(first + block, rows)
                part = mask[..., first:last, : before + last]  # type: ignore[index]
                outputs.append(call(self, x[:, first:last], part, cache))
                mx.eval(outputs[-1])
            return mx.concatenate(outputs, axis=1)
        finally:
            _inside -= 1

    return run


def _heads(layer: nn.Module) -> int:
    return int(layer["embed_q"]["weight"].shape[0])
