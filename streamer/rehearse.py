"""Rehearse the next layers with what is resident, fetch what they named, go on where it was wrong.

A rehearsal runs `span` decoder layers with the slot tables on the device and absent experts
weighing zero, and reads their routers back at once. Up to the first layer that chose an
absent expert it is the true pass. That layer's reads are queued as demands, those that the
layers behind it named as guesses, nearest first; then it is run again, truly, while its
reads come, and the next `span` layers are rehearsed behind it. Layers that were right hand
out what they gave. With a span of all layers (`rehearse`) a pass without misses is read back
once; with a short one (`lookahead`) a guess rests on a state that is nearly true, and what is
computed twice is computed while the disk is busy. Source: DESIGN section 4.

Limits: a pass over few rows only; the decoder layers must be one list of modules, called
once each, with what happens between them depending on their outputs alone.

    model, tokenizer = load(path, executor="lookahead")
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp.rollback import forget, leaves

from .counters import Counters
from .executor import Executor, Note

Choice = Literal["auto", "layerwise", "lookahead", "rehearse"]
EXECUTORS: tuple[Choice, ...] = ("auto", "layerwise", "lookahead", "rehearse")
LOOKAHEAD = 2  # layers
Saved = list[tuple[Any, int | None, dict[str, Any]]]  # thing, its place if no cache, what it held

TRIAL, RETRIAL = 4, 3  # passes of a first trial; of a later one
NEAR = 1.3  # ways within this of the best are tried twice
PROBING = 0.003  # share of time that trials of one other way may cost
WINDOW = 24  # passes whose median is a way's cost


class Costs:
    """Median seconds from one pass to the next, of each way to run it; for `auto`.

    All ways are tried at first, those that are far behind only once; later one other way at a
    time, the more rarely the slower it was.
    """

    def __init__(self, ways: int) -> None:
        self._seconds: list[deque[float]] = [deque(maxlen=WINDOW) for _ in range(ways)]
        self._plan: deque[int] = deque(way for way in range(ways) for _ in range(TRIAL))
        self._rounds = 1
        self._debt = [0.0] * ways  # of the time since its last trial, what a trial may cost

    def choose(self) -> int:
        """The way of the next pass."""
        if not self._plan and self._rounds:
            self._rounds -= 1
            least = min(map(self._median, range(len(self._seconds))))
            near = [w for w in range(len(self._seconds)) if self._median(w) < NEAR * least]
            self._plan.extend(way for way in near for _ in range(TRIAL) if len(near) > 1)
        if not self._plan:
            best = min(range(len(self._seconds)), key=self._median)
            for way in range(len(self._seconds)):
                self._debt[way] += PROBING * self._median(best)
                lost = RETRIAL * max(
                    0.05 * self._median(best), self._median(way) - self._median(best)
                )
                if way != best and self._debt[way] > lost:
                    self._debt[way] = 0.0
                    self._plan.extend([way] * RETRIAL)
                    break
            else:
                return best
        return self._plan.popleft()

    def record(self, way: int, seconds: float) -> None:
        self._seconds[way].append(seconds)

    def _median(self, way: int) -> float:
        return statistics.median(self._seconds[way] or [0.0])


class Rehearsal:
    """The passes of one model, whose decoder layers and own call it stands before."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Any],
        runs: Sequence[Executor],
        top_k: int,
        choice: Choice,
    ):
        """layers: the decoder layers; runs: all executors of the model's experts."""
        self._runs, self._top_k, self._choice = list(runs), top_k, choice
        self._counters: Counters = runs[0].counters
        self._costs: dict[int, Costs] = {}  # by rows
        self._spans = {  # layers rehearsed at once; 0: none
            "layerwise": (0,),
            "lookahead": (min(LOOKAHEAD, len(layers)),),
            "rehearse": (len(layers),),
            "auto": (0, *(n for n in (1, 2, 4) if n < len(layers)), len(layers)),
        }[choice]
        self._last: tuple[int, int, float] | None = None  # rows, way, when it began
        self._notes: list[tuple[int, Note]] = []  # decoder layer, what its switch chose
        self._count = len(layers)
        self._outputs: list[Any] = [None] * self._count
        self._after: list[Saved] = [[]] * self._count
        self._known: set[int] = set()  # ids of the caches of this pass
        self._at = -1
        self._first = 0  # layers before it are done
        self._truly = False  # this one is run with all that it chose
        self._stop = 0  # and this one not at all
        self._running = False
        for index, layer in enumerate(layers):
            layer.__dict__["_rehearsal"] = self, index
            kind: type[nn.Module] = type(layer)
            layer.__class__ = _part(kind)
        model.__dict__["_rehearsal"] = self
        model.__class__ = _whole(type(model))

    def whole(self, forward: Callable[[], Any], tokens: mx.array, cache: Any) -> Any:
        """The model's call. Raises StreamerError when a read fails."""
        now = time.perf_counter()
        if self._last is not None:
            rows, way, began = self._last
            self._costs[rows].record(way, now - began)
            self._last = None
        rows = tokens.size
        if cache is None or self._running or not self._takes(rows):
            return forward()
        span = self._spans[-1]
        if self._choice == "auto":
            costs = self._costs.setdefault(rows, Costs(len(self._spans)))
            way = costs.choose()
            self._last, span = (rows, way, now), self._spans[way]
        if not span:
            return forward()
        self._running = True
        missed = self._counters.misses
        try:
            return self._pass(forward, rows, span, list(leaves(cache)), cache)
        except BaseException:
            for run in self._runs:
                run.abandon()
            raise
        finally:
            self._running = False
            self._counters.rehearsed_misses += self._counters.misses - missed
            self._notes = []
            self._outputs, self._after = [None] * self._count, [[]] * self._count
            for run in self._runs:
                run.note = None
                run.known.clear()
                run.release()

    def _takes(self, rows: int) -> bool:
        return all(run.takes(rows * self._top_k) for run in self._runs)

    def part(self, index: int, call: Callable[[], Any], arguments: Sequence[Any]) -> Any:
        """A decoder layer's call."""
        if not self._running:
            return call()
        if index == self._stop:
            raise _Enough
        if index < self._first:
            for thing, place, state in self._after[index]:
                restore(thing, state)
                if place is not None and arguments[place] is not thing:  # another in every pass
                    restore(arguments[place], state)
            return self._outputs[index]
        caches = [c for a in arguments if id(a) in self._known for c in leaves([a])]
        for one in caches:
            forget(one)
        truly = index < self._first + self._truly
        for run in self._runs:
            run.note = None if truly else self._take
        self._at = index
        y = call()
        self._outputs[index] = y
        # what else a layer is given it may change too (kimi_k3's residual blocks, deepseek_v41's
        # dictionary of what layers share)
        numbered = enumerate(arguments)
        others = [(a, i) for i, a in numbered if id(a) not in self._known and _holds(a)]
        things = [*((c, None) for c in caches), *others]
        self._after[index] = [(thing, place, save(thing)) for thing, place in things]
        return y

    def _take(self, note: Note) -> None:
        self._notes.append((self._at, note))

    def _pass(
        self, forward: Callable[[], Any], rows: int, span: int, caches: list[Any], cache: Any
    ) -> Any:
        self._known = {id(c) for c in (*cache, *caches)}
        before = [(c, save(c)) for c in caches]
        self._first, self._truly = 0, False
        while True:
            began = time.perf_counter()
            self._stop = self._first + self._truly + span
            self._notes = []
            y, ended = None, True
            try:
                y = forward()
            except _Enough:
                ended = False
            first = self._settle(began, rows, ended)
            if ended and first == self._count:
                return y
            del y
            for one, state in before:
                restore(one, state)
            self._first = first

    def _settle(self, began: float, rows: int, ended: bool) -> int:
        """Read back what was rehearsed, keep what was right and fetch what was not.

        Returns the first layer that is not yet done.
        """
        for run in self._runs:
            run.note = None
        last = self._count if ended else self._stop
        if self._notes:
            mx.eval([note.indices for _, note in self._notes])
            self._counters.syncs += 1
            self._counters.rehearsals += 1
            if (watch := self._runs[0].watch) is not None:
                watch.step("rehearse", rows, time.perf_counter() - began)
        named = [(at, note, note.run.named(note)) for at, note in self._notes]
        first = min((at for at, _, (_, absent) in named if len(absent)), default=last)
        for at, note, (hits, _) in named:
            if at < first:
                note.run.settled(note, hits)
                note.run.passed(note.layer)
        self._counters.exact_layers += first - self._first - self._truly
        self._truly = first < last
        if self._truly:
            for at, note, (_, absent) in named:
                if at == first:
                    note.run.known[note.layer] = np.array(note.indices)
                    if len(absent):
                        break  # what the layer chose after this rests on an absent expert
            self._fetch([(at - first, n, found) for at, n, found in named if at >= first], rows)
        for run in self._runs:
            run.arrived()
        return first

    def _fetch(self, named: list[tuple[int, Note, tuple[list[int], list[int]]]], rows: int) -> None:
        for _, note, (hits, _) in named:
            note.run.pool.expect(note.layer, hits)
        kept: Counter[int] = Counter()
        for _, note, (hits, _) in named:
            kept[id(note.run)] += len(hits)
        for ahead, note, (_, absent) in named:
            run = note.run
            # a layer's own experts must fit besides, and what was named stays
            spare = run.pool.slots - max(kept[id(run)], rows * self._top_k)
            deadline = ahead and self._stop + ahead
            run.prefetch(note.layer, absent, deadline, max(0, spare - run.ahead.held))


