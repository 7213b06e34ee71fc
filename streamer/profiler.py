"""What each step of a run spent, what its routers chose, and what its reads took.

    profiler = Profiler(model)
    model.streamer.watch = profiler
    ...generate...
    profiler.steps, profiler.routes()

The time from the end of one step to the end of the next is that of the generating thread,
which at any moment waits for reads, runs Python, or computes, itself or by waiting for what it
queued: `waiting`, `host` and `compute`. A step that verifies drafts has `drafting` (the
head) and `verifying` in place of `compute`, a rehearsed one `rehearsing` besides. The
parts add up to the time; a thread that is ready and not run counts as compute. What it ran is
looked at after one step in LOOK, and shared out among them by their time without waits.

What is kept grows by some tens of bytes per step, layer and read, since it lies in the
memory that is being measured; what it means is worked out when it is asked for.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kernels import backend

from .executor import Executor
from .experts import stored_bytes
from .routes import Call, Group, Pass, Routes

PARTS = ("compute", "waiting", "host", "drafting", "verifying", "rehearsing")
LOOK = 8  # generated steps for each look at what is resident and at the thread's own time
TAKE = 64  # generated steps for each time that calls and reads are taken; a multiple of it
KINDS = ("prefill", "decode", "verify", "draft", "rehearse")  # the first four: `streamer.routes`
NUMBERS = {kind: i for i, kind in enumerate(KINDS)}
PREFILL, DECODE, VERIFY, DRAFT, REHEARSE = range(len(KINDS))
COLUMNS, CALL = 8, 4  # numbers kept of a pass; of a call
SEEN = 1024  # calls counted at once


class Step(NamedTuple):
    """One pass of the trunk with what led to it. seconds: since the profiler began, at its
    end; parts: seconds by PARTS; asked: distinct experts of its layers, the head's
    too; misses: those that were read; calls: layers that missed."""

    kind: str
    seconds: float
    rows: int
    parts: tuple[float, ...]
    asked: int
    misses: int
    calls: int


class Read(NamedTuple):
    """queued: seconds before it began; took: until it was there; generated: it was told of
    after the first generated step."""

    nbytes: int
    queued: float
    took: float
    generated: bool


class Profiler:
    """A `streamer.watch.Watch` that keeps what it is told."""

    def __init__(self, model: Any):
        streamer = model.streamer
        opened = streamer.opened
        self._model = model
        self._runs: list[Executor] = streamer.executors
        self._store, self._counters = streamer.store, streamer.counters
        self._head = len(opened.trunk_layers)
        self._counts = [layer.count for layer in opened.layers]
        self._width = max(self._counts, default=1)
        shape = len(self._counts), self._width
        self._use, self._missed = (np.zeros(shape, dtype=np.int64) for _ in range(2))
        self._resident = [np.zeros(run.pool.total, dtype=np.int64) for run in self._runs]
        native = backend.native()
        self._choices = _Choices() if native is None else native.Choices()
        self._computed = float if native is None else native.computed  # by this thread itself
        self.chose = self._choices.add  # nothing in between, where it is called for every layer
        self._ids, self._absent = array("H"), array("H")  # of all calls taken
        self._calls = array("i")  # CALL numbers each: layer, ids, k, missed
        self._counted = self._counted_ids = self._counted_absent = 0  # that `_note` has seen
        self._asked: dict[int, list[int]] = {}  # by passes before them: asked, misses, calls
        # COLUMNS each: kind, rows, seconds, clock, waits, computing and calls so far, kept
        self._passes = array("d")
        self._recent: list[tuple[float, ...]] = []  # those not yet there
        self._ran = array("d")  # clock less waits, processor time: after some of the passes
        self._generated = 0  # steps
        self._looked = 0  # generated steps after which residency was seen
        self._reads = array("d")
        self._prompt = 0  # reads before the first generated token
        self.began = time.perf_counter()
        self._waits = self._counters.io_wait_seconds  # before the first
        self._before_all = self._computed()
        self._ran.extend((self.began - self._waits, time.thread_time()))

    def step(self, kind: str, rows: int, seconds: float) -> None:
        number = NUMBERS[kind]
        if number <= VERIFY:
            for run in self._runs:
                if run.unread:
                    run.settle()  # layers that are wholly resident are told now
        kept = rows if number == PREFILL else number <= VERIFY
        waits, now = self._counters.io_wait_seconds, time.perf_counter()
        told = number, rows, seconds, now, waits, self._computed(), self._choices.count, kept
        self._recent.append(told)
        if number == PREFILL:
            self._ran.extend((now - waits, time.thread_time()))
            self._take()
        elif number <= VERIFY:
            self._generated += 1
            if self._generated % LOOK == 1:
                self._now_and_then(now - waits)

    def _now_and_then(self, clock: float) -> None:
        """What each step would be slowed by."""
        self._ran.extend((clock, time.thread_time()))
        self._look()
        if self._generated % TAKE == 1:
            self._take()
        if self._generated == 1:
            self._prompt = len(self._reads) // 3

    def accepted(self, drafts: int) -> None:
        """Of the last verify pass."""
        if self._recent:
            self._recent[-1] = (*self._recent[-1][:-1], 1 + drafts)
        else:
            self._passes[-1] = 1 + drafts

    def end(self) -> None:
        """Nothing more is told: the next reads are for others to know."""
        self._take()
        self._store = None

    def _take(self) -> None:
        """What was kept elsewhere meanwhile."""
        self._passes.frombytes(np.array(self._recent, dtype=float).tobytes())
        self._recent.clear()
        for held, more in zip(
            (self._calls, self._ids, self._absent), self._choices.take(), strict=True
        ):
            held.frombytes(more)
        if self._store is not None:
            self._reads.frombytes(self._store.take_log().tobytes())

    def _note(self) -> None:
        """Count what was told since the last time; not while a run goes on, which it would slow."""
        self._take()
        while len(self._calls) // CALL > self._counted:
            first = self._counted * CALL
            calls = np.array(self._calls[first : first + SEEN * CALL]).reshape(-1, CALL)
            layers, sizes, _, gone = calls.T
            before = self._before(np.arange(self._counted, self._counted + len(calls)))
            began, first = self._counted_ids, self._counted_absent
            self._counted_ids += int(sizes.sum())
            self._counted_absent += int(gone.sum())
            self._counted += len(calls)
            ids = np.array(self._ids[began : self._counted_ids], dtype=np.int64)
            keys = np.repeat(np.arange(len(calls)) * self._width, sizes) + ids
            chosen = np.bincount(keys, minlength=len(calls) * self._width).reshape(len(calls), -1)
            np.add.at(self._use, layers, chosen)
            absent = np.array(self._absent[first : self._counted_absent], dtype=np.int64)
            np.add.at(self._missed, (np.repeat(layers, gone), absent), 1)
            distinct = (chosen > 0).sum(axis=1).tolist()
            for n, asked, misses in zip(before.tolist(), distinct, gone.tolist(), strict=True):
                counts = self._asked.setdefault(n, [0, 0, 0])
                for i, more in enumerate((asked, misses, misses > 0)):
                    counts[i] += more

    def _table(self) -> np.ndarray:
        """[passes, COLUMNS], of those taken."""
        return np.array(self._passes).reshape(-1, COLUMNS)

    def _before(self, calls: np.ndarray) -> np.ndarray:
        """How many passes had ended when these calls, by number, were told of."""
        ended = self._table()[:, 6]
        return np.searchsorted(ended, calls, side="right")

    def _look(self) -> None:
        """Note which experts are in memory."""
        self._looked += 1
        for run, counts in zip(self._runs, self._resident, strict=True):
            counts += np.concatenate(run.pool.slot_of) >= 0

    @property
    def steps(self) -> list[Step]:
        self._note()
        return list(self._made())

    def _made(self) -> Iterator[Step]:
        """Of the trunk's passes, with what was told since the one before."""
        table = self._table()
        ends = self._processor(table[:, 3] - table[:, 4]).tolist()
        mark, waits, cpu, done = self.began, self._waits, self._ran[1], self._before_all
        drafted = rehearsed = waited = 0.0
        counts = [0, 0, 0]
        for n, (kind, count, seconds, now, stood, computed, *_) in enumerate(table.tolist()):
            ran = ends[n]
            counts = [sum(two) for two in zip(counts, self._asked.get(n, (0, 0, 0)), strict=True)]
            waited += stood - waits
            # waits inside a draft, whose experts are paged too, stay waits
            spent = max(0.0, seconds - (stood - waits))
            waits = stood
            if kind == DRAFT:
                drafted += spent
            elif kind == REHEARSE:
                rehearsed += spent
            else:
                whole, apart = now - mark, waited + drafted + rehearsed
                gap = max(0.0, whole - seconds - drafted)
                host = min(max(gap, ran - cpu - (computed - done)), max(0.0, whole - apart))
                rest = max(0.0, whole - apart - host)
                two = (0.0, rest) if kind == VERIFY else (rest, 0.0)
                parts = two[0], waited, host, drafted, two[1], rehearsed
                yield Step(KINDS[int(kind)], now - self.began, int(count), parts, *counts)
                mark, drafted, rehearsed, waited, counts = now, 0.0, 0.0, 0.0, [0, 0, 0]
            cpu, done = ran, computed

    def _processor(self, clock: np.ndarray) -> np.ndarray:
        """Processor seconds of the generating thread by its clock, waits taken off: between the
        times that were looked at, and after the last of them, as in proportion."""
        at, ran = np.array(self._ran).reshape(-1, 2).T
        at = np.maximum.accumulate(at)
        share = np.diff(ran[-2:]).sum() / max(1e-9, np.diff(at[-2:]).sum())
        return np.interp(clock, at, ran) + share * np.maximum(0.0, clock - at[-1])

    @property
    def ended(self) -> list[Read]:
        """In the order they were told of."""
        self._take()
        rows = np.array(self._reads).reshape(-1, 3).tolist()
        return [Read(int(n), q, t, i >= self._prompt) for i, (n, q, t) in enumerate(rows)]

    def residency(self) -> list[np.ndarray]:
        """Of each layer's experts the share of generated steps after which it was in memory.

        Looked at after one in LOOK of them.
        """
        found = [np.zeros(n) for n in self._counts]
        for run, counts in zip(self._runs, self._resident, strict=True):
            ends = np.cumsum([len(table) for table in run.pool.slot_of])[:-1]
            for number, share in zip(run.numbers, np.split(counts, ends), strict=True):
                found[number] = share / max(1, self._looked)
        return found

    @property
    def use(self) -> list[np.ndarray]:
        """How often each layer's experts were chosen, by row."""
        self._note()
        return self._by_layer(self._use)

    @property
    def missed(self) -> list[np.ndarray]:
        """How often each layer's experts were read."""
        self._note()
        return self._by_layer(self._missed)

    def _by_layer(self, table: np.ndarray) -> list[np.ndarray]:
        return [row[:n] for row, n in zip(table, self._counts, strict=True)]

    def routes(self) -> Routes:
        """The run as a recording, to replay pools and policies on. Its tokens are not known."""
        self._take()
        opened = self._model.streamer.opened
        routes = Routes(
            model=opened.name,
            fingerprint=opened.checkpoint.fingerprint,
            counts=tuple(self._counts),
            head=self._head,
            top_k=opened.top_k,
            groups=tuple(
                Group(tuple(r.numbers), r.pool.slots, stored_bytes(r.arrays.format))
                for r in self._runs
            ),
        )
        within: list[int] = []  # by passes before a call: that which it belongs to
        for kind, rows, *_, kept in self._table().tolist():
            within.append(len(routes.passes))  # a rehearsal lies inside the one that follows
            if kind != REHEARSE:
                tokens = np.full(int(rows), -1, dtype=np.int32)
                routes.passes.append(Pass(KINDS[int(kind)], 0, tokens, int(kept)))
        at, ids = 0, np.array(self._ids)
        calls = np.array(self._calls).reshape(-1, CALL)
        places = self._before(np.arange(len(calls))).tolist()
        for before, (layer, size, k, _) in zip(places, calls.tolist(), strict=True):
            # of a pass that was cut short no end was told
            if before < len(within):
                routes.calls.append(Call(within[before], layer, ids[at : at + size].reshape(-1, k)))
            at += size
        return routes


class _Choices:
    """`kernels.native.Choices`, where the extension is not built."""

    def __init__(self) -> None:
        self._calls, self._ids, self._missed = array("i"), array("H"), array("H")
        self.count = 0

    def add(self, layer: int, ids: np.ndarray, missed: Sequence[int]) -> None:
        self._ids.extend(ids.reshape(-1).tolist())
        self._missed.extend(missed)
        self._calls.extend((layer, ids.size, ids.shape[-1], len(missed)))
        self.count += 1

    def take(self) -> tuple[bytes, bytes, bytes]:
        """Of the calls since the last time: layer, ids, k, missed (int32), ids, missed (uint16)."""
        held = self._calls, self._ids, self._missed
        self._calls, self._ids, self._missed = array("i"), array("H"), array("H")
        calls, ids, missed = (one.tobytes() for one in held)
        return calls, ids, missed
