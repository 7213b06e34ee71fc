"""The runtime's pool: it evicts the expert whose next use is expected to lie furthest ahead.

How often a router chooses an expert is remembered, an age of a row counting `DECAY`, whether
the expert is resident or not (LRFU, Lee et al. 2001: between least recently and least
frequently used). A share p of rows means 1/p rows to wait on average, from the next time that
the pass comes to the layer: sooner for the layers ahead of the one at hand than for those
just run. Least recently used evicts the layers ahead first, which come next, so that passes of
several rows on a small pool hit nothing.

    python -m tools.trace replay ROUTES       # beside the others
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .pool import SlotPool

DECAY = 0.96  # a row; .95 to .98 lie within half a point of hit rate of each other
NEVER = 1e-9  # share of rows of an expert that was not chosen yet
AGES = DECAY ** np.arange(512.0)  # what a row counts so many rows later


class Lrfu(SlotPool):
    """Evicts by recency and frequency. Costs a few NumPy operations a call, over the slots."""

    def __init__(self, slots: int, experts: Sequence[int]):
        super().__init__(slots, experts)
        ends = np.cumsum([0, *experts])
        self._parts = [slice(a, b) for a, b in pairwise(ends)]
        self._starts = ends[:-1]
        self._layer = np.repeat(np.arange(len(experts)), experts)  # of every expert
        self._heat = np.zeros(self.total)  # expected number of the last 1 / (1 - DECAY) rows
        self._heats = [self._heat[part] for part in self._parts]
        count = len(experts)  # turns[at][layer]: layers from `at` to the layer, of all
        steps = (np.arange(count) - np.arange(count)[:, None] - 1) % count + 1
        self._turns = steps / count
        self._held = np.full(slots, -1)  # which expert lies in a slot
        self._unused: dict[tuple[int, int], None] = {}
        self._expected: set[tuple[int, int]] = set()
        self._at = 0  # layer at hand

    def heat(self, layer: int) -> np.ndarray:
        """A view: the decayed number of rows that chose each expert of the layer."""
        return self._heats[layer]

    @property
    def plain(self) -> bool:
        """Nothing is expected: but for what is unused the order is that of heat and turns."""
        return not self._expected

    def even(self) -> None:
        """What is unused goes by heat and turns as well."""
        self._unused.clear()

    def arrays(self) -> dict[str, Any]:
        """What `kernels.native.ExpertCache` evicts by: these very arrays, and constants."""
        return {
            "heat": self._heat,
            "held": self._held,
            "turns": self._turns,
            "ages": AGES.tolist(),
            "share": 1 - DECAY,
            "never": NEVER,
        }

    def went(self, layer: int) -> None:
        """The pass has come to the layer, whose choice was told in `arrays`."""
        self._at = layer

    def chose(self, layer: int, ids: np.ndarray) -> None:
        heat, top_k = self._heats[layer], ids.shape[-1]
        rows = ids.size // top_k
        self._at = layer
        if rows == 1:  # the usual case, whose ids differ from one another
            heat *= DECAY
            heat[ids.reshape(-1)] += 1
            return
        ages = AGES if rows < len(AGES) else DECAY ** np.arange(rows + 1.0)
        weights = np.repeat(ages[:rows][::-1], top_k)
        heat *= ages[rows]
        heat += np.bincount(ids.reshape(-1), weights, minlength=len(heat))

    def chose_in_turn(self, layer: int, ids: np.ndarray) -> None:
        self._at = layer + len(ids) - 1
        self._heat[self._parts[layer].start : self._parts[self._at].stop] *= DECAY
        self._heat[self._starts[layer : self._at + 1, None] + ids] += 1

    def seed(self, layer: int, shares: np.ndarray) -> None:
        self.heat(layer)[:] = shares / (1 - DECAY)

    def touch(self, layer: int, experts: Iterable[int]) -> None:
        if self._unused or self._expected:
            for expert in experts:
                self._settle(layer, int(expert))

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        for expert in experts:
            self._settle(layer, int(expert))
            self._expected.add((layer, int(expert)))

    def expect_nothing(self) -> None:
        self._expected.clear()

    def unused(self, layer: int, expert: int) -> None:
        self._settle(layer, int(expert))
        self._unused[layer, int(expert)] = None

    def place(self, layer: int, expert: int, slot: int) -> None:
        super().place(layer, expert, slot)
        self._held[slot] = self._parts[layer].start + expert

    def evict(self, layer: int, expert: int) -> None:
        self._held[self.slot_of[layer][expert]] = -1
        self._settle(layer, int(expert))
        super().evict(layer, expert)

    def _settle(self, layer: int, expert: int) -> None:
        self._unused.pop((layer, expert), None)
        self._expected.discard((layer, expert))

    def victims(self, wanted: int | None = None) -> Iterator[tuple[int, int]]:
        yield from list(self._unused)
        keys = self._held[self._held >= 0]
        layers = self._layer[keys]
        share = np.maximum(self._heat[keys] * (1 - DECAY), NEVER)
        soon = -1 / share
        soon -= self._turns[self._at][layers]  # less is later
        count = len(keys) if wanted is None else wanted + len(self._unused) + len(self._expected)
        last: list[tuple[int, int]] = []
        for order in _least(soon, count):
            for key, layer in zip(keys[order].tolist(), layers[order].tolist(), strict=True):
                name = layer, key - self._parts[layer].start
                if name in self._expected:
                    last.append(name)
                elif name not in self._unused:
                    yield name
        yield from last


def _least(values: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Indices in ascending order, of equals the least first: `count` at least, then the others."""
    if count < len(values):
        first = np.flatnonzero(values <= np.partition(values, count)[count])
        yield first[np.argsort(values[first], kind="stable")]
        others = np.flatnonzero(values > values[first].max())
        yield others[np.argsort(values[others], kind="stable")]
    else:
        yield np.argsort(values, kind="stable")
