"""Which expert lies in which slot: the bookkeeping of a bounded pool.

Plain data, no arrays of weights and no disk: a stack of free slots and a slot table per layer.
One pool serves all layers whose experts have the same format. What is evicted first is for
subclasses to say: `streamer.lrfu` is the runtime's, `streamer.policies` has others.

    pool = Lru(slots=8, experts=[32] * 8)
    pool.place(0, 5, *pool.take(1))
    pool.slot_of[0][5]

The tables, counts and free slots are arrays that are never replaced, so that the extension can
keep them too (`streamer.serving`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class FreeSlots:
    """A stack of slots that hold nothing: all[:count[0]], the next to be taken last."""

    def __init__(self, slots: int):
        self.all = np.arange(slots - 1, -1, -1, dtype=np.int32)
        self.count = np.array([slots])

    def __len__(self) -> int:
        return int(self.count[0])

    def __iter__(self) -> Iterator[int]:
        return iter(self.all[: self.count[0]].tolist())

    def push(self, slot: int) -> None:
        self.all[self.count[0]] = slot
        self.count[0] += 1

    def pop(self) -> int:
        self.count[0] -= 1
        return int(self.all[self.count[0]])


class SlotPool(ABC):
    """`slots` slots shared by layers with `experts[layer]` experts each."""

    def __init__(self, slots: int, experts: Sequence[int]):
        self.slots = slots
        self.total = sum(experts)
        self.slot_of = [np.full(n, -1, dtype=np.int32) for n in experts]
        self.resident = np.zeros(len(experts), dtype=np.int64)  # experts, by layer
        self.free = FreeSlots(slots)

    def covers(self, layer: int) -> bool:
        """Every expert of the layer is resident."""
        return bool(self.resident[layer] == len(self.slot_of[layer]))

    def chose(self, layer: int, ids: np.ndarray) -> None:
        """A router chose ids [..., k], rows in order; told before the pool changes for them."""
        return

    def chose_in_turn(self, layer: int, ids: np.ndarray) -> None:
        """The routers of the layers from `layer` on chose ids [n, k], for one row."""
        for i, one in enumerate(ids, layer):
            self.chose(i, one)

    def seed(self, layer: int, shares: np.ndarray) -> None:
        """Expert e of the layer is chosen by shares[e] of rows, by what was seen elsewhere."""
        return

    @abstractmethod
    def touch(self, layer: int, experts: Iterable[int]) -> None:
        """Resident experts are used."""

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        """This pass is to use these resident experts later: they are the last to be evicted."""
        self.touch(layer, experts)

    def expect_nothing(self) -> None:
        """The pass is over."""
        return

    def take(self, n: int, keep: tuple[int, frozenset[int]] | None = None) -> list[int]:
        """Free `n` slots, evicting as `victims` says; the caller owns them.

        keep: (layer, experts) that must not be evicted. Raises ValueError when
        fewer than `n` slots can be had; nothing is evicted then.
        """
        short = n - len(self.free)
        if short > 0:
            victims: list[tuple[int, int]] = []
            for key in self.victims(short + (len(keep[1]) if keep else 0)):
                if len(victims) == short:
                    break
                if keep is None or key[0] != keep[0] or key[1] not in keep[1]:
                    victims.append(key)
            if len(victims) < short:
                raise ValueError(f"{n} slots asked of a pool of {self.slots}")
            for layer, expert in victims:
                self.evict(layer, expert)
        return [self.free.pop() for _ in range(n)]

    @abstractmethod
    def victims(self, wanted: int | None = None) -> Iterator[tuple[int, int]]:
        """Resident (layer, expert) in the order they are evicted.

        wanted: how many are likely to be looked at; None for all.
        """

    def place(self, layer: int, expert: int, slot: int) -> None:
        """`slot`, owned by the caller, now holds this expert, used just now."""
        self.slot_of[layer][expert] = slot
        self.resident[layer] += 1

    @abstractmethod
    def unused(self, layer: int, expert: int) -> None:
        """Nothing asked for this resident expert yet: it is the first to be evicted."""

    def evict(self, layer: int, expert: int) -> None:
        """Forget a resident expert; its slot is free."""
        self.free.push(int(self.slot_of[layer][expert]))
        self.slot_of[layer][expert] = -1
        self.resident[layer] -= 1

    def release(self, slots: Iterable[int]) -> None:
        """Give back slots that were taken and hold nothing worth keeping."""
        for slot in slots:
            self.free.push(slot)
