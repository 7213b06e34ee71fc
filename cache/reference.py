"""The paper's codecs, to measure ours against: Lloyd-Max, with and without QJL.

TurboQuant (arXiv 2504.19874): rotate, divide by the norm, round each channel to the Lloyd-Max
levels of N(0, 1/D), keep the norm in 16 bits. With QJL one bit less goes to the levels, and the
signs of a Gaussian sketch of the residual, with its norm, make inner products unbiased.
Mixed bits: half of the rotated channels get one bit more. Nothing here is packed or fast.

    python -m tools.kv_table
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from .codebook import lloyd_max
from .rotation import Rotation


def stored_bits(dimension: int, bits: float, qjl: bool = False) -> float:
    """Bits per channel with 16-bit norms."""
    return bits + (2 if qjl else 1) * 16 / dimension


def decode(x: mx.array, bits: float) -> mx.array:
    """x [..., D] as the Lloyd-Max codec gives it back, float32."""
    rotation = Rotation.of(x.shape[-1])
    return rotation.back(_rounded(rotation.forward(x), bits))


def decode_qjl(x: mx.array, bits: float) -> mx.array:
    """The vector whose inner products are the QJL variant's estimates: [..., D] float32."""
    D = x.shape[-1]
    rotation = Rotation.of(D)
    y = rotation.forward(x)
    c = _rounded(y, bits - 1)
    residual = y - c
    sketch = mx.array(np.random.default_rng([7, D]).standard_normal((D, D)), mx.float32)
    signs = mx.where(residual @ sketch.T >= 0, 1.0, -1.0)
    norm = mx.linalg.norm(residual, axis=-1, keepdims=True).astype(mx.float16)
    return rotation.back(c + math.sqrt(math.pi / 2) / D * norm * (signs @ sketch))


def _rounded(y: mx.array, bits: float) -> mx.array:
    """Rotated vectors y at their levels; the lower half of the channels has the extra bit."""
    D = y.shape[-1]
    unit = mx.linalg.norm(y, axis=-1, keepdims=True).astype(mx.float16) / math.sqrt(D)
    z = y / mx.maximum(unit.astype(mx.float32), 1e-30)
    low = int(bits)
    parts = [z] if low == bits else [z[..., : D // 2], z[..., D // 2 :]]
    widths = [low] if low == bits else [low + 1, low]
    return unit * mx.concatenate(
        [_nearest(part, b) for part, b in zip(parts, widths, strict=True)], axis=-1
    )


def _nearest(z: mx.array, bits: int) -> mx.array:
    if bits == 0:
        return mx.zeros_like(z)
    book = lloyd_max(bits)
    index = mx.sum(z[..., None] > mx.array(book.nearest), axis=-1)
    return mx.array(book.points[:, 0])[index]
