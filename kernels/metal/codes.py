"""Attention over codes on the GPU: kernels.codes.attend, for Metal and CUDA.

Coded tokens are split into spans, each a threadgroup's, and merged by a second kernel. Each code is
unpacked once for all rows and query heads of its key head, where their sums fit one threadgroup
(SUMS, 64 rows of 512 channels, and ROWS). The few raw tokens, masks on them and sinks are MLX's.
Layouts are those of cache/README.md; bits 2, 2.5, 3, 3.5, 4 in pairs and 8. Sums are in float32.

    python -m pytest tests/test_metal_codes.py
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kernels.codes import CodedSide

from .launch import Launch

SPLITS = 128  # spans of a context, at most
SHORTEST = 128  # tokens of a span, at least, where there are as many
SUMS = 32768  # of a threadgroup, in its registers
ROWS = 128  # whose weights of a tile fit its memory, beside the tile and codebooks
LOWEST = float(np.finfo(np.float32).min)

Part = tuple[mx.array, mx.array, mx.array]  # sum [B, H, R, Dv], top and total [B, H, R, 1]


def shape(rows: int, channels: int) -> tuple[int, int]:
    """Rows and simdgroups of a threadgroup, for `rows` rows of so many channels."""
    blocks = max(-(-rows * channels // SUMS), -(-rows // ROWS))
    taken = -(-rows // blocks)
    return taken, 16 if taken * channels > SUMS // 2 else 8


def width(points: mx.array) -> int:
    """Bits of an index."""
    return (points.shape[0] - 1).bit_length()


def over_codes(
    launch: Launch,
    rotated: mx.array,
    keys: CodedSide,
    values: CodedSide,
    *,
    rows: int,
    coded: int,
    bias: mx.array | None = None,
) -> Part:
    """The first `coded` tokens of both words, one or more: scores without the keys' mean.

    rotated [B, H, R, D] float32, R a multiple of the pass's `rows`; bias [rows, coded] float32.
    """
    B, H, R, D = rotated.shape
    Dv, capacity = values.mean.shape[-1], keys.words.shape[2]
    taken, simdgroups = shape(R, Dv)
    blocks = -(-R // taken)
    span = 32 * max(SHORTEST // 32, -(-coded // (32 * SPLITS)))
    splits = -(-coded // span)
    sizes = mx.array([coded, capacity, span, splits], mx.int32)
    found = launch(
        "codes",
        [
            rotated,
            *(a for side in (keys, values) for a in (side.words, side.scales, side.points)),
            mx.zeros((1,)) if bias is None else bias,
            sizes,
        ],
        [
            *(("R", R), ("T", rows), ("ROWS", taken), ("BLOCKS", blocks), ("D", D), ("DV", Dv)),
            *(("KEY_WIDTH", width(keys.points)), ("KEY_CHANNELS", keys.points.shape[1])),
            *(("VALUE_WIDTH", width(values.points)), ("VALUE_CHANNELS", values.points.shape[1])),
            *(("BIASED", int(bias is not None)), ("SIMDGROUPS", simdgroups)),
        ],
        (splits, B * H * blocks),
        32 * simdgroups,
        [((B, H, splits, R, n), mx.float32) for n in (Dv, 1, 1)],
    )
    if splits > 1:
        found = launch(
            "codes_merge",
            [*found, sizes],
            [("R", R), ("DV", Dv), ("SPLITS", SPLITS), ("THREADS", 128)],
            (R, B * H),
            128,
            [((B, H, R, n), mx.float32) for n in (Dv, 1, 1)],
        )
    y, top, total = (a.reshape(B, H, R, -1) for a in found)
    return y, top, total


def reference(
    rotated: mx.array,
    keys: CodedSide,
    values: CodedSide,
    *,
    rows: int,
    coded: int,
    bias: mx.array | None = None,
) -> Part:
    """`over_codes` by MLX alone."""
    B, H, R, _ = rotated.shape
    s = rotated @ _vectors(keys, coded).swapaxes(-1, -2)
    if bias is not None:
        s = (s.reshape(B, H, -1, rows, coded) + bias).reshape(B, H, R, coded)
    return _summed(s, _vectors(values, coded))


def _vectors(side: CodedSide, coded: int) -> mx.array:
    """The first `coded` codes in the rotated space: [B, H, coded, D] float32."""
    bits, (_, channels) = width(side.points), side.points.shape
    words, D = side.words[:, :, :coded], side.mean.shape[-1]
    bit = np.arange(D // channels) * bits
    later = mx.array(np.minimum(bit // 32 + 1, words.shape[-1] - 1))
    low = words[..., mx.array(bit // 32)] >> mx.array((bit % 32).astype(np.uint32))
    high = (words[..., later] << 1) << mx.array((31 - bit % 32).astype(np.uint32))
    points = side.points[(low | high) & (2**bits - 1)]
    return points.reshape(*points.shape[:3], D) * side.scales[:, :, :coded].astype(mx.float32)


def _summed(s: mx.array, v: mx.array) -> Part:
    """Softmax of scores s [B, H, R, n] and its sum of v [B, H, n, Dv]."""
    s = mx.maximum(s, LOWEST)
    top = mx.max(s, axis=-1, keepdims=True)
    p = mx.exp(s - top)
    return p @ v, top, mx.sum(p, axis=-1, keepdims=True)


def attend(
    launch: Launch,
    q: mx.array,
    rotated: mx.array,
    keys: CodedSide,
    values: CodedSide,
    *,
    rows: int,
    coded: int,
    crossing: int = 0,
    causal: bool = False,
    bias: mx.array | None = None,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As kernels.codes.attend without signs, which says what goes in; raw tokens of any type.

    Raises ValueError where causal rows would not all be among the recent tokens.
    """
    _, H, R, _ = q.shape
    first, recent, ahead = keys.first.shape[2], keys.recent.shape[2], keys.ahead_words.shape[2]
    if causal and (coded or ahead) and recent < rows + ahead:
        raise ValueError(f"codes: {rows} rows, of which the {recent} recent tokens lack some")
    row = mx.arange(R) % rows
    lift = mx.sum(q * keys.mean, axis=-1, keepdims=True)
    parts: list[Part] = []

    def take(side: CodedSide, other: CodedSide, count: int, start: int, seen: mx.array) -> None:
        part = None if bias is None else mx.contiguous(bias[:, start : start + count])
        y, top, total = over_codes(launch, rotated, side, other, rows=rows, coded=count, bias=part)
        parts.append((y, mx.where(seen, top + lift, LOWEST), mx.where(seen, total, 0.0)))

    if coded:
        take(keys, values, coded, first, mx.array(True))
    if ahead:
        near = [s._replace(words=s.ahead_words, scales=s.ahead_scales) for s in (keys, values)]
        take(near[0], near[1], ahead, first + coded, (row >= crossing)[:, None])
    y, top, total = _raw(q, keys, values, row, rows, coded, crossing, causal, bias)
    highest = top
    if sinks is not None:
        sink = mx.repeat(sinks, rows).reshape(1, H, R, 1)
        highest = mx.maximum(highest, sink)
    for part in parts:
        highest = mx.maximum(highest, part[1])
    of_raw = mx.exp(top - highest)
    whole = of_raw * total
    if sinks is not None:
        whole = whole + mx.exp(sink - highest)
    shares = [mx.exp(part[1] - highest) for part in parts]
    mass = sum((s * part[2] for s, part in zip(shares, parts, strict=True)), mx.array(0.0))
    whole = whole + mass
    sums = [s * (part[2] > 0) * part[0] for s, part in zip(shares, parts, strict=True)]
    return sum(sums, mx.zeros_like(y)) / whole, (of_raw * y + mass * values.mean) / whole


def _raw(
    q: mx.array,
    keys: CodedSide,
    values: CodedSide,
    row: mx.array,
    rows: int,
    coded: int,
    crossing: int,
    causal: bool,
    bias: mx.array | None,
) -> Part:
    """The tokens that are as they came."""
    first, ahead = keys.first.shape[2], keys.ahead_words.shape[2]
    k, v = (
        mx.concatenate([side.first, side.recent], axis=2).astype(mx.float32)
        for side in (keys, values)
    )
    at = mx.arange(k.shape[2])
    s = q @ k.swapaxes(-1, -2)
    if bias is not None:
        near = mx.concatenate([bias[:, :first], bias[:, first + coded :]], axis=1)
        s = s + near[row]
    hidden = (at >= first) & (at < first + ahead) & (row >= crossing)[:, None]
    if causal:
        hidden = hidden | (at > k.shape[2] - rows + row[:, None])
    y, top, total = _summed(mx.where(hidden, LOWEST, s), v)
    return y, top, total
