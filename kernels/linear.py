"""Quantized and dense linear layers for a few rows, on the CPU extension or MLX's own products.

One row or sixteen, each weight is read and dequantized once; a row gives the same bits whatever
rows come with it. fp32 activations and sums: other types of x are converted there and back.
Where the extension doesn't run, `linear` is `reference`.
Inference only: gradients are MLX's products' to give.

    python -m pytest tests/test_kernels_linear.py
"""

from __future__ import annotations

import mlx.core as mx

from . import backend

BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}
FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def reference(
    x: mx.array,
    w: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    *,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
) -> mx.array:
    """The same product by MLX alone; arguments and result as in `linear`."""
    if scales is None:
        return (x.astype(mx.float32) @ w.astype(mx.float32).T).astype(x.dtype)
    if x.size == 0:  # MLX divides by the number of rows
        return mx.zeros((*x.shape[:-1], w.shape[0]), x.dtype)
    # MLX wants scales of x's type: widening them is exact.
    wide = mode == "affine"
    y = mx.quantized_matmul(
        x.astype(mx.float32),
        w,
        scales.astype(mx.float32) if wide else scales,
        biases.astype(mx.float32) if wide and biases is not None else biases,
        transpose=True,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )
    return y.astype(x.dtype)


def supports(w: mx.array, scales: mx.array | None, *, bits: int, mode: str) -> bool:
    """Whether the extension runs here and knows these weights."""
    if not backend.available():
        return False
    if scales is None:
        return w.dtype in FLOATS
    return bits in BITS.get(mode, ()) and (mode != "affine" or scales.dtype in FLOATS)


def linear(
    x: mx.array,
    w: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    *,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
) -> mx.array:
    """x [..., K] times the transpose of w, lazily: [..., N] in x's dtype.

    w [N, K * bits / 32] uint32 with scales (and biases, when affine) [N, K / group_size], as
    mx.quantize gives them, or, without scales, w [N, K] float32, float16 or bfloat16.
    Raises ValueError where shapes don't fit.
    """
    if not supports(w, scales, bits=bits, mode=mode):
        return reference(x, w, scales, biases, group_size=group_size, bits=bits, mode=mode)
    native = backend.native()
    assert native is not None
    wide = x if x.dtype == mx.float32 else x.astype(mx.float32)
    y = native.linear(wide, w, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return y if x.dtype == mx.float32 else y.astype(x.dtype)
