"""Slot pools that evict otherwise than by age, to replay recordings on.

Each is a `streamer.pool.SlotPool` with another order of victims:

    lrfu     by recency, frequency and the layer's turn (the runtime's own: `streamer.lrfu`)
    lru      least recently used
    lfu      least often used since the start, the oldest of equals
    s3fifo   a small queue, a main queue and a ghost (Yang et al., SOSP 2023)
    belady   whose next use lies furthest ahead; needs the future, so an upper bound
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .lrfu import Lrfu
from .pool import SlotPool

Key = tuple[int, int]  # layer of the pool, expert
Future = Sequence[tuple[int, np.ndarray]]  # of each call: layer, distinct experts


class Lru(SlotPool):
    """An order over (layer, expert)."""

    def __init__(self, slots: int, experts: Sequence[int]):
        super().__init__(slots, experts)
        self._order: OrderedDict[Key, None] = OrderedDict()

    def touch(self, layer: int, experts: Iterable[int]) -> None:
        for expert in experts:
            self._order.move_to_end((layer, int(expert)))

    def victims(self, wanted: int | None = None) -> Iterator[Key]:
        return iter(self._order)

    def place(self, layer: int, expert: int, slot: int) -> None:
        super().place(layer, expert, slot)
        self._order[layer, int(expert)] = None

    def unused(self, layer: int, expert: int) -> None:
        self._order.move_to_end((layer, int(expert)), last=False)

    def evict(self, layer: int, expert: int) -> None:
        del self._order[layer, expert]
        super().evict(layer, expert)


class Lfu(Lru):
    """Counts of an expert outlive its stay."""

    def __init__(self, slots: int, experts: Sequence[int]):
        super().__init__(slots, experts)
        self._uses = [np.zeros(n, dtype=np.int64) for n in experts]

    def touch(self, layer: int, experts: Iterable[int]) -> None:
        experts = list(experts)
        super().touch(layer, experts)
        self._uses[layer][experts] += 1

    def place(self, layer: int, expert: int, slot: int) -> None:
        super().place(layer, expert, slot)
        self._uses[layer][expert] += 1

    def victims(self, wanted: int | None = None) -> Iterator[Key]:
        yield from sorted(super().victims(), key=lambda key: self._uses[key[0]][key[1]])


class S3Fifo(Lru):
    """small: a tenth of the slots, for newcomers; frequencies saturate at 3."""

    def __init__(self, slots: int, experts: Sequence[int]):
        super().__init__(slots, experts)
        self._target = max(1, slots // 10)
        self._small: deque[Key] = deque()
        self._main: deque[Key] = deque()
        self._ghost: OrderedDict[Key, None] = OrderedDict()
        self._freq: dict[Key, int] = {}

    def touch(self, layer: int, experts: Iterable[int]) -> None:
        experts = list(experts)
        super().touch(layer, experts)
        for expert in experts:
            key = (layer, int(expert))
            self._freq[key] = min(3, self._freq[key] + 1)

    def place(self, layer: int, expert: int, slot: int) -> None:
        super().place(layer, expert, slot)
        key = (layer, int(expert))
        self._freq[key] = 0
        if key in self._ghost:
            del self._ghost[key]
            self._main.append(key)
        else:
            self._small.append(key)

    def evict(self, layer: int, expert: int) -> None:
        super().evict(layer, expert)
        key = (layer, int(expert))
        del self._freq[key]
        if key in self._small:
            self._small.remove(key)
            self._ghost[key] = None
            while len(self._ghost) > self.slots:
                self._ghost.popitem(last=False)
        else:
            self._main.remove(key)

    def victims(self, wanted: int | None = None) -> Iterator[Key]:
        """Promotes and requeues as it goes; what is offered and not evicted comes again."""
        offered: set[Key] = set()
        while len(offered) < len(self._freq):
            small = len(self._small) > self._target or not self._main
            queue = self._small if small else self._main
            if all(key in offered for key in queue):
                queue = self._main if small else self._small
            key = queue.popleft()
            if key in offered or self._freq[key] == 0:
                queue.append(key)
                if key not in offered:
                    offered.add(key)
                    yield key
            elif queue is self._small:
                self._freq[key] = 0
                self._main.append(key)
            else:
                self._freq[key] -= 1
                self._main.append(key)


class Belady(Lru):
    """Follows `future`, call by call: `advance` before each of them."""

    def __init__(self, slots: int, experts: Sequence[int], future: Future):
        super().__init__(slots, experts)
        never = len(future) + 1
        self._next = [np.full(n, never, dtype=np.int64) for n in experts]
        self._after: list[np.ndarray] = []  # of each call: when its experts are used again
        for i, (layer, chosen) in reversed(list(enumerate(future))):
            self._after.append(self._next[layer][chosen].copy())
            self._next[layer][chosen] = i
        self._after.reverse()
        self._future, self._at = future, 0

    def advance(self) -> None:
        """The next call begins: its experts now count by their use after it."""
        layer, chosen = self._future[self._at]
        self._next[layer][chosen] = self._after[self._at]
        self._at += 1

    def victims(self, wanted: int | None = None) -> Iterator[Key]:
        yield from sorted(
            super().victims(), key=lambda key: self._next[key[0]][key[1]], reverse=True
        )


POLICIES: dict[str, Callable[[int, Sequence[int], Future], SlotPool]] = {
    "lrfu": lambda slots, experts, _: Lrfu(slots, experts),
    "lru": lambda slots, experts, _: Lru(slots, experts),
    "lfu": lambda slots, experts, _: Lfu(slots, experts),
    "s3fifo": lambda slots, experts, _: S3Fifo(slots, experts),
    "belady": Belady,
}
