"""The (row, choice) pairs of a call to the experts, computed group by group.

pairs = Pairs(x, ids)
outputs = [pairs.run(inner, table, group) for group in groups]
y = pairs.join(outputs, np.concatenate(groups))
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Pairs:
    """The (row, choice) pairs of a call, computed in any grouping and put back."""

    def __init__(self, x: mx.array, ids: np.ndarray):
        self._x = x.reshape(-1, x.shape[-1])
        self._ids = ids.reshape(-1)
        self._k = ids.shape[-1]
        self._shape = (*ids.shape, -1)

    def run(self, inner: nn.Module, table: np.ndarray, pairs: np.ndarray) -> mx.array:
        """Outputs [len(pairs), D] of the pairs, whose experts lie in table[expert]."""
        x = self._x[mx.array(pairs // self._k)]
        return inner(x, mx.array(table[self._ids[pairs]])[:, None])[:, 0]

    def join(self, outputs: list[mx.array], order: np.ndarray) -> mx.array:
        """[..., k, D] from outputs that stand in `order`."""
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return mx.concatenate(outputs)[mx.array(back)].reshape(self._shape)
