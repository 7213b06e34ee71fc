"""Rotations that make a head's channels alike, so that one codebook fits them all.

A randomised Hadamard transform (random signs, then a fast orthonormal Hadamard) where the dimension
is a power of two, otherwise a seeded orthogonal matrix.
Both are fixed by the dimension alone, so nothing has to be stored. Products are in float32.

    y = Rotation.of(256).forward(x); x = Rotation.of(256).back(y)
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

SEED = 0x70617065  # data seeded alike would not be independent of the rotation


class Rotation:
    """An orthogonal map of the last axis, `dimension` long."""

    def __init__(self, dimension: int):
        self.dimension = dimension
        random = np.random.default_rng([SEED, dimension])
        self.signs: mx.array | None = None  # [D], of a Hadamard transform
        # of 12, 20 and 28 times a power of two MLX's transform is not its own inverse
        if dimension & (dimension - 1) == 0:
            self.signs = mx.array(random.choice([-1.0, 1.0], dimension), mx.float32)
        else:
            q, r = np.linalg.qr(random.standard_normal((dimension, dimension)))
            self._matrix = mx.array(q * np.sign(np.diag(r)), mx.float32)

    @staticmethod
    @lru_cache
    def of(dimension: int) -> Rotation:
        """The rotation of this dimension, made once."""
        return Rotation(dimension)

    def forward(self, x: mx.array) -> mx.array:
        """x [..., D] rotated, float32."""
        x = x.astype(mx.float32)
        if self.signs is None:
            return x @ self._matrix
        return mx.hadamard_transform(x * self.signs)

    def back(self, y: mx.array) -> mx.array:
        """The inverse of `forward`, float32."""
        y = y.astype(mx.float32)
        if self.signs is None:
            return y @ self._matrix.T
        return mx.hadamard_transform(y) * self.signs
