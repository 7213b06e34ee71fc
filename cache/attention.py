"""Attention over codes, and the place where mlx-lm's models come to it.

mlx-lm's models import `scaled_dot_product_attention` by name and hand it what the cache returned.
`install` replaces that function in every module that has it by one that passes arrays on to the
original and lets a `View` attend for itself. It does so once a process and changes nothing for
other caches.

Up to ROWS rows, the query is rotated once, scores come from codes (unpacked once for all rows and
for all query heads of a key head), values are summed in the rotated space and rotated back once:
in float32 on the CPU by `kernels.codes`, on a GPU by `kernels.metal.codes` where it passes its
check, otherwise in MLX, CHUNK tokens at a time, which is also the kernels' reference. Longer
passes, a prompt's, decode this layer and use MLX's fused attention.
Sums are in float32. The layout that a kernel reads is in README.md.

    python -m tools.kv_speed --contexts 8192
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models import base

from kernels import codes, gpu
from kernels.metal import codes as metal_codes

from .codec import Codes
from .side import BLOCK, Side

if TYPE_CHECKING:
    from .compressed import CompressedKVCache

ROWS = 16  # a verify pass has at most as many
CHUNK = 4096  # coded tokens unpacked at a time
LOWEST = mx.finfo(mx.float32).min

_original: Callable[..., mx.array] = base.scaled_dot_product_attention


def install() -> None:
    """Let mlx-lm's models attend through views. Modules imported later get it from base."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("scaled_dot_product_attention") is _original:
            module.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's, which also takes views as keys."""
    if hasattr(keys, "attend"):
        return keys.attend(queries, scale, mask, sinks)
    return _original(queries, keys, values, cache, scale, mask, sinks)


class View:
    """What one pass of `rows` rows may read of a cache.

    From row `crossing` on, if not 0, one block more is read as codes: there plain decoding
    would have coded it.
    """

    def __init__(self, cache: CompressedKVCache, rows: int, crossing: int):
        self.cache, self.crossing = cache, crossing

    @property
    def dtype(self) -> mx.Dtype:
        """Of the rows that come in."""
        assert self.cache.keys.first is not None
        return self.cache.keys.first.dtype

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """queries [B, heads, T, D] -> [B, heads, T, Dv] in their type; as mlx-lm's function."""
        keys, values = self.cache.keys, self.cache.values
        if self.cache.latent:
            values = keys
        T = queries.shape[2]
        if T > ROWS:
            k, v = keys.dense(), values.dense()
            out = mx.fast.scaled_dot_product_attention(
                queries, k, v, scale=scale, mask=mask, sinks=sinks
            )
            self.cache.commit()
            return out
        if by_kernel(queries, keys, values, mask):
            return attend_by_kernel(queries, keys, values, scale, mask, sinks, self.crossing)
        whole = as_array(mask, T, self.cache.offset)
        if not self.crossing:
            return attend(queries, keys, values, scale, whole, sinks)
        c = self.crossing
        parts = [
            attend(
                queries[:, :, rows],
                keys,
                values,
                scale,
                None if whole is None else whole[..., rows, :],
                sinks,
                ahead,
            )
            for rows, ahead in ((slice(0, c), 0), (slice(c, T), BLOCK))
        ]
        return mx.concatenate(parts, axis=2)


def by_kernel(queries: mx.array, keys: Side, values: Side, mask: mx.array | str | None) -> bool:
    """Whether `attend_by_kernel` takes these."""
    if keys.recent is None or values.recent is None or not keys.bits * values.bits:
        return False
    shared = not isinstance(mask, mx.array) or mask.size == mask.shape[-1] * queries.shape[2]
    if keys.recent.dtype == mx.float32 and codes.available(queries.dtype):
        return shared or mask.shape[:-1] == queries.shape[:-1]  # type: ignore[union-attr]
    return shared and gpu.uses("codes")


def attend_by_kernel(
    queries: mx.array,
    keys: Side,
    values: Side,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    crossing: int,
) -> mx.array:
    """As `View.attend`, by a kernel: rows from `crossing` on, if not 0, read a block ahead."""
    B, heads, T, D = queries.shape
    k, v = as_kernel_side(keys, crossing), as_kernel_side(values, crossing)
    q = (queries * scale).astype(mx.float32).reshape(B, k.recent.shape[1], -1, D)
    bias = None
    if isinstance(mask, mx.array):
        shared = mask.size == mask.shape[-1] * T
        bias = mask.reshape(T, -1) if shared else mask.reshape(*q.shape[:3], -1)
        bias = mx.where(bias, 0.0, LOWEST) if bias.dtype == mx.bool_ else bias.astype(mx.float32)
    turn, back = keys.codec.rotation, values.codec.rotation
    options: dict[str, Any] = {
        "rows": T,
        "coded": keys.coded,
        "crossing": crossing,
        "bias": bias,
        "causal": isinstance(mask, str),
        "sinks": None if sinks is None else sinks.astype(mx.float32),
    }
    if codes.available(queries.dtype):
        rotated = q if turn.signs is not None else turn.forward(q)
        options |= {"key_signs": turn.signs, "value_signs": back.signs}
        y, rest = codes.attend(q, rotated, k, v, **options)
        y = y if back.signs is not None else back.back(y)
    else:
        y, rest = metal_codes.attend(gpu.launch(), q, turn.forward(q), k, v, **options)
        y = back.back(y)
    return (y + rest).astype(queries.dtype).reshape(B, heads, T, -1)