class _Enough(Exception):
    """As many layers as were asked for have run."""


def decoder_layers(model: nn.Module, paths: Iterable[str]) -> list[Any] | None:
    """The list of modules that these switches (paths in `model`) lie in, or None."""
    owners: set[tuple[str, ...]] = set()
    for path in paths:
        parts = path.split(".")
        end = next((i for i, p in enumerate(parts) if p.isdigit()), 0)
        owners.add(tuple(parts[:end]))
    if len(owners) != 1:
        return None
    found: Any = model
    for name in owners.pop():
        found = getattr(found, name)
    if not isinstance(found, list) or not all(isinstance(layer, nn.Module) for layer in found):
        return None
    return found if len({id(layer) for layer in found}) == len(found) else None


def save(thing: Any) -> dict[str, Any]:
    """What a cache holds now: references, since its arrays change past what is held only."""
    state: dict[str, Any] = {}
    for name, value in _attributes(thing).items():
        if isinstance(value, list):
            state[name] = list(value)
        elif _holds(value):
            state[name] = _Inner(value, save(value))
        elif not callable(value):
            state[name] = value
    return state


def _attributes(thing: Any) -> dict[str, Any]:
    return thing if type(thing) is dict else vars(thing)


def _holds(value: Any) -> bool:
    """An object with attributes of its own, or a dictionary; not a function, array or module."""
    if type(value) is dict:  # a module is one, too
        return True
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, mx.array)


def restore(thing: Any, state: dict[str, Any]) -> None:
    """As when `state` was saved; a state may be restored more than once."""
    for name, value in state.items():
        if isinstance(value, _Inner):
            restore(value.thing, value.state)
            value = value.thing
        _attributes(thing)[name] = list(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _Inner:
    thing: Any
    state: dict[str, Any]


# the classes keep their module: `mtp.rollback` looks functions up there


@functools.cache
def _part(kind: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        rehearsal, index = self.__dict__["_rehearsal"]
        arguments = (*args, *kwargs.values())
        return rehearsal.part(index, lambda: kind.__call__(self, *args, **kwargs), arguments)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@functools.cache
def _whole(kind: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(kind.__call__)
    def call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", args[0] if args else None)
        rehearsal = self.__dict__["_rehearsal"]
        return rehearsal.whole(lambda: kind.__call__(self, inputs, *args, **kwargs), inputs, cache)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
