"""What each step of a run spent, what its routers chose, and what its reads took.

    profiler = Profiler(model)
    model.streamer.watch = profiler
    ...generate...
    profiler.steps, profiler.routes()

The time from the end of one step to the end of the next is that of the generating thread,
which at any moment waits for reads, runs Python, or waits for what it queued to be
computed: `waiting`, `host` and `compute`. A step that verifies drafts has `drafting` (the
head) and `verifying` in place of `compute`, a rehearsed one `rehearsing` besides. The
parts add up to the time; a thread that is ready and not run counts as compute.

What is kept grows by some tens of bytes per step, layer and read, since it lies in the
memory that is being measured.
"""

from __future__ import annotations

import time
from array import array
from typing import Any, NamedTuple

import numpy as np

from .executor import Executor
from .experts import stored_bytes
from .routes import Call, Group, Pass, Routes

PARTS = ("compute", "waiting", "host", "drafting", "verifying", "rehearsing")
LOOK = 8  # generated steps for each look at what is resident
BATCH = 16  # steps for each time that what was told is put away
COLUMNS, CALL = 11, 5  # numbers kept of a step; of a call
SEEN = 1024  # calls counted at once
KINDS = ("prefill", "decode", "verify", "draft")  # as in `streamer.routes`


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
        self._places: dict[int, tuple[Executor, int]] = {
            number: (run, i) for run in self._runs for i, number in enumerate(run.numbers)
        }
        self._head = len(opened.trunk_layers)
        self._counts = [layer.count for layer in opened.layers]
        self._width = max(self._counts, default=1)
        shape = len(self._counts), self._width
        self._use, self._missed = (np.zeros(shape, dtype=np.int64) for _ in range(2))
        self._resident = [np.zeros(n, dtype=np.int64) for n in self._counts]
        # calls told of since they were last put away: pass, layer, ids, slots they had, step
        self._told: list[tuple[int, int, np.ndarray, np.ndarray | None, int]] = []
        self._ids, self._absent = array("H"), array("b")  # of all calls put away
        self._calls = array("i")  # CALL numbers each: pass, layer, ids, k, step
        self._counted = self._counted_ids = 0  # calls and ids that `_note` has seen
        self._asked: list[int] = []  # by step
        self._count = 0  # of steps
        self._generated = self._looked = 0  # generated steps; those after which residency was seen
        self._steps = array("d")
        self._ended: list[np.ndarray] = []  # reads, since they were put away
        self._reads = array("d")
        self._prompt = 0  # reads before the first generated token
        self._passes = array("i")  # kind, rows, kept
        self._routed = 0  # the pass that is to be told next
        self.began = self._mark = time.perf_counter()
        self._cpu = time.thread_time()
        self._clear()

    def _clear(self) -> None:
        self._waited = self._drafted = self._rehearsed = self._inside = 0.0
        self._misses = self._missing = 0

    def step(self, kind: str, rows: int, seconds: float) -> None:
        now, cpu = time.perf_counter(), time.thread_time()
        if kind in ("draft", "rehearse"):
            # waits inside a draft, whose experts are paged too, stay waits
            spent = max(0.0, seconds - self._inside)
            self._inside = 0.0
            if kind == "draft":
                self._drafted += spent
                self._passed("draft", rows, 0)
            else:
                self._rehearsed += spent
            self._cpu = cpu
            return
        for run in self._runs:
            run.settle()  # all is evaluated; layers that are wholly resident are told now
        whole = now - self._mark
        apart = self._waited + self._drafted + self._rehearsed
        gap = max(0.0, whole - seconds - self._drafted)
        host = min(max(gap, cpu - self._cpu), max(0.0, whole - apart))
        rest = max(0.0, whole - apart - host)
        plain = kind != "verify"
        self._steps.extend(
            (
                KINDS.index(kind), now - self.began, rows,
                rest if plain else 0.0, self._waited, host, self._drafted,
                0.0 if plain else rest, self._rehearsed,
                self._misses, self._missing,
            )
        )  # fmt: skip
        self._passed(kind, rows, rows if kind == "prefill" else 1)
        if kind != "prefill":
            self._generated += 1
            if self._generated == 1:
                self._put_away()
                self._prompt = len(self._reads) // 3
            if self._generated % LOOK == 1:
                self._look()
        self._count += 1
        if kind == "prefill" or self._count % BATCH == 0:
            self._put_away()
        self._mark, self._cpu = now, cpu
        self._clear()

    def chose(self, layer: int, ids: np.ndarray, misses: int) -> None:
        slots = None
        if misses:
            run, at = self._places[layer]
            slots = run.pool.slot_of[at][ids]
            for inside, expert in run.fresh:  # read ahead for this: a miss too
                if inside == at:
                    slots[ids == expert] = -1
            self._misses += misses
            self._missing += 1
        self._told.append((self._routed, layer, ids, slots, self._count))

    def _put_away(self) -> None:
        """Keep what was told so far in less memory, all at once, which is cheaper."""
        ended, told = self._ended[:], self._told
        del self._ended[: len(ended)]  # others may be told of meanwhile
        self._reads.frombytes(b"".join([rows.tobytes() for rows in ended]))
        self._told = []
        if not told:
            return
        # joining bytes is quicker than joining small arrays
        ids = b"".join([call[2].astype(np.uint32, copy=False).tobytes() for call in told])
        slots = b"".join([bytes(4 * c[2].size) if c[3] is None else c[3].tobytes() for c in told])
        self._ids.frombytes(np.frombuffer(ids, np.uint32).astype(np.uint16).tobytes())
        self._absent.frombytes((np.frombuffer(slots, np.int32) < 0).tobytes())
        rows = [(within, layer, c.size, c.shape[-1], step) for within, layer, c, _, step in told]
        self._calls.frombytes(np.array(rows, dtype=np.intc).tobytes())

    def _note(self) -> None:
        """Count what was told since the last time; not while a run goes on, which it would slow."""
        self._put_away()
        while len(self._calls) // CALL > self._counted:
            first = self._counted * CALL
            calls = np.array(self._calls[first : first + SEEN * CALL]).reshape(-1, CALL)
            _, layers, sizes, _, steps = calls.T
            began = self._counted_ids
            self._counted_ids += int(sizes.sum())
            self._counted += len(calls)
            ids = np.array(self._ids[began : self._counted_ids], dtype=np.int64)
            keys = np.repeat(np.arange(len(calls)) * self._width, sizes) + ids
            chosen = np.bincount(keys, minlength=len(calls) * self._width).reshape(len(calls), -1)
            np.add.at(self._use, layers, chosen)
            absent = np.unique(keys[np.array(self._absent[began : self._counted_ids], dtype=bool)])
            if len(absent):
                call, missed = np.divmod(absent, self._width)
                np.add.at(self._missed, (layers[call], missed), 1)
            self._asked.extend([0] * (int(steps.max()) + 1 - len(self._asked)))
            distinct = (chosen > 0).sum(axis=1).tolist()
            for step, asked in zip(steps.tolist(), distinct, strict=True):
                self._asked[step] += asked

    def waited(self, seconds: float) -> None:
        self._waited += seconds
        self._inside += seconds

    def reads(self, ended: np.ndarray) -> None:
        self._ended.append(ended)

    def accepted(self, drafts: int) -> None:
        """Of the last verify pass."""
        self._passes[-1] = 1 + drafts

    def _look(self) -> None:
        """Note which experts are in memory."""
        self._looked += 1
        for number, (run, layer) in self._places.items():
            self._resident[number] += run.pool.slot_of[layer] >= 0

    def _passed(self, kind: str, rows: int, kept: int) -> None:
        self._passes.extend((KINDS.index(kind), rows, kept))
        self._routed += 1

    @property
    def steps(self) -> list[Step]:
        self._note()
        rows = np.array(self._steps).reshape(-1, COLUMNS).tolist()
        asked = [*self._asked, *[0] * (len(rows) - len(self._asked))]
        return [
            Step(KINDS[int(r[0])], r[1], int(r[2]), tuple(r[3:9]), n, int(r[9]), int(r[10]))
            for r, n in zip(rows, asked, strict=False)  # of a pass cut short there is no step
        ]

    @property
    def ended(self) -> list[Read]:
        """In the order they were told of."""
        self._put_away()
        rows = np.array(self._reads).reshape(-1, 3).tolist()
        return [Read(int(n), q, t, i >= self._prompt) for i, (n, q, t) in enumerate(rows)]

    def residency(self) -> list[np.ndarray]:
        """Of each layer's experts the share of generated steps after which it was in memory.

        Looked at after one in LOOK of them.
        """
        return [n / max(1, self._looked) for n in self._resident]

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
        self._put_away()
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
        for kind, rows, kept in np.array(self._passes).reshape(-1, 3).tolist():
            tokens = np.full(rows, -1, dtype=np.int32)
            routes.passes.append(Pass(KINDS[kind], 0, tokens, kept))
        at, ids = 0, np.array(self._ids)
        for step, layer, size, k, _ in np.array(self._calls).reshape(-1, CALL).tolist():
            # of a pass that was cut short no end was told
            if step < len(routes.passes):
                routes.calls.append(Call(step, layer, ids[at : at + size].reshape(-1, k)))
            at += size
        return routes
