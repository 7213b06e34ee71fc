"""Calls that are computed elsewhere: slots of a layer's experts, and the reads still under way.

What `streamer.pager` asks of an executor for `kernels.segments`, which computes the experts of
a layer in one operation with what is around them and waits for reads itself. While it waits it
may rehearse what follows, and says what that chose.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from .errors import StreamerError
from .ways import Effort

if TYPE_CHECKING:
    from .ahead import Reading
    from .executor import Executor
    from .residency import Parts


class _Call(NamedTuple):
    """Of a layer; need: all of its experts; at: when the absent ones were asked for, beside:
    guesses being under way."""

    layer: int
    parts: Parts
    need: frozenset[int]
    at: float
    beside: bool


class Fetching:
    """An executor's layers, whose calls follow one another."""

    def __init__(self, run: Executor):
        self._run = run
        self._call: _Call | None = None
        self._looked = 0.0  # when the last layer was rehearsed in its wait
        self.rows: set[int] = set()  # for passes over so many such calls are made
        self.effort: Effort | None = None  # where such calls look ahead

    def slots(self, layer: int) -> np.ndarray | None:
        """The pool's table of a layer, int32 [n], -1 for absent experts; None where something
        read ahead or guessed is to be told of every choice before the next."""
        run = self._run
        if run.ahead.held or (run.foresight is not None and run.foresight.listens):
            return None
        return run.pool.slot_of[layer]

    def found(self, layer: int, ids: np.ndarray) -> None:
        """The layers from `layer` on chose ids [n, rows, k] of `slots`, and they were used."""
        run = self._run
        run.settle()
        self.rows.add(ids.shape[1])
        run.found(layer, ids)

    def fetch(
        self, layer: int, ids: np.ndarray, x: mx.array | None = None
    ) -> tuple[np.ndarray, Parts]:
        """For experts ids [..., k] of rows x [..., D]: their slots, and the reads under way.

        These are the pairs of row and choice that wait for each. `landed` is to be called before
        anything else is asked for. Raises StreamerError when a read fails; the pool is then empty
        and usable.
        """
        run = self._run
        try:
            run.counters.syncs += 1
            run.settle()
            found = run.bring(layer, ids, x)
            if found is None:
                raise StreamerError(f"{ids.size} experts do not fit into {run.pool.slots} slots")
            parts = found[1]
            self._looked = time.perf_counter()
            self.rows.add(ids.size // ids.shape[-1])
            flat = ids.reshape(-1).tolist()
            self._call = _Call(layer, parts, frozenset(flat), self._looked, run.ahead.busy)
            if not parts:
                run.passed(layer)
            waiting: list[tuple[list[int], Reading]] = [
                ([i for i, e in enumerate(flat) if e in experts], reading)
                for experts, reading in parts
            ]
            return run.pool.slot_of[layer][ids], waiting
        except BaseException:
            run.abandon()
            raise

    def landed(self, waited: float) -> None:
        """What was fetched has been used, `waited` seconds of it for reads.

        Raises StreamerError when a read failed; the pool is then empty and usable.
        """
        run = self._run
        try:
            if self._call is not None and (parts := self._call.parts):
                for _, reading in parts:
                    reading.wait()
                run.came(parts, self._call.beside)
            self._call = None
            run.waited(waited)
        except BaseException:
            run.abandon()
            raise

    def idle(self) -> bool:
        """Whether a layer can be rehearsed while what was fetched is read."""
        return self.effort is not None and self.effort.pays(self._left())

    def goes_on(self) -> bool:
        """A layer was rehearsed; whether there is time for one more."""
        assert self.effort is not None
        now = time.perf_counter()
        if self._run.watch is not None:
            self._run.watch.step("rehearse", 1, now - self._looked)
        self.effort.looked(now - self._looked)
        self._looked = now
        return self.effort.goes_on(self._left())

    def _left(self) -> float:
        call, run = self._call, self._run
        if call is None or all(reading.done for _, reading in call.parts):
            return 0.0
        return run.pace.left(run.bytes_of(call.parts), time.perf_counter() - call.at)

    def guess(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """Slots of experts [..., k] that a rehearsed layer chose, -1 where one is absent.

        These are read ahead, if what is fetched and what else was named leaves room.
        """
        call, run = self._call, self._run
        keep = call and (call.layer, call.need)  # not in the pool of the layer that waits: None
        try:
            table, need = run.pool.slot_of[layer], sorted(set(ids.reshape(-1).tolist()))
            hits, absent = [e for e in need if table[e] >= 0], [e for e in need if table[e] < 0]
            run.counters.rehearsals += 1
            assert run.foresight is not None
            run.foresight.rehearse(layer, (hits, absent), layer + 1, keep)
            return table[ids]
        except BaseException:
            run.abandon()
            raise

    def forget(self) -> None:
        """A read failed."""
        self._call = None
