"""Vectors as codes: rotate, scale, look up, pack; and back.

A vector of D channels becomes ceil(D / channels * width / 32) uint32 words and one float16 scale.
Indices lie one after another in a little-endian bit stream (bit i * width of the row is the lowest
of index i), the order of MLX's own packing. The scale is the least-squares one, <y, c> / <c, c>
for the rotated vector y and its points c, so that the error is orthogonal to what is stored.
Means are the caller's: see compressed.py.

    python -m tools.kv_table
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .codebook import CELLS, REACH, Codebook, of_bits
from .rotation import Rotation


class Codes(NamedTuple):
    """words [..., W] uint32 and scales [..., 1] float16 of vectors [..., D]."""

    words: mx.array
    scales: mx.array


@dataclass(frozen=True)
class Layout:
    """Where an index lies in a row of words."""

    words: int
    word: mx.array
    shift: mx.array
    next_word: mx.array
    next_shift: mx.array


class Codec:
    """Vectors of `dimension` channels at `bits` per channel."""

    def __init__(self, dimension: int, bits: float):
        if dimension % 2:
            raise ValueError(f"a head of {dimension} channels cannot be paired")
        self.dimension, self.bits = dimension, bits
        self.book: Codebook = of_bits(bits)
        self.rotation = Rotation.of(dimension)
        self.points = mx.array(self.book.points)
        self._nearest = mx.array(self.book.nearest)
        self.count = dimension // self.book.channels
        self.layout = _layout(self.count, self.book.width)

    @staticmethod
    @lru_cache
    def of(dimension: int, bits: float) -> Codec:
        """The codec of these, made once."""
        return Codec(dimension, bits)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored vector, its scale included."""
        return row_bytes(self.dimension, self.bits)

    def encode(self, x: mx.array) -> Codes:
        """x [..., D] of any float type."""
        y = self.rotation.forward(x)
        norm = mx.rsqrt(mx.maximum(mx.mean(y * y, axis=-1, keepdims=True), 1e-30))
        index = self._index(y * norm)
        c = self._look_up(index)
        scale = mx.sum(y * c, axis=-1, keepdims=True) / mx.sum(c * c, axis=-1, keepdims=True)
        return Codes(self._pack(index), mx.minimum(scale, 65504.0).astype(mx.float16))

    def rotated(self, codes: Codes) -> mx.array:
        """The vectors as they were coded, still rotated: float32 [..., D]."""
        return self.units(codes.words) * codes.scales.astype(mx.float32)

    def units(self, words: mx.array) -> mx.array:
        """Points of the codebook, before scales: float32 [..., D]."""
        return self._look_up(self._unpack(words))

    def decode(self, codes: Codes) -> mx.array:
        """The vectors in their own channels: float32 [..., D]."""
        return self.rotation.back(self.rotated(codes))

    def _index(self, z: mx.array) -> mx.array:
        if self.book.channels == 2:
            cell = mx.floor((z + REACH) * (CELLS / (2 * REACH)))
            cell = mx.clip(cell, 0, CELLS - 1).astype(mx.int32).reshape(*z.shape[:-1], -1, 2)
            return self._nearest[cell[..., 0] * CELLS + cell[..., 1]].astype(mx.uint32)
        index = mx.zeros(z.shape, mx.uint32)
        for step in (1 << b for b in reversed(range(self.book.width))):  # binary search
            index = mx.where(z > self._nearest[index + (step - 1)], index + step, index)
        return index

    def _look_up(self, index: mx.array) -> mx.array:
        return self.points[index].reshape(*index.shape[:-1], self.dimension)

    def _pack(self, index: mx.array) -> mx.array:
        width, place = self.book.width, self.layout
        low = index << place.shift
        # a shift by 32 is undefined, so the upper part goes in two steps
        high = (index >> 1) >> (31 - place.shift)
        words = []
        first = np.arange(self.count) * width // 32
        for w in range(place.words):
            mine = np.flatnonzero(first == w)
            part = mx.sum(low[..., int(mine[0]) : int(mine[-1]) + 1], axis=-1)
            if w and (before := np.flatnonzero(first == w - 1)).size:
                part = part + high[..., int(before[-1])]
            words.append(part)
        return mx.stack(words, axis=-1).astype(mx.uint32)

    def _unpack(self, words: mx.array) -> mx.array:
        place, width = self.layout, self.book.width
        low = words[..., place.word] >> place.shift
        if 32 % width:
            low = low | ((words[..., place.next_word] << 1) << place.next_shift)
        return low & ((1 << width) - 1)


def row_bytes(dimension: int, bits: float) -> int:
    """Bytes of one stored vector of `dimension` channels, its scale included."""
    return 4 * -(-int(dimension * bits) // 32) + 2


@lru_cache
def _layout(count: int, width: int) -> Layout:
    start = np.arange(count) * width
    words = -(-count * width // 32)
    word, shift = start // 32, start % 32
    return Layout(
        words,
        mx.array(word.astype(np.uint32)),
        mx.array(shift.astype(np.uint32)),
        mx.array(np.minimum(word + 1, words - 1).astype(np.uint32)),
        mx.array((31 - shift).astype(np.uint32)),
    )
