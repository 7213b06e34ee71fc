"""Which of a group's experts are in memory, which are on their way, and what that has cost.

Layers of one expert format share a pool of slots. `bring` is what a call of a few rows does:
it says which of its experts are there and begins to read the others, straight into slots that
are theirs at once. Guesses are read ahead into slots of their own (`streamer.ahead`).

A slot is refilled only after all that may still read it has been evaluated (`settle`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .ahead import ReadAhead, Reading
from .counters import Counters
from .errors import StreamerError
from .experts import LayerExperts, stored_bytes
from .foresee import Foresight
from .lrfu import Lrfu
from .pool import SlotPool
from .slots import SlotArrays
from .store import Store
from .watch import Watch
from .ways import Pace

DECODE_PAIRS = 256  # a call with more (row, expert) pairs is a prefill
WAVE_BYTES = 512 << 10  # absent experts are waited for by this much
MAX_UNREAD = 256  # calls of covered layers whose choices wait to be counted
Parts = list[tuple[list[int], Reading]]  # experts, by what reads them
T = TypeVar("T")


class Residency:
    """The pool of one expert format, the slots' memory and the reads that fill it."""

    def __init__(
        self, layers: Sequence[LayerExperts], slots: int, store: Store, counters: Counters
    ):
        self.layers = list(layers)
        self.pool: SlotPool = Lrfu(slots, [layer.count for layer in layers])
        self.arrays = SlotArrays(layers[0].format, slots)
        self.counters = counters
        self.ahead = ReadAhead(self.pool)
        self.fresh: set[tuple[int, int]] = set()  # read ahead, resident, not yet asked for
        ends = np.cumsum([0, *(layer.count for layer in layers)])
        self._starts = ends[:-1]  # of layers, among all experts
        self.all_uses = np.zeros(ends[-1], dtype=np.int64)
        self.uses = np.split(self.all_uses, ends[1:-1])  # of each layer's experts, by pairs
        self.watch: Watch | None = None
        self.numbers: Sequence[int] = range(len(self.layers))  # of the layers, in the model
        self.pace = Pace()
        self.foresight: Foresight | None = None  # where something guesses
        self.holder: Any = None  # the extension's cache: between passes its guesses hold slots
        self.expert_bytes = stored_bytes(layers[0].format)
        self.wave = max(1, -(-WAVE_BYTES // self.expert_bytes))  # experts waited for together
        self.store = store
        self._tables: dict[int, mx.array] = {}  # of layers: expert -> slot, on the device
        self._unsettled: list[mx.array] = []  # outputs that may still read the pool
        self.unread: list[tuple[int, mx.array]] = []  # choices of covered layers
        self._readings: list[Reading] = []

    # What a call asks for

    def bring(
        self, layer: int, ids: np.ndarray, x: mx.array | None = None
    ) -> tuple[set[int], Parts] | None:
        """Experts ids [..., k] of a few rows: those that are there, and those on their way.

        x [..., D]: what the router took. None where there are too many, of rows or for the pool.
        """
        self.regain()
        self._chose(layer, ids)
        if ids.size > DECODE_PAIRS:
            return None
        table = self.pool.slot_of[layer]
        need = sorted(set(ids.reshape(-1).tolist()))  # few: sets are quicker than arrays
        if len(need) > self.pool.slots:
            return None
        if held := self.ahead.held:
            self.moved()
            if len(need) <= self.pool.slots - held:
                self.ahead.reclaim()
            else:
                self.ahead.drop(wait=True)
        misses = [e for e in need if table[e] < 0]
        hits = [e for e in need if table[e] >= 0]
        self._hit(layer, ids, hits, misses)
        parts = self._read(layer, hits, misses) if misses else []
        if self.foresight is not None:
            self.foresight.chose(layer, ids, misses, x)
        return set(hits), parts

    def divide(self, layer: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts that are there and that are not, of a call for which `bring` gave None."""
        self.regain()
        self.moved()
        self.ahead.drop(wait=True)
        need = np.unique(ids)
        resident = self.pool.slot_of[layer][need] >= 0
        hits, misses = need[resident], need[~resident]
        self._count(layer, ids, len(hits), misses.tolist())
        return hits, misses

    def covered(self, layer: int, indices: mx.array) -> None:
        """A call, not read back, of a layer that is wholly resident."""
        self.unread.append((layer, indices))
        if len(self.unread) > MAX_UNREAD:
            self.settle()

    def confirmed(self, layer: int, ids: np.ndarray, hits: list[int]) -> None:
        """A call ran with all its experts, `hits`, before it was known to be a true one."""
        self._chose(layer, ids)
        self._hit(layer, ids, hits, [])

    def found(self, layer: int, ids: np.ndarray) -> None:
        """Calls of the layers from `layer` on, ids [n, rows, k], ran with experts at hand."""
        if ids.shape[1] > 1 or self.fresh or self.watch is not None:
            for i, one in enumerate(ids, layer):
                self.confirmed(i, one, sorted(set(one.reshape(-1).tolist())))
            return
        chosen = ids[:, 0]  # a row's experts differ from one another
        self.pool.chose_in_turn(layer, chosen)
        self.all_uses[self._starts[layer : layer + len(ids), None] + chosen] += 1
        self.counters.hits += chosen.size
        for i, one in enumerate(chosen.tolist(), layer):
            self.pool.touch(i, sorted(one))

    def _chose(self, layer: int, ids: np.ndarray) -> None:
        self.pool.chose(layer, ids)
        if ids.size == ids.shape[-1]:
            self.uses[layer][ids.reshape(-1)] += 1
        else:
            np.add.at(self.uses[layer], ids.reshape(-1), 1)

    def _hit(self, layer: int, ids: np.ndarray, hits: list[int], misses: list[int]) -> None:
        fresh = self._used(layer, hits) if self.fresh else frozenset()
        missed = [*misses, *(e for _, e in fresh)] if fresh else misses
        self._count(layer, ids, len(hits) - len(fresh), missed)
        self.fresh -= fresh
        self.pool.touch(layer, hits)

    def _used(self, layer: int, hits: list[int]) -> Set[tuple[int, int]]:
        """Which of the resident experts asked for were read ahead for this."""
        used = {(layer, e) for e in hits} & self.fresh
        self.counters.prefetch_used += len(used)
        return used

    def _count(self, layer: int, ids: np.ndarray, hits: int, misses: list[int]) -> None:
        self.counters.hits += hits
        self.counters.misses += len(misses)
        self.counters.bytes_wanted += len(misses) * self.expert_bytes
        if self.watch is not None:
            self.watch.chose(self.numbers[layer], ids, misses)

    # Reads

    def _read(self, layer: int, hits: list[int], misses: list[int]) -> Parts:
        """Start reading absent experts into slots that are theirs at once."""
        self.counters.waits += 1
        self.moved()
        parts = self.ahead.arriving(layer, misses)
        early = [e for experts, _ in parts for e in experts]
        self.counters.prefetch_used += len(early)
        keep = (layer, frozenset([*hits, *misses]))  # those placed here too
        late = [e for e in misses if e not in early] if early else misses
        taken = iter(self.pool.take(len(late), keep))
        for wave in self._waves(late):
            slots = list(itertools.islice(taken, len(wave)))
            parts.append((wave, self.load(layer, wave, slots)))
            for expert, slot in zip(wave, slots, strict=True):
                self.pool.place(layer, expert, slot)
        return parts

    def _waves(self, misses: list[int]) -> list[list[int]]:
        """Absent experts in the groups that are waited for: one computes while the next is read.

        Small experts come together, since a group costs about what reading WAVE_BYTES does.
        """
        return [misses[i : i + self.wave] for i in range(0, len(misses), self.wave)]

    def load(
        self, layer: int, experts: Sequence[int], slots: Sequence[int], guess: float | None = None
    ) -> Reading:
        """Start reading `experts` into `slots`, which nothing reads any more.

        guess: see `Store.read`.
        """
        pieces, widen = [], []
        for expert, slot in zip(experts, slots, strict=True):
            more, wide = self.arrays.pieces(self.layers[layer], int(expert), slot)
            pieces += more
            widen += wide
        self._readings = [r for r in self._readings if not r.done]
        reading = Reading(self.store.read(pieces, guess, widen))
        self._readings.append(reading)
        return reading

    @property
    def bytes_read(self) -> int:
        """By all who share the store."""
        return self.store.bytes_read

    def bytes_of(self, parts: Parts) -> int:
        return sum(len(experts) for experts, _ in parts) * self.expert_bytes

    def came(self, parts: Parts, beside: bool) -> None:
        """What a call asked for is there; beside: guesses were under way when it did."""
        if parts and not any(reading.guessed for _, reading in parts):
            seconds = max(reading.seconds for _, reading in parts)
            self.demanded(self.bytes_of(parts), seconds, beside)

    def demanded(self, nbytes: int, seconds: float, beside: bool) -> None:
        """A call asked for reads that were there after so long."""
        self.pace.saw(nbytes, seconds)
        (self.counters.beside if beside else self.counters.alone).add(nbytes, seconds)

    def wait(self, wait: Callable[[], T]) -> T:
        """wait(), its time counted as waiting for reads."""
        began = time.perf_counter()
        result = wait()
        self.waited(time.perf_counter() - began)
        return result

    def waited(self, seconds: float) -> None:
        """The generation stood still for reads."""
        self.counters.io_wait_seconds += seconds

    # Reads ahead of need

    def prefetch(
        self,
        layer: int,
        experts: list[int],
        deadline: int,
        room: int,
        keep: tuple[int, frozenset[int]] | None = None,
    ) -> None:
        """Read up to `room` absent experts ahead, by `deadline`; 0: they are waited for now.

        keep: (layer, experts) that must not be evicted.
        """
        self.regain()
        self.settle()
        table = self.pool.slot_of[layer]
        new = [e for e in experts if table[e] < 0 and not self.ahead.reads(layer, e)]
        del new[max(0, room) :]
        taken = iter(self.pool.take(len(new), keep))
        for wave in self._waves(new):
            slots = list(itertools.islice(taken, len(wave)))
            reading = self.load(layer, wave, slots, guess=deadline or None)
            self.ahead.add(layer, wave, slots, reading)
        self.moved()
        self.counters.prefetched += len(new)
        self.counters.bytes_guessed += len(new) * self.expert_bytes if deadline else 0

    def regain(self) -> None:
        """Slots that guesses hold between passes come back to the pool."""
        if self.holder is not None:
            self.holder.wait()
            self.holder = None
            self.moved()

    def allow(self, nbytes: int) -> None:
        """So many bytes of guesses may be under way, an eighth more or less."""
        if 8 * abs(self.store.guess_bytes - nbytes) > nbytes:
            self.store.guess_bytes = nbytes

    def passed(self, layer: int) -> None:
        """The layer has run: what is still read ahead for it is not needed."""
        if self.ahead.held:
            self.ahead.arriving(layer, ())

    def arrived(self) -> None:
        """Experts read ahead that are there become resident."""
        if self.ahead.held:
            self.moved()
            for layer, expert in self.ahead.arrived():
                self.fresh.add((layer, expert))
                self.pool.expect(layer, [expert])

    def release(self) -> None:
        """The pass is over: what is still read ahead is not needed."""
        self.pool.expect_nothing()
        self.fresh.clear()
        if self.ahead.held:
            self.moved()
            self.ahead.drop()

    # Slots, and what still reads them

    def slots(self, layer: int, ids: np.ndarray) -> mx.array:
        """Of resident experts [..., k], int32."""
        return mx.array(self.pool.slot_of[layer][ids])

    def table(self, layer: int) -> mx.array:
        """Slots of all experts of the layer, int32 [n], -1 where absent."""
        if layer not in self._tables:
            self._tables[layer] = mx.array(self.pool.slot_of[layer])
        return self._tables[layer]

    def moved(self) -> None:
        """Experts come or go: tables are made again."""
        self._tables.clear()

    def track(self, y: mx.array) -> mx.array:
        """y, which may read the pool when it is evaluated."""
        self._unsettled.append(y)
        return y

    def settle(self) -> None:
        """Nothing lazy reads the pool any more; slots may be refilled."""
        if self._unsettled:
            mx.eval(self._unsettled)
            self._unsettled.clear()
        for layer, indices in self.unread:
            ids = np.array(indices)
            experts = np.unique(ids)
            self.counters.hits += len(experts)
            if self.watch is not None:
                self.watch.chose(self.numbers[layer], ids, ())
            self._chose(layer, ids)
            self.pool.touch(layer, experts)
        self.unread.clear()

    def abandon(self) -> None:
        """Forget every resident expert: after a failure none is known to be whole."""
        self.regain()
        for reading in self._readings:
            with contextlib.suppress(StreamerError):
                reading.wait()
        self._readings.clear()
        self.fresh.clear()
        self._unsettled.clear()
        self.unread.clear()
        self.moved()
        self.pool = Lrfu(self.pool.slots, [layer.count for layer in self.layers])
        self.ahead = ReadAhead(self.pool)
