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
from collections import deque
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .executor import Executor
from .experts import stored_bytes
from .routes import Call, Group, Pass, Routes

PARTS = ("compute", "waiting", "host", "drafting", "verifying", "rehearsing")
LOOK = 4  # generated steps for each look at what is resident
BATCH = 16  # steps for each count of what was told
COLUMNS, ASKED = 12, 9  # numbers kept of a step; which of them is `asked`
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


class _Told(NamedTuple):
    """slots: that the ids had, where some were absent; within: which pass; step: which step."""

    layer: int
    ids: np.ndarray
    slots: np.ndarray | None
    within: int
    step: int


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
        self._told: list[_Told] = []  # since the last count
        self._count = 0  # of steps
        self._generated = self._looked = 0  # generated steps; those after which residency was seen
        self._steps = array("d")
        self._ended: deque[tuple[int, float, float]] = deque()  # reads, since the last count
        self._reads = array("d")
        self._prompt = 0  # reads before the first generated token
        self._calls = array("i")  # pass, layer, rows, k
        self._ids = array("H")
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
            run._settle()  # all is evaluated; layers that are wholly resident are told now
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
                0, self._misses, self._missing,
            )
        )  # fmt: skip
        self._passed(kind, rows, rows if kind == "prefill" else 1)
        if kind != "prefill":
            self._generated += 1
            if self._generated == 1:
                self._drain()
                self._prompt = len(self._reads) // 3
            if self._generated % LOOK == 1:
                self._look()
        self._count += 1
        if kind == "prefill" or self._count % BATCH == 0:
            self._note()
            self._drain()
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
        self._told.append(_Told(layer, ids, slots, self._routed, self._count))

    def _note(self) -> None:
        """Count what was told in the last steps, all at once, which is cheaper."""
        told, self._told = self._told, []
        if not told:
            return
        flat = [call.ids.reshape(-1) for call in told]
        sizes = [len(f) for f in flat]
        experts = np.concatenate(flat).astype(np.int64)
        layers = np.array([call.layer for call in told])
        keys = np.repeat(np.arange(len(told)) * self._width, sizes) + experts
        chosen = np.bincount(keys, minlength=len(told) * self._width).reshape(len(told), -1)
        np.add.at(self._use, layers, chosen)
        parts = [
            np.zeros(n, dtype=bool) if call.slots is None else call.slots.reshape(-1) < 0
            for n, call in zip(sizes, told, strict=True)
        ]
        absent = np.unique(keys[np.concatenate(parts)])
        if len(absent):
            calls, missed = np.divmod(absent, self._width)
            np.add.at(self._missed, (layers[calls], missed), 1)
        distinct = (chosen > 0).sum(axis=1).tolist()
        for call, size, asked in zip(told, sizes, distinct, strict=True):
            k = call.ids.shape[-1]
            self._calls.extend((call.within, call.layer, size // k, k))
            if call.step < len(self._steps) // COLUMNS:  # of a pass cut short there is none
                self._steps[call.step * COLUMNS + ASKED] += asked
        self._ids.frombytes(experts.astype(np.uint16).tobytes())

    def waited(self, seconds: float) -> None:
        self._waited += seconds
        self._inside += seconds

    def read(self, nbytes: int, queued: float, seconds: float) -> None:
        self._ended.append((nbytes, queued, seconds))

    def accepted(self, drafts: int) -> None:
        """Of the last verify pass."""
        self._passes[-1] = 1 + drafts

    def _drain(self) -> None:
        """Keep the reads told of so far in less memory; others may be told of meanwhile."""
        ended = self._ended
        self._reads.extend(chain.from_iterable(ended.popleft() for _ in range(len(ended))))

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
        table = np.array(self._steps).reshape(-1, COLUMNS)
        return [
            Step(KINDS[int(r[0])], r[1], int(r[2]), tuple(r[3:9]), *map(int, r[9:]))
            for r in table.tolist()
        ]

    @property
    def reads(self) -> list[Read]:
        """In the order they were told of."""
        self._drain()
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
        self._note()
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
        for step, layer, rows, k in np.array(self._calls).reshape(-1, 4).tolist():
            # of a pass that was cut short no end was told
            if step < len(routes.passes):
                experts = ids[at : at + rows * k].reshape(rows, k)
                routes.calls.append(Call(step, layer, experts))
            at += rows * k
        return routes
