"""The (row, choice) pairs of a call to the experts, computed group by group.

groups = Groups(inner, x, ids, slots)
for experts in arriving: groups.add(experts)
y = groups.join()

Our kernels give zeros where a slot is -1, so that groups are whole calls that add up: a
value and zeros are the value. Elsewhere `Pairs` picks the rows of each group and puts the
results back. Both give the bits of one call over all.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import switch_layers

from kernels import routed

AT_ONCE = 1 << 20  # numbers of a join that may wait to be evaluated


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
        """[..., k, D] from `outputs` that stand in `order`; the list is empty then."""
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        y = mx.concatenate(outputs)
        if y.size > AT_ONCE:  # three copies of a long prompt's rows otherwise
            mx.eval(y)
        outputs.clear()
        return y[mx.array(back)].reshape(self._shape)


class Groups:
    """y [..., k, D] of a call to few rows, computed as its experts arrive."""

    def __init__(self, inner: nn.Module, x: mx.array, ids: np.ndarray, table: np.ndarray):
        """x [..., D], ids [..., k]; table: expert -> slot, as it will be once all are there."""
        self._inner, self._x, self._ids, self._table = inner, x, ids, table
        self._flat: list[int] = ids.reshape(-1).tolist()
        self._kernel = projections(inner)
        self._pairs: Pairs | None = None
        self._outputs: list[mx.array] = []
        self._order: list[np.ndarray] = []

    def add(self, experts: Collection[int]) -> None:
        """Compute `experts`, which are in their slots now."""
        y = None
        if self._kernel is not None:
            chosen = [e if e in experts else -1 for e in self._flat]
            slots = np.array([-1 if e < 0 else self._table[e] for e in chosen], dtype=np.int32)
            y = routed.fused(self._x, mx.array(slots.reshape(self._ids.shape)), self._kernel)
        if y is None:
            self._kernel = None
            self._pairs = self._pairs or Pairs(self._x, self._ids)
            order = np.array([i for i, e in enumerate(self._flat) if e in experts])
            self._order.append(order)
            y = self._pairs.run(self._inner, self._table, order)
        mx.async_eval(y)
        self._outputs.append(y)

    def know(self, y: mx.array) -> None:
        """What our kernel gave for some of the experts, zeros elsewhere."""
        self._outputs.append(y)

    def join(self) -> mx.array:
        if self._pairs is not None:
            return self._pairs.join(self._outputs, np.concatenate(self._order))
        y = self._outputs[0]
        for more in self._outputs[1:]:
            y = y + more
        return y


def projections(switch: Any) -> tuple[nn.Module, ...] | None:
    """gate, up and down of a switch that our kernels run as one, where they run at all."""
    kind = type(switch)
    if kind is not switch_layers.SwitchGLU or kind.__call__ is not routed.switch:
        return None
    if type(switch.activation) is not switch_layers.SwiGLU:
        return None
    return switch["gate_proj"], switch["up_proj"], switch["down_proj"]
