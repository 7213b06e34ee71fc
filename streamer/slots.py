"""The memory of a pool: one preallocated array per expert tensor, filled by reads.

Row `s` of every array is slot `s`. Reads land in NumPy views of the arrays'
own buffers, so a byte is copied once, by the kernel. The arrays are never
assigned to through MLX (that would copy the pool), and a slot may only be
refilled once everything that reads it has been evaluated.

Where a tensor is held wider than it is stored (see `streamer.held`), it is
read into a small buffer and widened on arrival.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kernels import pages

from .experts import ExpertFormat, LayerExperts, projections
from .ranges import Piece, Widening
from .trace import FILE_SHIFT

_OFFSET = (1 << FILE_SHIFT) - 1


class SlotArrays:
    """`slots` slots of one expert format."""

    def __init__(self, fmt: ExpertFormat, slots: int):
        self.format = fmt
        self.arrays: list[mx.array] = []
        self.rows: list[np.ndarray] = []  # uint8 [slots, held_bytes], same memory
        for tensor in fmt:
            raw = pages.zeros(slots, tensor.held_bytes)
            array = raw.view(tensor.held).reshape(slots, *tensor.shape)
            mx.eval(array)
            self.arrays.append(array)
            self.rows.append(np.array(raw, copy=False))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def pieces(
        self, layer: LayerExperts, expert: int, slot: int
    ) -> tuple[list[Piece], list[Widening]]:
        """Reads that fill `slot` with `expert`, and what to widen when they are done."""
        pieces, widen = [], []
        for tensor, starts, view in zip(layer.format, layer.starts, self.rows, strict=True):
            dest = view[slot].data
            if tensor.stored != tensor.held:
                out, dest = dest, np.empty(tensor.stored_bytes, dtype=np.uint8).data
                widen.append(Widening(dest, out, tensor.stored == mx.bfloat16))
            address = int(starts[expert])
            pieces.append(Piece(address >> FILE_SHIFT, address & _OFFSET, dest))
        return pieces, widen

    def bind(self, switch: nn.Module, slots: slice = slice(None)) -> nn.Module:
        """The switch with its stacked weights replaced by (those) slots of the pool.

        Call it with slots, or with experts where `slots` holds a layer's in order.
        """
        bound = copy.copy(switch)
        parts = [a[slots] for a in self.arrays] if slots != slice(None) else self.arrays
        mx.eval(parts)  # views of the pool, not copies
        arrays = {(t.projection, t.kind): a for t, a in zip(self.format, parts, strict=True)}
        for name, linear in projections(switch):
            held = copy.copy(linear)
            for kind in linear.parameters():
                if (name, kind) in arrays:
                    held[kind] = arrays[name, kind]
            bound[name] = held
        return bound
