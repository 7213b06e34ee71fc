"""Experts that the extension brings in by itself, in the middle of a pass.

Where nothing guesses, a layer that misses needs no Python: which experts go, where the absent ones
are read from and to, and what is counted are plain numbers. `kernels.native.ExpertCache` does on
the pool's own arrays what `streamer.residency` and `streamer.lrfu` do, to the bit; these remain the
reference, and serve whatever is asked for otherwise.

    STREAMER_SERVING=python      # turns it off
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import backend

from .lrfu import Lrfu

if TYPE_CHECKING:
    from .executor import Executor


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
        if self._off or run.ahead.held or run.fresh or run.fetching.effort is not None:
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
        cache = self._made[1]
        cache.watched = run.watch is not None
        return cache

    def end(self, layer: int, rows: int, waited: float) -> None:
        """A pass over `rows` rows is over, whose last layer here was `layer`; seconds waited.

        Raises StreamerError when a read failed; the pool is then empty and usable.
        """
        run = self._run
        assert self._made is not None
        pool, cache = self._made
        hits, misses, waits, demands, told, failed = cache.take()
        counters = run.counters
        counters.hits += hits
        counters.misses += misses
        counters.bytes_wanted += misses * run.expert_bytes
        counters.waits += waits
        pool.went(layer)
        run.fetching.rows.add(rows)
        run.waited(waited)
        for nbytes, seconds in demands:
            run.demanded(nbytes, seconds, beside=False)
        if run.watch is not None:
            for at, k, ids, missed in told:
                chosen = np.frombuffer(ids, dtype=np.int32).reshape(-1, k)
                run.watch.chose(run.numbers[at], chosen, missed)
        if failed is not None:
            run.abandon()
            assert run.store.native is not None
            raise run.store.native.error(*failed.error())

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
