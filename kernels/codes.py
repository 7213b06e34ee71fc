"""Attention over codes by the C++ extension; the reference is `cache.attention.attend`.

One call does what cache/README.md asks of a kernel, the raw columns, mask and sinks included: each
coded token is unpacked once for all rows and for all query heads of its key head, a span of 1024
tokens at a time, and never written out. Sums are in float32; a row gives the same bits whatever
rows come with it. For float32 on the CPU, codes of 2 to 4 bits in pairs or of 8.

    python -m pytest tests/test_kernels_codes.py
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels import backend


class CodedSide(NamedTuple):
    """Keys or values of a layer, as cache/README.md lays them out.

    first, recent: [B, H, n, D] float32, as they came. words [B, H, capacity, W] uint32 and scales
    [B, H, capacity, 1] float16: codes. ahead_words, ahead_scales: those of the oldest m of recent,
    m 0 where no row reads them. points [2^width, channels] and mean [B, H, 1, D] float32.
    """

    first: mx.array
    recent: mx.array
    words: mx.array
    scales: mx.array
    ahead_words: mx.array
    ahead_scales: mx.array
    points: mx.array
    mean: mx.array


def available(dtype: mx.Dtype) -> bool:
    """Whether the kernel runs for arrays of this type on the default device."""
    return dtype == mx.float32 and backend.available()


def attend(
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
    key_signs: mx.array | None = None,
    value_signs: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Softmax attention over first tokens, codes and recent tokens, in that order.

    q [B, H, R, D] float32, times the scale, and the same rotated; R = groups * rows, row r of the
    pass's `rows` being r % rows. The first `coded` tokens of words count; rows from `crossing` on
    read the m ahead as codes. causal: the last row sees all columns S, each before it one less.
    bias [rows, S] or [B, H, R, S] is added to scores, sinks [H * groups] are logits without a
    value. Returns the values' sum in the rotated space and the part that isn't rotated, both
    [B, H, R, Dv]. Signs [D] float32 of a randomised Hadamard rotation: with key_signs q is rotated
    here and `rotated` isn't read, with value_signs the sum comes rotated back. Raises ValueError
    where shapes don't fit. Only where `available`.
    """
    native = backend.native()
    assert native is not None
    y, rest = native.attend_codes(
        q,
        rotated,
        list(keys),
        list(values),
        rows=rows,
        coded=coded,
        crossing=crossing,
        causal=causal,
        bias=bias,
        sinks=sinks,
        key_signs=key_signs,
        value_signs=value_signs,
    )
    return y, rest
