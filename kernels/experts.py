"""Products of rows with the experts that they chose, over slots of stacked weights.

Each expert's weights are read once for all rows that chose it, in whatever order the rows come; a
pair of row and expert gives the same bits whatever pairs come with it. A slot of -1 stands for an
expert that is absent and gives zeros. fp32 sums, as in kernels.linear; inference only.

    python -m pytest tests/test_kernels_experts.py
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from . import backend
from .linear import supports


@dataclass(frozen=True)
class Stack:
    """Weights of all slots: w [S, N, ...] and its quantization, as in kernels.linear.

    bias [S, N], where there is one, is added to the product.
    """

    w: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @staticmethod
    def of(layer: nn.Module) -> Stack:
        """The arrays of a layer that has mlx-lm's names for them; nothing is copied."""
        scales = layer.get("scales")
        return Stack(
            w=layer["weight"],
            scales=scales,
            biases=layer.get("biases"),
            bias=layer.get("bias"),
            group_size=layer.group_size if scales is not None else 64,
            bits=layer.bits if scales is not None else 4,
            mode=layer.mode if scales is not None else "affine",
        )

    @property
    def supported(self) -> bool:
        """Whether the extension runs here and knows these weights."""
        return supports(self.w, self.scales, bits=self.bits, mode=self.mode)

    @property
    def arrays(self) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """Weight, scales, biases: what a product reads."""
        return self.w, self.scales, self.biases

    def alike(self, other: Stack) -> bool:
        """Whether both are quantized in the same way."""
        mine = (self.group_size, self.bits, self.mode, self.scales is None)
        return mine == (other.group_size, other.bits, other.mode, other.scales is None)


def gather_reference(x: mx.array, slots: mx.array, stack: Stack) -> mx.array:
    """The same product by MLX alone; arguments and result as in `gather_linear`."""
    if x.size == 0:  # MLX divides by the number of rows
        return mx.zeros((*slots.shape, stack.w.shape[1]), x.dtype)
    paired = x.ndim == slots.ndim + 1
    wide = x.astype(mx.float32)[..., None, :]
    wide = wide if paired else wide[..., None, :]
    present = mx.logical_and(slots >= 0, slots < stack.w.shape[0])
    chosen = mx.where(present, slots, 0)
    if stack.scales is None:
        y = mx.gather_mm(wide, stack.w.astype(mx.float32).swapaxes(-1, -2), rhs_indices=chosen)
    else:
        affine = stack.mode == "affine"
        y = mx.gather_qmm(
            wide,
            stack.w,
            stack.scales.astype(mx.float32) if affine else stack.scales,
            None if stack.biases is None else stack.biases.astype(mx.float32),
            rhs_indices=chosen,
            transpose=True,
            group_size=stack.group_size,
            bits=stack.bits,
            mode=stack.mode,
        )
    y = y.squeeze(-2)
    if stack.bias is not None:
        y = y + stack.bias[chosen]
    return mx.where(present[..., None], y, 0).astype(x.dtype)


def flattened(x: mx.array, slots: mx.array) -> tuple[mx.array, mx.array]:
    """Rows [R, K] in float32 and slots [P] in int32."""
    rows = x.reshape(x.size // x.shape[-1], x.shape[-1])
    return rows.astype(mx.float32), slots.reshape(slots.size).astype(mx.int32)


def gather_linear(x: mx.array, slots: mx.array, stack: Stack) -> mx.array:
    """x @ stack[slot].T for each slot, lazily: [..., k, N] in x's dtype, zeros where absent.

    slots [..., k] integers. x is [..., K], one row for its k slots, or [..., k, K], a row for
    each. Raises ValueError where shapes don't fit.
    """
    native = backend.native()
    if native is None or not stack.supported:
        return gather_reference(x, slots, stack)
    rows, flat = flattened(x, slots)
    y = native.gather_linear(
        rows, flat, stack.arrays, group_size=stack.group_size, bits=stack.bits, mode=stack.mode
    )
    if stack.bias is not None:
        absent = mx.logical_or(flat < 0, flat >= stack.w.shape[0])
        y = mx.where(absent[:, None], 0, y + stack.bias[mx.where(absent, 0, flat)])
    return y.reshape(*slots.shape, y.shape[-1]).astype(x.dtype)


def swiglu_reference(x: mx.array, slots: mx.array, gate: Stack, up: Stack, down: Stack) -> mx.array:
    """The same experts by MLX alone; arguments and result as in `gather_swiglu`."""
    g = gather_reference(x, slots, gate)
    return gather_reference(nn.silu(g) * gather_reference(x, slots, up), slots, down)


def gather_swiglu(x: mx.array, slots: mx.array, gate: Stack, up: Stack, down: Stack) -> mx.array:
    """down(silu(gate(x)) * up(x)) for each slot of each row, in one primitive.

    x [..., D] and slots [..., k] give [..., k, D] in x's dtype, zeros where a slot is absent.
    """
    stacks = (gate, up, down)
    fused = all(s.supported and s.bias is None and s.alike(gate) for s in stacks)
    native = backend.native()
    if native is None or not fused:
        g, u = gather_linear(x, slots, gate), gather_linear(x, slots, up)
        return gather_linear(nn.silu(g) * u, slots, down)
    y = native.gather_swiglu(
        *flattened(x, slots),
        *(s.arrays for s in stacks),
        group_size=gate.group_size,
        bits=gate.bits,
        mode=gate.mode,
    )
    return y.reshape(*slots.shape, y.shape[-1]).astype(x.dtype)
