"""Affine group quantization with scales fitted by least squares instead of taken from min and max.

Each group starts from several clipped ranges; codes and (scale, bias) are then solved in turn, and
the pair with the smallest squared error stays. Weights only, no calibration data. The result is
MLX's own layout, so `mx.dequantize` and every stock kernel read it.

    python -m tools.train_demo export --raw raw --out demo     # quantizes the demo with it
"""

from __future__ import annotations

import mlx.core as mx

# Shares of the min-max range to start from; outliers are clipped where that lowers the error.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
ROUNDS = 4
SMALLEST = 1e-12


def quantize(
    weight: mx.array, *, bits: int, group_size: int
) -> tuple[mx.array, mx.array, mx.array]:
    """(codes, scales, biases) of `weight` [..., D], as `mx.quantize` lays them out.

    Codes are uint32 [..., D * bits / 32]; scales and biases float32 [..., D / group_size].
    bits must divide 32; D must be a multiple of group_size.
    """
    groups = weight.astype(mx.float32).reshape(-1, group_size)
    highest = 2**bits - 1
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    mean = groups.mean(-1, keepdims=True)
    scales, biases = mx.zeros_like(low), mean
    error = mx.full(low.shape, mx.inf)
    for share in RANGES:
        scale = mx.maximum((high - low) * (share / highest), SMALLEST)
        bias = (high + low - (high - low) * share) / 2
        for _ in range(ROUNDS):
            codes = _codes(groups, scale, bias, highest)
            scale, bias = _solve(groups, codes, mean, scale)
            found = ((codes * scale + bias - groups) ** 2).sum(-1, keepdims=True)
            better = found < error
            error = mx.where(better, found, error)
            scales, biases = mx.where(better, scale, scales), mx.where(better, bias, biases)
        mx.eval(error, scales, biases)
    codes = _codes(groups, mx.maximum(scales, SMALLEST), biases, highest)
    shape = (*weight.shape[:-1], weight.shape[-1] // group_size)
    return _pack(codes.reshape(weight.shape), bits), scales.reshape(shape), biases.reshape(shape)


def _codes(groups: mx.array, scale: mx.array, bias: mx.array, highest: int) -> mx.array:
    return mx.clip(mx.round((groups - bias) / scale), 0, highest)


def _solve(
    groups: mx.array, codes: mx.array, mean: mx.array, scale: mx.array
) -> tuple[mx.array, mx.array]:
    """The line through (codes, groups) with the least squared error; a flat group keeps `scale`."""
    middle = codes.mean(-1, keepdims=True)
    spread = ((codes - middle) ** 2).sum(-1, keepdims=True)
    slope = ((codes - middle) * (groups - mean)).sum(-1, keepdims=True) / mx.maximum(
        spread, SMALLEST
    )
    slope = mx.where(slope > SMALLEST, slope, scale)
    return slope, mean - slope * middle


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., D] to words, the first in the lowest bits."""
    per_word = 32 // bits
    shifts = mx.arange(per_word, dtype=mx.uint32) * bits
    words = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, per_word) << shifts
    return words.sum(-1).astype(mx.uint32)
