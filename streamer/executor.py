"""Run a layer's experts from a bounded pool, reading what is absent.

The layer-wise executor: at every MoE layer the router's choice is read back,
absent experts are read from disk while the resident ones compute, and the
results are put together row by row. In float32 on CPU the results are the bits
that mlx-lm gives with all experts in memory.

A call with few rows (decode, verify) brings its experts into the pool, which evicts others
(`streamer.residency`). A call whose union does not fit, or with many rows, is a prefill's
(`streamer.prefill`). Where a step is run in segments, its calls are computed there
(`streamer.fetching`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kernels import routed

from . import prefill
from .counters import Counters
from .experts import LayerExperts
from .fetching import Fetching
from .pairs import Groups, projections
from .residency import DECODE_PAIRS, Parts, Residency
from .serving import Serving
from .store import Store


@dataclass
class Asked:
    """A call whose absent experts are being read.

    ids [..., k]; there: experts at hand; parts: the others, by reading; at: when they were asked
    for, beside: guesses being under way; y: what `there` gave [..., k, D], zeros elsewhere, where
    that is known.
    """

    ids: np.ndarray
    there: set[int]
    parts: Parts
    at: float
    beside: bool
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


class Executor(Residency):
    """All layers of one expert format, called one by one."""

    def __init__(
        self, layers: Sequence[LayerExperts], slots: int, store: Store, counters: Counters
    ):
        super().__init__(layers, slots, store, counters)
        self.fetching = Fetching(self)
        self.serving = Serving(self)
        self.note: Callable[[Note], None] | None = None  # takes the calls of a rehearsal
        self.known: dict[int, np.ndarray] = {}  # what a layer's next call will choose
        # told of a call that waits; if it says so the call takes what is at hand and is made again
        self.meanwhile: Callable[[Executor, int, Asked], bool] | None = None
        self.back: Callable[[], None] | None = None  # told when it is
        self.after: Callable[[], None] | None = None  # told when a layer's call is done, may raise
        self._asked: dict[int, Asked] = {}

    def __call__(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        """x [..., D], indices [..., k] -> [..., k, D]; `inner` is bound to the pool.

        Raises StreamerError when a read fails; the pool is then empty and usable.
        """
        try:
            y = self._run(layer, inner, x, indices)
        except BaseException:
            self.abandon()
            raise
        if self.after is not None:
            self.after()
        return y

    def _run(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        if self.note is not None:
            y = self._rehearse(layer, inner, x, indices)
            self.note(Note(self, layer, indices, y))
            return y
        if (asked := self._asked.pop(layer, None)) is not None:
            if self.back is not None:
                self.back()
            return self._finish(layer, inner, x, asked)
        if self.pool.covers(layer):  # mlx-lm's own path, no read-back
            y = self.track(prefill.in_parts(inner, x, self.table(layer)[indices]))
            self.covered(layer, indices)
            return y
        known = self.known.pop(layer, None)
        if known is None:
            ids = np.array(indices)
            self.counters.syncs += 1
        else:
            ids = known
        self.settle()
        found = self.bring(layer, ids, x)
        if found is None:
            hits, misses = self.divide(layer, ids)
            if len(misses):
                return self.track(prefill.walk(self, layer, inner, x, ids, hits, misses))
            self.pool.touch(layer, hits)
            return self.track(prefill.in_parts(inner, x, self.slots(layer, ids)))
        there, parts = found
        if not parts:
            self.passed(layer)
            return self.track(inner(x, self.slots(layer, ids)))
        asked = Asked(ids, there, parts, time.perf_counter(), self.ahead.busy)
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
        there, arrived, coming = asked.there, set[int](), []
        for experts, reading in asked.parts:
            if reading.done:
                self.wait(reading.wait)
                arrived.update(experts)
            else:
                coming.append((experts, reading))
        if not there and not arrived and len(coming) == 1:
            self.wait(coming.pop()[1].wait)
        if not coming and asked.y is None:
            self.came(asked.parts, asked.beside)
            return self.track(inner(x, self.slots(layer, asked.ids)))
        groups = Groups(inner, x, asked.ids, self.pool.slot_of[layer])
        if asked.y is not None:
            groups.know(asked.y)
        else:
            arrived |= there
        if arrived:
            groups.add(arrived)
        for experts, reading in coming:
            self.wait(reading.wait)
            groups.add(set(experts))
        self.came(asked.parts, asked.beside)
        return self.track(groups.join())

    def left(self, asked: Asked) -> float:
        """Seconds until all of it is likely to be there."""
        if asked.done:
            return 0.0
        return self.pace.left(self.bytes_of(asked.parts), time.perf_counter() - asked.at)

    @property
    def fetches(self) -> bool:
        """Whether `fetching` can be used: its reads are waited for without Python."""
        return self.store.native is not None

    # Rehearsals

    def takes(self, pairs: int) -> bool:
        """Whether a pass with so many choices in a layer can be rehearsed."""
        return pairs <= min(DECODE_PAIRS, self.pool.slots)

    def _rehearse(self, layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        slots = self.table(layer)[indices]
        if self.pool.covers(layer):
            return inner(x, slots)
        return _partly(inner, x, slots)[0]

    def named(self, note: Note) -> tuple[list[int], list[int]]:
        """(resident, absent) experts of an evaluated note."""
        table = self.pool.slot_of[note.layer]
        need = sorted(set(np.array(note.indices).reshape(-1).tolist()))
        return [e for e in need if table[e] >= 0], [e for e in need if table[e] < 0]

    def settled(self, note: Note, hits: list[int]) -> None:
        """A rehearsed call was the true one."""
        self.confirmed(note.layer, np.array(note.indices), hits)
        self.track(note.y)

    def abandon(self) -> None:
        """Forget every resident expert: after a failure none is known to be whole."""
        super().abandon()
        self.fetching.forget()
        self.known.clear()
        self._asked.clear()


def _partly(inner: nn.Module, x: mx.array, slots: mx.array) -> tuple[mx.array, bool]:
    """y [..., k, D] with zeros where slots [..., k] are -1, and whether our kernel made it."""
    kernel = projections(inner)
    y = None if kernel is None else routed.fused(x, slots, kernel)
    if y is not None:
        return y, True
    y = inner(x, mx.maximum(slots, 0))
    # not a product with zero: what lies in slot 0 may be no number
    return mx.where((slots >= 0)[..., None], y, mx.zeros((), dtype=y.dtype)), False
