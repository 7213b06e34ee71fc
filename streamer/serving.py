"""Experts that the extension brings in by itself, in the middle of a pass.

Where no guesser guesses, a layer that misses needs no Python: which experts go, where the absent
ones are read from and to, and what is counted are plain numbers. `kernels.native.ExpertCache` does
on the pool's own arrays what `streamer.residency` and `streamer.lrfu` do, to the bit; these remain
the reference, and serve whatever is asked for otherwise. Where a pass looks ahead, the layers
behind one that waits are rehearsed there too, and what they name is read ahead as `streamer.ahead`
does.

    STREAMER_SERVING=python      # turns it off
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import backend

from .foresee import NEXT, REHEARSAL
from .lrfu import Lrfu
from .ways import Effort

if TYPE_CHECKING:
    from .executor import Executor


REHEARSALS = REHEARSAL, NEXT


class Serving:
    """One executor's pool, in the extension's hands for a pass."""

    def __init__(self, run: Executor):
        self._run = run
        self._made: tuple[Lrfu, Any] | None = None  # for which pool
        self._off = os.environ.get("STREAMER_SERVING", "") == "python"

    def begin(self) -> Any | None:
        """The extension's cache, None where experts are to be asked for.

        Until `end` or `lost` nothing else may be asked of the executor.
        """
        run, pool = self._run, self._run.pool
        run.ahead.reclaim()
        if self._off or run.ahead.held or run.fresh:
            return None
        if run.foresight is not None and run.foresight.listens:
            return None
        if type(pool) is not Lrfu or not pool.plain:
            return None
        if self._made is None or self._made[0] is not pool:
            made = self._make(pool)
            if made is None:
                self._off = True
                return None
            self._made = pool, made
        run.settle()
        run.moved()
        pool.even()
        cache = self._made[1]
        cache.watched = run.watch is not None
        effort, sight = run.fetching.effort, run.foresight
        if effort is None or sight is None:
            cache.look(each=0.0)
        else:
            trusted = [sight.trusts(kind) for kind in REHEARSALS]
            cache.look(run.pace.each, effort.layer, effort.end, *trusted)
        return cache

    def end(self, layer: int, rows: int, waited: float) -> None:
        """A pass over `rows` rows is over, whose last layer here was `layer`; seconds waited.

        Raises StreamerError when a read failed; the pool is then empty and usable.
        """
        run = self._run
        assert self._made is not None
        pool, cache = self._made
        hits, misses, waits, demands, told, failed, rehearsals, end, guesses = cache.take()
        run.holder = cache
        counters = run.counters
        counters.hits += hits
        counters.misses += misses
        counters.bytes_wanted += misses * run.expert_bytes
        counters.waits += waits
        pool.went(layer)
        run.fetching.rows.add(rows)
        run.waited(waited)
        for nbytes, seconds, beside in demands:
            run.demanded(nbytes, seconds, beside)
        if run.fetching.effort is not None:
            self._looked(run.fetching.effort, rows, rehearsals, end)
        for kind, outcome in zip(REHEARSALS, guesses, strict=True):
            self._guessed(kind, misses, outcome)
        if run.watch is not None:
            for at, k, ids, missed in told:
                chosen = np.frombuffer(ids, dtype=np.int32).reshape(-1, k)
                run.watch.chose(run.numbers[at], chosen, missed)
        if failed is not None:
            run.abandon()
            assert run.store.native is not None
            raise run.store.native.error(*failed.error())

    def _looked(self, effort: Effort, rows: int, rehearsals: list[float], end: float) -> None:
        """Layers were rehearsed in a pass, each in so many seconds; its end took `end`."""
        for seconds in rehearsals:
            effort.looked(seconds)
            if self._run.watch is not None:
                self._run.watch.step("rehearse", rows, seconds)
        if end:
            effort.ended(end)
        self._run.counters.rehearsals += len(rehearsals)

    def _guessed(self, kind: str, misses: int, outcome: tuple[int, int, int, int]) -> None:
        """What came of guesses about a pass with so many misses."""
        run, counters = self._run, self._run.counters
        _, _, read, used = outcome
        if run.foresight is not None and (run.fetching.effort is not None or any(outcome)):
            run.foresight.came(kind, misses, outcome)
        counters.prefetched += read
        counters.prefetch_used += used
        counters.bytes_guessed += read * run.expert_bytes

    def lost(self) -> None:
        """The pass ended otherwise, begun here or not: no expert is known to be whole."""
        if self._made is not None:
            self._made[1].wait()
        self._run.abandon()

    def _make(self, pool: Lrfu) -> Any | None:
        """A cache over the pool's arrays, None where the extension cannot fill its slots."""
        run, native = self._run, backend.native()
        widened = any(tensor.stored != tensor.held for tensor in run.layers[0].format)
        if native is None or run.store.native is None or widened:
            return None
        parts = [[np.ascontiguousarray(s, np.int64) for s in layer.starts] for layer in run.layers]
        return native.ExpertCache(
            run.store.native.native,
            layers=list(zip(pool.slot_of, parts, strict=True)),
            tensors=run.arrays.rows,
            uses=run.all_uses,
            spare=pool.free.all,
            spares=pool.free.count,
            resident=pool.resident,
            wave=run.wave,
            **pool.arrays(),
        )
