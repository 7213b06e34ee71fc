"""Run a layer's experts from a bounded pool, reading what is absent.

The layer-wise executor: at every MoE layer the router's choice is read back,
absent experts are read from disk while the resident ones compute, and the
results are put together row by row. In float32 on CPU the results are the bits
that mlx-lm gives with all experts in memory.

A call with few rows (decode, verify) brings its experts into the pool, which evicts others.
A call whose union does not fit, or with many rows (prefill), walks the absent
experts in disk order through a few scratch slots, one batch read ahead, so
that each is read once and what decoding uses stays.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kernels import routed

from .ahead import ReadAhead, Reading
from .counters import Counters
from .errors import StreamerError
from .experts import LayerExperts, stored_bytes
from .lrfu import Lrfu
from .pairs import Groups, Pairs, projections
from .pool import SlotPool
from .slots import SlotArrays
from .store import Store
from .watch import Watch
from .ways import Effort, Pace

DECODE_PAIRS = 256  # a call with more (row, expert) pairs is a prefill
SCRATCH_BATCH = 16  # experts read ahead at once in prefill
WAVE_BYTES = 512 << 10  # absent experts are waited for by this much
MAX_UNREAD = 256  # calls of covered layers whose choices wait to be counted
MAX_PAIRS = 4096  # pairs computed at once, which bounds prefill's transients
T = TypeVar("T")


@dataclass
class Asked:
    """A call whose absent experts are being read.

    ids [..., k]; there: experts at hand; parts: the others, by reading; at: when they were asked
    for; y: what `there` gave [..., k, D], zeros elsewhere, where that is known.
    """

    ids: np.ndarray
    there: set[int]
    parts: list[tuple[list[int], Reading]]
    at: float
    y: mx.array | None = None

    @property
    def done(self) -> bool:
        return all(reading.done for _, reading in self.parts)

    @property
    def need(self) -> set[int]:
        """All its experts."""
        return self.there.union(*(experts for experts, _ in self.parts))


@dataclass(frozen=True)
class Note:
    """A call in a rehearsal: lazy indices [..., k] of a layer, and its output."""

    run: Executor
    layer: int
    indices: mx.array
    y: mx.array


class Executor:
    """All layers of one expert format, their pool and the reads that fill it."""

    def __init__(
        self, layers: Sequence[LayerExperts], slots: int, store: Store, counters: Counters
    ):
        self.layers = list(layers)
        self.pool: SlotPool = Lrfu(slots, [layer.count for layer in layers])
        self.arrays = SlotArrays(layers[0].format, slots)
        self.counters = counters
        self._expert_bytes = stored_bytes(layers[0].format)
        self._wave = max(1, -(-WAVE_BYTES // self._expert_bytes))
        self._store = store
        self._tables: dict[int, mx.array] = {}  # of covered layers: expert -> slot
        self._unsettled: list[mx.array] = []  # outputs that may still read the pool
        self._readings: list[Reading] = []
        self._elsewhere: tuple[int, Asked] | None = None  # a layer's call, computed by others
        self._looked = 0.0  # when the last layer was rehearsed in its wait
        self.fetching = False  # such calls are made
        self.effort: Effort | None = None  # where such calls look ahead
        self._unread: list[tuple[int, mx.array]] = []  # choices of covered layers
        self.ahead = ReadAhead(self.pool)
        self.uses = [np.zeros(layer.count, dtype=np.int64) for layer in layers]  # by pairs
        # told of a call that waits; if it says so the call takes what is at hand and is made again
        self.meanwhile: Callable[[Executor, int, Asked], bool] | None = None
        self.back: Callable[[], None] | None = None  # told when it is
        self._asked: dict[int, Asked] = {}
        self.pace = Pace()
        self.known: dict[int, np.ndarray] = {}  # what a layer's next call will choose
        self.fresh: set[tuple[int, int]] = set()  # read ahead, resident, not yet asked for
        self.note: Callable[[Note], None] | None = None  # takes the calls of a rehearsal
        self.watch: Watch | None = None
        self.numbers: Sequence[int] = range(len(self.layers))  # of the layers, in the model

    def __call__(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        """x [..., D], indices [..., k] -> [..., k, D]; `inner` is bound to the pool.

        Raises StreamerError when a read fails; the pool is then empty and usable.
        """
        try:
            return self._run(layer, inner, x, indices)
        except BaseException:
            self.abandon()
            raise

    def _run(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        if self.note is not None:
            y = self._rehearse(layer, inner, x, indices)
            self.note(Note(self, layer, indices, y))
            return y
        if (asked := self._asked.pop(layer, None)) is not None:
            if self.back is not None:
                self.back()
            return self._finish(layer, inner, x, asked)
        if self.pool.covers(layer):
            return self._covered(layer, inner, x, indices)
        known = self.known.pop(layer, None)
        if known is None:
            ids = np.array(indices)
            self.counters.syncs += 1
        else:
            ids = known
        self._settle()
        placed = self._place(layer, ids)
        if placed is None:
            return self._many(layer, inner, x, ids)
        there, parts = placed
        if not parts:
            self.passed(layer)
            return self._track(inner(x, self._slots(layer, ids)))
        asked = Asked(ids, there, parts, time.perf_counter())
        if self.meanwhile is not None and self.meanwhile(self, layer, asked):
            self._asked[layer] = asked
            table = self.pool.slot_of[layer]
            slots = [table[e] if e in asked.there else -1 for e in ids.reshape(-1).tolist()]
            y, exact = _partly(inner, x, mx.array(np.array(slots, np.int32).reshape(ids.shape)))
            asked.y = y if exact else None
            return y
        return self._finish(layer, inner, x, asked)

    def _finish(self, layer: int, inner: nn.Module, x: mx.array, asked: Asked) -> mx.array:
        """The call's result, once all has come."""
        waited = not asked.done
        there, arrived, coming = asked.there, set[int](), []
        for experts, reading in asked.parts:
            if reading.done:
                self._wait(reading.wait)
                arrived.update(experts)
            else:
                coming.append((experts, reading))
        if not there and not arrived and len(coming) == 1:
            self._wait(coming.pop()[1].wait)
        if not coming and asked.y is None:
            self._came(asked, waited)
            return self._track(inner(x, self._slots(layer, asked.ids)))
        groups = Groups(inner, x, asked.ids, self.pool.slot_of[layer])
        if asked.y is not None:
            groups.know(asked.y)
        else:
            arrived |= there
        if arrived:
            groups.add(arrived)
        for experts, reading in coming:
            self._wait(reading.wait)
            groups.add(set(experts))
        self._came(asked, waited)
        return self._track(groups.join())

    def _came(self, asked: Asked, waited: bool) -> None:
        """All of it is there; waited: not before it was waited for."""
        seconds = time.perf_counter() - asked.at
        self.pace.saw(self._nbytes(asked.parts), seconds, waited)

    def _nbytes(self, parts: Sequence[tuple[Sequence[int], Reading]]) -> int:
        return sum(len(experts) for experts, _ in parts) * self._expert_bytes

    def left(self, asked: Asked) -> float:
        """Seconds until all of it is likely to be there."""
        if asked.done:
            return 0.0
        return self.pace.left(self._nbytes(asked.parts), time.perf_counter() - asked.at)

    def fetch(
        self, layer: int, ids: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[list[int], Reading]]]:
        """For experts ids [..., k] of a few rows: their slots, and the reads under way.

        For who computes them without this executor, at once: the pairs of row and choice that
        wait for each read. `landed` is to be called before anything else is asked for. Raises
        StreamerError when a read fails; the pool is then empty and usable.
        """
        try:
            self.counters.syncs += 1
            self._settle()
            placed = self._place(layer, ids)
            if placed is None:
                raise StreamerError(f"{ids.size} experts do not fit into {self.pool.slots} slots")
            asked = Asked(ids, *placed, time.perf_counter())
            self._elsewhere, self.fetching, self._looked = (layer, asked), True, asked.at
            if not asked.parts:
                self.passed(layer)
            flat = ids.reshape(-1).tolist()
            waiting = [
                ([i for i, e in enumerate(flat) if e in experts], reading)
                for experts, reading in asked.parts
            ]
            return self.pool.slot_of[layer][ids], waiting
        except BaseException:
            self.abandon()
            raise

    def landed(self, waited: float) -> None:
        """What was fetched has been used, `waited` seconds of it for reads.

        Raises StreamerError when a read failed; the pool is then empty and usable.
        """
        try:
            if self._elsewhere is not None and (parts := self._elsewhere[1].parts):
                for _, reading in parts:
                    reading.wait()
                seconds = self._looked - self._elsewhere[1].at + waited
                self.pace.saw(self._nbytes(parts), seconds, waited > 0)
            self._elsewhere = None
            self.counters.io_wait_seconds += waited
            if waited and self.watch is not None:
                self.watch.waited(waited)
        except BaseException:
            self.abandon()
            raise

    def idle(self) -> bool:
        """Whether a layer can be rehearsed while what was fetched is read."""
        return self.effort is not None and self.effort.pays(self._left())

    def goes_on(self) -> bool:
        """A layer was rehearsed; whether there is time for one more."""
        assert self.effort is not None
        now = time.perf_counter()
        if self.watch is not None:
            self.watch.step("rehearse", 1, now - self._looked)
        self.effort.looked(now - self._looked)
        self._looked = now
        return self.effort.goes_on(self._left())

    def _left(self) -> float:
        return 0.0 if self._elsewhere is None else self.left(self._elsewhere[1])

    def guess(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """Slots of experts [..., k] that a rehearsed layer chose, -1 where one is absent.

        These are read ahead, if what is fetched and what else was named leaves room.
        """
        assert self._elsewhere is not None
        waiting, needed = self._elsewhere[0], frozenset(self._elsewhere[1].need)
        try:
            table, need = self.pool.slot_of[layer], sorted(set(ids.reshape(-1).tolist()))
            hits, absent = [e for e in need if table[e] >= 0], [e for e in need if table[e] < 0]
            self.counters.rehearsals += 1
            self.pool.expect(layer, hits)
            room = self.pool.slots - self.ahead.held - len(needed) - len(need)
            self.prefetch(layer, absent, layer + 1, room, (waiting, needed))
            return table[ids]
        except BaseException:
            self.abandon()
            raise

    def _place(
        self, layer: int, ids: np.ndarray
    ) -> tuple[set[int], list[tuple[list[int], Reading]]] | None:
        """Bring the experts of a few rows into the pool: those that are there, and on their way.

        None where there are too many, of rows or for the pool.
        """
        self.pool.chose(layer, ids)
        uses = self.uses[layer]
        uses += np.bincount(ids.reshape(-1), minlength=len(uses))
        if ids.size > DECODE_PAIRS:
            return None
        table = self.pool.slot_of[layer]
        need = sorted(set(ids.reshape(-1).tolist()))  # few: sets are quicker than arrays
        if len(need) > self.pool.slots:
            return None
        if held := self.ahead.held:
            self._tables.clear()
            if len(need) <= self.pool.slots - held:
                self.ahead.reclaim()
            else:
                self.ahead.drop(wait=True)
        misses = [e for e in need if table[e] < 0]
        hits = [e for e in need if table[e] >= 0]
        fresh = self._used(layer, hits) if self.fresh else frozenset()
        self._count(layer, ids, len(hits) - len(fresh), len(misses) + len(fresh))
        self.fresh -= fresh
        self.pool.touch(layer, hits)
        return (set(hits), self._read(layer, hits, misses)) if misses else (set(hits), [])

    def _many(self, layer: int, inner: nn.Module, x: mx.array, ids: np.ndarray) -> mx.array:
        """A call whose experts do not fit, or of many rows."""
        self._tables.clear()
        self.ahead.drop(wait=True)
        need = np.unique(ids)
        resident = self.pool.slot_of[layer][need] >= 0
        hits, misses = need[resident], need[~resident]
        self._count(layer, ids, len(hits), len(misses))
        if not len(misses):
            self.pool.touch(layer, hits)
            return self._track(inner(x, self._slots(layer, ids)))
        return self._prefill(layer, inner, x, ids, hits, misses)

    def _count(self, layer: int, ids: np.ndarray, hits: int, misses: int) -> None:
        self.counters.hits += hits
        self.counters.misses += misses
        self.counters.bytes_wanted += misses * self._expert_bytes
        if self.watch is not None:
            self.watch.chose(self.numbers[layer], ids, misses)

    def _covered(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        """mlx-lm's own path, no read-back: the slot table lives on the device."""
        y = inner(x, self._table(layer)[indices])
        self._unread.append((layer, indices))
        if len(self._unread) > MAX_UNREAD:
            self._settle()
        return self._track(y)

    def _rehearse(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        slots = self._table(layer)[indices]
        if self.pool.covers(layer):
            return inner(x, slots)
        return _partly(inner, x, slots)[0]

    def _table(self, layer: int) -> mx.array:
        if layer not in self._tables:
            self._tables[layer] = mx.array(self.pool.slot_of[layer])
        return self._tables[layer]

    @property
    def fetches(self) -> bool:
        """Whether `fetch` can be used: its reads are waited for without Python."""
        return self._store.native

    def takes(self, pairs: int) -> bool:
        """Whether a pass with so many choices in a layer can be rehearsed."""
        return pairs <= min(DECODE_PAIRS, self.pool.slots)

    def named(self, note: Note) -> tuple[list[int], list[int]]:
        """(resident, absent) experts of an evaluated note."""
        table = self.pool.slot_of[note.layer]
        need = sorted(set(np.array(note.indices).reshape(-1).tolist()))
        return [e for e in need if table[e] >= 0], [e for e in need if table[e] < 0]

    def passed(self, layer: int) -> None:
        """The layer has run: what is still read ahead for it is not needed."""
        if self.ahead.held:
            self.ahead.arriving(layer, ())

    def arrived(self) -> None:
        """Experts read ahead that are there become resident."""
        if self.ahead.held:
            self._tables.clear()
            for layer, expert in self.ahead.arrived():
                self.fresh.add((layer, expert))
                self.pool.expect(layer, [expert])

    def _used(self, layer: int, hits: list[int]) -> Set[tuple[int, int]]:
        """Which of the resident experts asked for were read ahead for this."""
        used = {(layer, e) for e in hits} & self.fresh
        self.counters.prefetch_used += len(used)
        return used

    def settled(self, note: Note, hits: list[int]) -> None:
        """A rehearsed call was the true one."""
        fresh = self._used(note.layer, hits) if self.fresh else frozenset()
        ids = np.array(note.indices)
        self.pool.chose(note.layer, ids)
        np.add.at(self.uses[note.layer], ids.reshape(-1), 1)
        self._count(note.layer, ids, len(hits) - len(fresh), len(fresh))
        self.fresh -= fresh
        self.pool.touch(note.layer, hits)
        self._track(note.y)

    def release(self) -> None:
        """The pass is over: what is still read ahead is not needed."""
        self.pool.expect_nothing()
        self.fresh.clear()
        if self.ahead.held:
            self._tables.clear()
            self.ahead.drop()

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
        self._settle()
        new = [e for e in experts if not self.ahead.reads(layer, e)][: max(0, room)]
        for wave in self._waves(new):
            slots = self.pool.take(len(wave), keep)
            reading = self.load(layer, wave, slots, guess=deadline or None)
            self.ahead.add(layer, wave, slots, reading)
        self._tables.clear()
        self.counters.prefetched += len(new)
        self.counters.bytes_guessed += len(new) * self._expert_bytes if deadline else 0

    def allow(self, nbytes: int) -> None:
        """So many bytes of guesses may be under way."""
        if self._store.guess_bytes != nbytes:
            self._store.guess_bytes = nbytes

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
        reading = Reading(self._store.read(pieces, guess, widen))
        self._readings.append(reading)
        return reading

    def abandon(self) -> None:
        """Forget every resident expert: after a failure none is known to be whole."""
        for reading in self._readings:
            with contextlib.suppress(StreamerError):
                reading.wait()
        self._readings.clear()
        self._elsewhere = None
        self.known.clear()
        self._asked.clear()
        self.fresh.clear()
        self._unsettled.clear()
        self._unread.clear()
        self._tables.clear()
        self.pool = Lrfu(self.pool.slots, [layer.count for layer in self.layers])
        self.ahead = ReadAhead(self.pool)

    def fill(self, progress: Callable[[int, int], None]) -> list[nn.Module]:
        """Read everything into an empty pool that holds it all; progress(bytes done, in all).

        Returns the layers' switches as mlx-lm has them, over their part of the pool.
        """
        size, done, switches = stored_bytes(self.arrays.format), 0, []
        for layer, experts in enumerate(self.layers):
            slots = sorted(self.pool.take(experts.count))
            self.load(layer, range(experts.count), slots).wait()
            for expert, slot in enumerate(slots):
                self.pool.place(layer, expert, slot)
            switches.append(self.arrays.bind(experts.switch, slice(slots[0], slots[-1] + 1)))
            done += len(slots) * size
            progress(done, self.pool.total * size)
        return switches

    def warm(self, keys: Sequence[tuple[int, int]], wave: int) -> Iterator[int]:
        """Read (layer, expert) `keys` into an empty pool, `wave` at once, as they lie on disk.

        The last key will be the last to be evicted. Yields how many have come each time.
        """
        slots = dict(zip(keys, self.pool.take(len(keys)), strict=True))
        on_disk = sorted(keys, key=lambda key: int(self.layers[key[0]].starts[0][key[1]]))
        waves = [on_disk[i : i + wave] for i in range(0, len(on_disk), wave)]
        waiting: list[list[Reading]] = []
        try:
            for i in range(len(waves) + 1):
                if i < len(waves):
                    waiting.append([self.load(k[0], [k[1]], [slots[k]]) for k in waves[i]])
                if i:
                    for reading in waiting.pop(0):
                        reading.wait()
                    yield len(waves[i - 1])
        except BaseException:
            self.abandon()
            raise
        for key in keys:
            self.pool.place(*key, slots[key])

    def _read(
        self, layer: int, hits: list[int], misses: list[int]
    ) -> list[tuple[list[int], Reading]]:
        """Start reading absent experts into slots that are theirs at once."""
        self.counters.waits += 1
        self._tables.clear()
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
        return [misses[i : i + self._wave] for i in range(0, len(misses), self._wave)]

    def _prefill(
        self,
        layer: int,
        inner: nn.Module,
        x: mx.array,
        ids: np.ndarray,
        hits: np.ndarray,
        misses: np.ndarray,
    ) -> mx.array:
        self._tables.clear()
        flat = ids.reshape(-1)
        pairs = Pairs(x, ids)
        table = self.pool.slot_of[layer].copy()
        outputs: list[mx.array] = []
        order: list[np.ndarray] = []

        def compute(experts: np.ndarray) -> None:
            chosen = np.flatnonzero(np.isin(flat, experts))
            for part in np.split(chosen, range(MAX_PAIRS, len(chosen), MAX_PAIRS)):
                outputs.append(pairs.run(inner, table, part))
                order.append(part)
                mx.eval(outputs[-1])

        starts = self.layers[layer].starts[0]
        misses = misses[np.argsort(starts[misses], kind="stable")]  # as they lie on disk
        homes = self._homes(layer, flat, misses)
        batch = self._batch
        batches = np.split(misses, range(batch, len(misses), batch))
        scratch: list[list[int]] = []
        if self.pool.slots - len(hits) - len(homes) >= 2 * batch:
            keep = (layer, frozenset(hits.tolist()))
            scratch = [self.pool.take(batch, keep) for _ in range(2)]
        readings: list[Reading] = []

        def start(i: int) -> None:
            spare = iter(scratch[i % len(scratch)])
            slots = [homes[e] if e in homes else next(spare) for e in batches[i].tolist()]
            table[batches[i]] = slots
            readings.append(self.load(layer, batches[i].tolist(), slots))

        if scratch:
            start(0)
        if len(hits):
            compute(hits)
        if not scratch:  # a pool this small is all scratch once its hits are done
            scratch = [self.pool.take(batch)]
            start(0)
        for i, experts in enumerate(batches):
            if len(scratch) == 2 and i + 1 < len(batches):
                start(i + 1)
            self._wait(readings[i].wait)
            compute(experts)
            if len(scratch) == 1 and i + 1 < len(batches):
                start(i + 1)
        for slots in scratch:
            self.pool.release(slots)
        for expert, slot in homes.items():
            self.pool.place(layer, expert, slot)
        return self._track(pairs.join(outputs, np.concatenate(order)))

    def _homes(self, layer: int, flat: np.ndarray, misses: np.ndarray) -> dict[int, int]:
        """Free slots that this layer's most used absent experts may stay in.

        Only free slots, two batches of them left for scratch, and never more
        than the layer's even share: prefill evicts nothing that decoding used.
        """
        share = self.pool.slots // len(self.layers) - self.pool.resident[layer]
        room = min(share, len(self.pool.free) - 2 * self._batch)
        if room <= 0:
            return {}
        uses = np.bincount(flat, minlength=len(self.pool.slot_of[layer]))[misses]
        chosen = misses[np.argsort(-uses, kind="stable")[:room]].tolist()
        return dict(zip(chosen, self.pool.take(len(chosen)), strict=True))

    @property
    def _batch(self) -> int:
        """Experts of one scratch batch: a sixteenth of the pool, at most."""
        return max(1, min(SCRATCH_BATCH, self.pool.slots // 16))

    def _slots(self, layer: int, ids: np.ndarray) -> mx.array:
        return mx.array(self.pool.slot_of[layer][ids])

    def _wait(self, wait: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = wait()
        seconds = time.perf_counter() - began
        self.counters.io_wait_seconds += seconds
        if self.watch is not None:
            self.watch.waited(seconds)
        return result

    def _track(self, y: mx.array) -> mx.array:
        self._unsettled.append(y)
        return y

    def _settle(self) -> None:
        """Nothing lazy reads the pool any more; slots may be refilled."""
        mx.eval(self._unsettled)
        self._unsettled.clear()
        for layer, indices in self._unread:
            ids = np.array(indices)
            experts = np.unique(ids)
            self.counters.hits += len(experts)
            np.add.at(self.uses[layer], ids.reshape(-1), 1)
            if self.watch is not None:
                self.watch.chose(self.numbers[layer], ids, 0)
            self.pool.chose(layer, ids)
            self.pool.touch(layer, experts)
        self._unread.clear()


def _partly(inner: nn.Module, x: mx.array, slots: mx.array) -> tuple[mx.array, bool]:
    """y [..., k, D] with zeros where slots [..., k] are -1, and whether our kernel made it."""
    kernel = projections(inner)
    y = None if kernel is None else routed.fused(x, slots, kernel)
    if y is not None:
        return y, True
    y = inner(x, mx.maximum(slots, 0))
    # not a product with zero: what lies in slot 0 may be no number
    return mx.where((slots >= 0)[..., None], y, mx.zeros((), dtype=y.dtype)), False
