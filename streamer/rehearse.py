"""Rehearse a pass with what is resident, fetch what it named, resume where it went wrong.

A rehearsal runs the whole model with the slot tables on the device and absent experts
weighing zero, and reads all routers back at once. Up to the first decoder layer that chose
an absent expert it is the true pass; with none absent it is the pass, after one read-back.
Otherwise every absent expert that was named is queued, nearest layer first, the caches go
back, and the pass is run again: layers before the first incomplete one hand out what they
gave; the others run layer by layer while their reads are under way. Source: DESIGN section 4.

Limits: a pass over few rows only; the decoder layers must be one list of modules, called
once each, with what happens between them depending on their outputs alone.

    model, tokenizer = load(path, executor="rehearse")
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

Choice = Literal["auto", "layerwise", "rehearse"]
EXECUTORS: tuple[Choice, ...] = ("auto", "layerwise", "rehearse")
Saved = list[tuple[Any, int | None, dict[str, Any]]]  # thing, its place if no cache, what it held

TRIAL, PERIOD, RETRIAL = 6, 96, 3  # passes of a first trial; between trials; of a later one
WINDOW = 24  # passes whose median is a way's cost


class Costs:
    """Median seconds from one pass to the next, of each way to run it; for `auto`."""

    def __init__(self) -> None:
        self._seconds: tuple[deque[float], ...] = (deque(maxlen=WINDOW), deque(maxlen=WINDOW))
        self._plan: deque[bool] = deque(([True] * TRIAL + [False] * TRIAL) * 2)
        self._since = 0

    def rehearses(self) -> bool:
        """Whether the next pass is to be rehearsed."""
        if self._plan:
            return self._plan.popleft()
        better = self._median(True) < self._median(False)
        self._since += 1
        if self._since >= PERIOD:
            self._since = 0
            self._plan.extend([not better] * RETRIAL)
        return better

    def record(self, rehearsed: bool, seconds: float) -> None:
        self._seconds[rehearsed].append(seconds)

    def _median(self, rehearsed: bool) -> float:
        return statistics.median(self._seconds[rehearsed] or [0.0])


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
        self._last: tuple[int, bool, float] | None = None  # rows, rehearsed, when it began
        self._notes: list[tuple[int, Note]] = []  # decoder layer, what its switch chose
        self._outputs: list[Any] = []
        self._after: list[Saved] = []
        self._known: set[int] = set()  # ids of the caches of this pass
        self._at = -1
        self._first = 0  # the layer to resume at
        self._noting = False  # in a rehearsal
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
            rows, rehearsed, began = self._last
            self._costs.setdefault(rows, Costs()).record(rehearsed, now - began)
            self._last = None
        rows = tokens.size
        if cache is None or self._running or not self._takes(rows):
            return forward()
        if self._choice == "auto":
            rehearse = self._costs.setdefault(rows, Costs()).rehearses()
            self._last = rows, rehearse, now
            if not rehearse:
                return forward()
        self._running = True
        try:
            return self._pass(forward, rows, list(leaves(cache)), cache)
        finally:
            self._running = False
            self._first, self._noting = 0, False
            self._notes, self._outputs, self._after = [], [], []
            for run in self._runs:
                run.note = None
                run.release()

    def _takes(self, rows: int) -> bool:
        return all(run.takes(rows * self._top_k) for run in self._runs)

    def part(self, index: int, call: Callable[[], Any], arguments: Sequence[Any]) -> Any:
        """A decoder layer's call."""
        if not self._running:
            return call()
        caches = [c for a in arguments if id(a) in self._known for c in leaves([a])]
        if index < self._first:
            for thing, place, state in self._after[index]:
                restore(thing, state)
                if place is not None and arguments[place] is not thing:  # another in every pass
                    restore(arguments[place], state)
            return self._outputs[index]
        if not self._noting:
            for one in caches:
                forget(one)
            return call()
        self._at = index
        y = call()
        self._outputs.append(y)
        # what else a layer is given it may change too (kimi_k3's residual blocks, deepseek_v41's
        # dictionary of what layers share)
        numbered = enumerate(arguments)
        others = [(a, i) for i, a in numbered if id(a) not in self._known and _holds(a)]
        things = [*((c, None) for c in caches), *others]
        self._after.append([(thing, place, save(thing)) for thing, place in things])
        return y

    def _pass(self, forward: Callable[[], Any], rows: int, caches: list[Any], cache: Any) -> Any:
        self._known = {id(c) for c in (*cache, *caches)}
        before = [(c, save(c)) for c in caches]
        began = time.perf_counter()
        y = self._rehearse(forward)
        if (watch := self._runs[0].watch) is not None:
            watch.step("rehearse", rows, time.perf_counter() - began)
        if not self._notes:
            return y
        named = [(at, note, note.run.named(note)) for at, note in self._notes]
        layers = (at for at, _, (_, absent) in named if len(absent))
        first = min(layers, default=len(self._outputs))
        for at, note, (hits, _) in named:
            if at < first:
                note.run.settled(note, hits)
        self._counters.exact_layers += first
        if first == len(self._outputs):
            return y
        del y
        missed = self._counters.misses
        self._fetch([(at - first, n, found) for at, n, found in named if at >= first], rows)
        for one, state in before:
            restore(one, state)
        self._first = first
        y = forward()
        self._counters.rehearsed_misses += self._counters.misses - missed
        return y

    def _rehearse(self, forward: Callable[[], Any]) -> Any:
        """Run with what is resident, and read back what was chosen."""
        for run in self._runs:
            run.note = lambda note: self._notes.append((self._at, note))
        self._noting = True
        y = forward()
        self._noting = False
        for run in self._runs:
            run.note = None
        if self._notes:
            mx.eval([note.indices for _, note in self._notes])
            self._counters.syncs += 1
            self._counters.rehearsals += 1
        return y

    def _fetch(
        self, named: list[tuple[int, Note, tuple[np.ndarray, np.ndarray]]], rows: int
    ) -> None:
        for _, note, (hits, _) in named:
            note.run.pool.expect(note.layer, hits)
        kept: Counter[int] = Counter()
        for _, note, (hits, _) in named:
            kept[id(note.run)] += len(hits)
        for ahead, note, (_, absent) in named:
            run = note.run
            # a layer's own experts must fit besides, and what was named stays
            spare = run.pool.slots - max(kept[id(run)], rows * self._top_k)
            run.prefetch(note.layer, absent, ahead, max(0, spare - run.ahead.held))


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
