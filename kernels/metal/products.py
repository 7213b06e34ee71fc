"""Quantized products of 1 to 16 rows on the GPU, with one matrix or with chosen experts.

Each weight is dequantized once for all rows (in lots of 16 where more chose one expert); sums are
fp32 and a row gives the same bits whatever rows come with it. Formats: affine 2, 3, 4, 5, 6, 8
bits, groups 32, 64, 128, and mxfp4; x float32, float16 or bfloat16. What isn't supported is the
caller's to give to the fallback: `fits` tells. Layouts are those of kernels.linear.

    python -m pytest tests/test_metal_kernels.py
"""

from __future__ import annotations

import mlx.core as mx

from kernels.experts import Stack

from .launch import Launch

FLOATS = (mx.float32, mx.bfloat16, mx.float16)
ROWS = 16  # of one launch: their sums stay in registers


def fits(x: mx.array, stack: Stack) -> bool:
    """Whether a kernel knows these types and this format."""
    if x.dtype not in FLOATS or stack.scales is None or stack.bias is not None:
        return False
    if stack.mode == "mxfp4":
        return stack.group_size == 32 and stack.bits == 4
    return (
        stack.mode == "affine"
        and stack.bits in (2, 3, 4, 5, 6, 8)
        and stack.group_size in (32, 64, 128)
        and stack.scales.dtype in FLOATS
        and stack.biases is not None
        and stack.biases.dtype == stack.scales.dtype
    )


def shape(sums: int, N: int) -> tuple[int, int]:
    """Outputs of a simdgroup and simdgroups of a threadgroup, for `sums` sums an output."""
    outs = 4 if sums <= 4 else 2 if sums <= 16 else 1
    return outs, 8 if N >= 4096 else 4


def arrays(stack: Stack) -> tuple[mx.array, mx.array, mx.array]:
    """Weights, scales and biases; mxfp4 has none of the last, and its kernel reads none."""
    assert stack.scales is not None
    return stack.w, stack.scales, stack.scales if stack.biases is None else stack.biases


def linear(launch: Launch, x: mx.array, stack: Stack) -> mx.array:
    """x [..., K] times w [N, K] transposed: [..., N] in x's dtype; at most 16 rows that `fits`."""
    N, K = stack.w.shape[0], x.shape[-1]
    M = x.size // K
    outs, simdgroups = shape(M, N)
    (y,) = launch(
        "linear",
        [x.reshape(M, K), *arrays(stack)],
        [
            ("T", x.dtype),
            *(("M", M), ("N", N), ("K", K), ("BITS", stack.bits), ("GROUP", stack.group_size)),
            *(("MXFP4", int(stack.mode == "mxfp4")), ("OUTS", outs), ("SIMDGROUPS", simdgroups)),
        ],
        (-(-N // (outs * simdgroups)), 1),
        32 * simdgroups,
        [((M, N), x.dtype)],
    )
    return y.reshape(*x.shape[:-1], N)


def pairs(
    launch: Launch, x: mx.array, slots: mx.array, one: Stack, two: Stack | None, dtype: mx.Dtype
) -> mx.array:
    """Rows x [P / per, K] with slots [P]: [P, N] of `dtype`, through `one`, or both as SwiGLU."""
    S, N = one.w.shape[:2]
    R, K = x.shape
    P = slots.size
    per = P // R
    lot = min(R if per > 1 else P, ROWS)
    outs, simdgroups = shape(lot * (1 if two is None else 2), N)
    (y,) = launch(
        "experts",
        [x, slots, *arrays(one), *arrays(one if two is None else two)],
        [
            ("T", dtype),
            *(("P", P), ("PER", per), ("LOT", lot), ("SLOTS", S), ("N", N), ("K", K)),
            *(("BITS", one.bits), ("GROUP", one.group_size), ("MXFP4", int(one.mode == "mxfp4"))),
            *(("FUSED", int(two is not None)), ("OUTS", outs), ("SIMDGROUPS", simdgroups)),
        ],
        (-(-N // (outs * simdgroups)), P),
        32 * simdgroups,
        [((P, N), dtype)],
    )
    return y


def gather_linear(launch: Launch, x: mx.array, slots: mx.array, stack: Stack) -> mx.array:
    """kernels.experts.gather_linear of what `fits`: [..., k, N], zeros where a slot is absent."""
    rows = x.reshape(x.size // x.shape[-1], x.shape[-1])
    flat = slots.reshape(slots.size).astype(mx.int32)
    y = pairs(launch, rows, flat, stack, None, x.dtype)
    return y.reshape(*slots.shape, y.shape[-1])


def gather_swiglu(
    launch: Launch, x: mx.array, slots: mx.array, gate: Stack, up: Stack, down: Stack
) -> mx.array:
    """kernels.experts.gather_swiglu of what `fits`; gate and up alike. The middle is fp32."""
    rows = x.reshape(x.size // x.shape[-1], x.shape[-1])
    flat = slots.reshape(slots.size).astype(mx.int32)
    hidden = pairs(launch, rows, flat, gate, up, mx.float32)
    y = pairs(launch, hidden, flat, down, None, x.dtype)
    return y.reshape(*slots.shape, y.shape[-1])