def as_kernel_side(side: Side, crossing: int) -> codes.CodedSide:
    """`side` as the kernel takes it."""
    assert side.recent is not None
    B, H, _, D = side.recent.shape
    first = side.recent[:, :, :0] if side.first is None else side.first
    coded = none = _no_codes(B, H, side.codec.layout.words)
    if side.words is not None and side.scales is not None:
        coded = Codes(side.words, side.scales)
    ahead = side.ahead(BLOCK) if crossing else none
    mean = side.centre() if side.coded or crossing else mx.zeros((B, H, 1, D))
    return codes.CodedSide(first, side.recent, *coded, *ahead, side.codec.points, mean)


@lru_cache
def _no_codes(B: int, H: int, words: int) -> Codes:
    """Codes of no tokens."""
    return Codes(mx.zeros((B, H, 0, words), mx.uint32), mx.zeros((B, H, 0, 1), mx.float16))


def as_array(mask: mx.array | str | None, rows: int, columns: int) -> mx.array | None:
    """As an array [..., rows, columns], bool or added to the scores."""
    if not isinstance(mask, str):
        return mask
    return mx.arange(columns) <= mx.arange(columns - rows, columns)[:, None]


def attend(
    queries: mx.array,
    keys: Side,
    values: Side,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None = None,
    ahead: int = 0,
) -> mx.array:
    """Attention of a few rows over both sides; `ahead` of the newest tokens are read as codes.

    queries [B, Hq, T, D]; mask [..., T, S] bool or additive; sinks [Hq]. Returns [B, Hq, T, Dv].
    """
    B, heads, T, D = queries.shape
    source = keys.first if keys.first is not None else keys.recent
    assert source is not None
    H = source.shape[1]
    q = (queries * scale).astype(mx.float32).reshape(B, H, heads // H * T, D)
    scores = mx.concatenate(_scores(q, keys, ahead), axis=-1)
    S = scores.shape[-1]
    scores = scores.reshape(B, heads, T, S)
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, LOWEST)
        else:
            scores = scores + mask.astype(mx.float32)
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, heads, 1, 1), (B, heads, T, 1))
        scores = mx.concatenate([column, scores], axis=-1)
    p = mx.softmax(scores, axis=-1, precise=True)
    if sinks is not None:
        p = p[..., 1:]
    out = _weighted(p.reshape(B, H, -1, S), values, ahead)
    return out.reshape(B, heads, T, -1).astype(queries.dtype)


def _scores(q: mx.array, side: Side, ahead: int) -> list[mx.array]:
    """q [B, H, R, D] against the columns of `side`, in their order."""
    parts = []
    if side.first is not None:
        parts.append(q @ side.first.astype(mx.float32).swapaxes(-1, -2))
    if side.coded or ahead:
        rotated = side.codec.rotation.forward(q)
        lift = q @ side.centre().swapaxes(-1, -2)  # raw columns are not centred
        for part in _coded(side, ahead):
            s = rotated @ side.codec.units(part.words).swapaxes(-1, -2)
            parts.append(s * part.scales.astype(mx.float32).swapaxes(-1, -2) + lift)
    if side.recent is not None and side.recent_length:
        parts.append(q @ side.recent[..., ahead:, :].astype(mx.float32).swapaxes(-1, -2))
    return parts


def _weighted(p: mx.array, side: Side, ahead: int) -> mx.array:
    """Sum of the columns of `side` by weights p [B, H, R, S]: [B, H, R, D] float32."""
    at = side.first_length
    parts = []
    if side.first is not None:
        parts.append(p[..., :at] @ side.first.astype(mx.float32))
    if side.coded or ahead:
        start = at
        sums = []
        for part in _coded(side, ahead):
            end = at + part.words.shape[2]
            w = p[..., at:end] * part.scales.astype(mx.float32).swapaxes(-1, -2)
            sums.append(w @ side.codec.units(part.words))
            at = end
        mass = mx.sum(p[..., start:at], axis=-1, keepdims=True)
        parts.append(side.codec.rotation.back(sum(sums[1:], sums[0])) + mass * side.centre())
    if side.recent is not None and side.recent_length:
        parts.append(p[..., at:] @ side.recent[..., ahead:, :].astype(mx.float32))
    return sum(parts[1:], parts[0])


def _coded(side: Side, ahead: int) -> list[Codes]:
    """The codes, CHUNK tokens at a time, and those of the block ahead."""
    chunks = [
        side.codes(start, min(start + CHUNK, side.coded)) for start in range(0, side.coded, CHUNK)
    ]
    return [*chunks, side.ahead(ahead)] if ahead else chunks
