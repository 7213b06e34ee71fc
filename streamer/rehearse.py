"""Run the layers that come next with what is resident, to learn what they will need.

A rehearsed layer has its slot table on the device and absent experts weighing zero, and is
read back with others or while the disk is busy anyway. Two ways of a pass use it:

`lookahead` goes layer by layer. Where a layer has to wait for reads, the layers behind it are
rehearsed, one by one for as long as it waits, and what they name is queued as guesses, nearest
first. Then the layer is run again, with all that has come; the half of it that comes before
its experts is kept where it can be. Layers rehearsed once are not rehearsed again in a pass.
Where the extension serves a pass (`streamer.serving`) it does so itself, for the next one, too.

`rehearse` runs all layers at once with one read-back. Up to the first layer that chose an
absent expert it is the true pass; that layer is run again, truly, while its reads and those
of the layers behind it come, and these are rehearsed anew. A pass without misses is read
back once.

`auto` chooses, see `streamer.ways`. Source: DESIGN section 4.

Limits: a pass over few rows only; the decoder layers must be one list of modules, called
once each, with what happens between them depending on their outputs alone.

    model, tokenizer = load(path, executor="lookahead")
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kernels import qwen
from mtp.rollback import forget, leaves

from .counters import Counters
from .executor import Asked, Executor, Note
from .foresee import Foresight
from .guess import sources_of
from .layers import Saved, attach, hand_out, save_all, stand_aside, stand_before
from .ways import WAYS, Choice, Effort, Seen, Way, Ways

NO_TOKENS = np.zeros(0, dtype=np.int32)
Half = Callable[[Any, mx.array, Any, Any], mx.array]  # layer, x, mask, cache


class Rehearsal:
    """The passes of one model, whose decoder layers and own call it stands before."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Any],
        runs: Sequence[Executor],
        top_k: int,
        choice: Choice,
        guess: str = "auto",
    ):
        """layers: the decoder layers; runs: all executors of the model's experts; guess: by what.

        Raises UsageError for a guesser that there is not.
        """
        self._runs, self._top_k, self._choice = list(runs), top_k, choice
        self._counters: Counters = runs[0].counters
        self._ways: dict[int, Ways] = {}  # of auto, by rows
        self._efforts: dict[int, Effort] = {}  # by rows
        self._chosen = guess not in ("off", "auto")
        named = False
        for run in runs:
            run.pace = runs[0].pace  # one disk
            run.foresight = Foresight(run, self._counters.sources)
            if guess != "off" and (choice == "auto" or self._chosen):
                sources = sources_of(guess, model, run.layers, top_k)
                run.foresight.use(sources)
                named = named or bool(sources)
        self._open = tuple(w for w in WAYS if w != "guess" or (named and not self._chosen))
        # how the last pass began
        self._last: tuple[int, Way, float, float, int, int, int] | None = None
        self._count = len(layers)
        self._running = False
        self._begun: set[int] = set()  # rows of passes that there were
        self._start()
        self._layers = list(layers)
        attach(model, layers, self)

    def _start(self) -> None:
        """As before a pass."""
        self._notes: list[tuple[int, Note]] = []  # decoder layer, what its switch chose
        self._outputs: list[Any] = [None] * self._count
        self._after: list[Saved] = [[]] * self._count
        self._rehearsed: list[tuple[Saved, Any]] = [([], None)] * self._count
        self._known: set[int] = set()  # ids of the caches of this pass
        self._before: Saved = []
        self._at = -1
        self._first = 0  # layers before it are done
        self._notes_from = 0  # and from this one on they are rehearsed
        self._stop = 0  # and this one not run at all
        # Of a lookahead: which layer and call waits; layers before `frontier` were rehearsed
        self._waiting: tuple[int, Executor, int, Asked] | None = None
        self._frontier = 0
        self._half: tuple[int, Any, Saved] | None = None  # layer, its first half, cache after it
        self._effort: Effort | None = None
        self._rows = 0
        self._looked = 0.0  # when the last layer was rehearsed

    def whole(self, forward: Callable[[], Any], tokens: mx.array, cache: Any) -> Any:
        """The model's call. Raises StreamerError when a read fails."""
        self._ended()
        rows = tokens.size
        if cache is None or self._running or not self._takes(rows):
            return forward()
        way, guess = self._way(rows)
        learns = guess or self._learns(rows)
        if way == "layerwise" and not learns:
            return forward()
        effort = self._efforts.setdefault(rows, Effort())
        looks = way == "lookahead" and self._looks_out(rows, effort)
        if way != "rehearse" and not looks and not learns:
            return forward()
        known = np.array(tokens).reshape(-1) if learns else NO_TOKENS
        for run in self._runs:
            self._sight(run).begin(known, guess=guess, rehearse=looks)
        try:
            if way != "rehearse" and (not looks or rows in self._runs[0].fetching.rows):
                return self._in_turn(forward, effort if looks else None)
            return self._before_layers(forward, cache, way, rows)
        finally:
            for run in self._runs:
                self._sight(run).end()
                run.release()

    def _before_layers(self, forward: Callable[[], Any], cache: Any, way: Way, rows: int) -> Any:
        """A pass in which each decoder layer's call is `part`."""
        self._running = True
        qwen.keep_half = self._keep_half
        stand_before(self._layers)
        missed = self._counters.misses
        caches = list(leaves(cache))
        self._known = {id(c) for c in (*cache, *caches)}
        self._before = save_all((c, None) for c in caches)
        try:
            if way == "lookahead":
                return self._lookahead(forward, rows)
            return self._pass(forward, rows)
        except BaseException:
            for run in self._runs:
                run.abandon()
            raise
        finally:
            self._running = False
            self._counters.rehearsed_misses += self._counters.misses - missed
            self._start()
            qwen.keep_half = None
            stand_aside(self._layers)
            for run in self._runs:
                run.note = run.meanwhile = run.back = None
                run.known.clear()

    def _takes(self, rows: int) -> bool:
        return all(run.takes(rows * self._top_k) for run in self._runs)

    def _way(self, rows: int) -> tuple[Way, bool]:
        """How the next pass is run, and whether guessers guess in it."""
        if self._choice != "auto":
            return self._choice, self._chosen and self._choice != "rehearse"
        if rows not in self._ways:
            self._ways[rows] = Ways(self._open, eager=rows == 1)
        way = self._ways[rows].choose()
        c = self._counters
        counts = c.io_wait_seconds, c.waits, c.bytes_wanted, c.syncs
        self._last = rows, way, time.perf_counter(), *counts
        if way == "guess":
            return "lookahead", True
        return way, self._chosen and way != "rehearse"

    def _learns(self, rows: int) -> bool:
        """Whether guessers observe a pass in which they do not guess."""
        if "guess" not in self._open or not any(self._sight(run).learns for run in self._runs):
            return False
        return rows in self._ways and self._ways[rows].hopeful("guess")

    def _sight(self, run: Executor) -> Foresight:
        assert run.foresight is not None
        return run.foresight

    def _looks_out(self, rows: int, effort: Effort) -> bool:
        """Whether a pass may have waits long enough to rehearse in."""
        if rows not in self._begun:  # the first tells how such passes are run
            self._begun.add(rows)
            return False
        return effort.worth(self._runs[0].pace.long())

    def _ended(self) -> None:
        """The pass before, and what came after it, took until now."""
        if self._last is None:
            return
        rows, way, began, waited, waits, nbytes, syncs = self._last
        self._last = None
        seconds, c = time.perf_counter() - began, self._counters
        reading = (c.bytes_wanted - nbytes) * self._runs[0].pace.each
        missing, served = c.waits - waits, c.syncs == syncs
        seen = Seen(seconds, c.io_wait_seconds - waited, missing, reading, served)
        self._ways[rows].record(way, seen)

    def part(self, index: int, call: Callable[[], Any], arguments: Sequence[Any]) -> Any:
        """A decoder layer's call."""
        if not self._running:
            return call()
        if index == self._stop or (self._waiting and self._look()):
            raise _Enough
        if index < self._first:
            return hand_out(self._after[index], self._outputs[index], arguments)
        if self._waiting and index < self._frontier:
            return hand_out(*self._rehearsed[index], arguments)
        if self._half is None or self._half[0] != index:
            for one in leaves(a for a in arguments if id(a) in self._known):
                forget(one)
        truly = index < self._notes_from
        for run in self._runs:
            run.note = None if truly else self._take
        self._at = index
        y = call()
        after = save_all((a, i) for i, a in enumerate(arguments) if id(a) not in self._known)
        known = (a for a in arguments if id(a) in self._known)
        after += save_all((c, None) for c in leaves(known))
        if truly or not self._waiting:
            self._outputs[index], self._after[index] = y, after
            return y
        self._rehearsed[index], self._frontier = (after, y), index + 1
        if index + 1 == self._count:
            self._look()
            raise _Enough
        return y

    def _take(self, note: Note) -> None:
        self._notes.append((self._at, note))

    # Layer by layer

    def _in_turn(self, forward: Callable[[], Any], effort: Effort | None) -> Any:
        """Layer by layer; `kernels.segments` rehearses in its waits, where there is an effort."""
        missed = self._counters.misses
        self._runs[0].allow(self._runs[0].pace.allowance())
        try:
            for run in self._runs:
                run.fetching.effort = effort
            return forward()
        finally:
            if effort is not None:
                self._counters.rehearsed_misses += self._counters.misses - missed
            for run in self._runs:
                run.fetching.effort = None

    def _lookahead(self, forward: Callable[[], Any], rows: int) -> Any:
        self._effort, self._rows = self._efforts[rows], rows
        self._stop = self._count
        self._runs[0].allow(self._runs[0].pace.allowance())
        for run in self._runs:
            run.meanwhile, run.back = self._meanwhile, self._came_back
        while True:
            self._notes_from, self._notes, self._waiting = self._count, [], None
            try:
                return forward()
            except _Enough:
                assert self._waiting is not None
            hand_out(self._before, None, ())
            self._first = self._waiting[0]

    def _meanwhile(self, run: Executor, layer: int, asked: Asked) -> bool:
        """Whether to rehearse the layers after this one, which waits."""
        assert self._effort is not None
        self._frontier = max(self._frontier, self._at + 1)
        if self._frontier == self._count or not self._effort.pays(run.left(asked)):
            return False
        self._waiting, self._notes_from = (self._at, run, layer, asked), self._at + 1
        self._looked = time.perf_counter()
        return True

    def _look(self) -> bool:
        """Fetch what the layer just rehearsed named; whether to stop."""
        assert self._waiting is not None and self._effort is not None
        _, run, layer, asked = self._waiting
        if not self._notes:
            return False
        notes, self._notes = self._notes, []
        mx.eval([note.indices for _, note in notes])
        self._counters.syncs += 1
        self._counters.rehearsals += 1
        for at, note in notes:
            keep = (layer, frozenset(asked.need)) if note.run is run else None
            self._sight(note.run).rehearse(note.layer, note.run.named(note), at, keep)
        now = time.perf_counter()
        if (watch := run.watch) is not None:
            watch.step("rehearse", self._rows, now - self._looked)
        self._effort.looked(now - self._looked)
        self._looked = now
        return not self._effort.goes_on(run.left(asked))

    def _came_back(self) -> None:
        """The layer that waited is run again, up to its experts."""
        assert self._effort is not None
        self._effort.resumed(time.perf_counter() - self._looked)

    def _keep_half(self, half: Half, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """`half(layer, x, mask, cache)`, kept for when the layer is run again."""
        index = layer.__dict__["_hooks"][1]
        if self._effort is None or index >= self._notes_from:
            return half(layer, x, mask, cache)
        if self._half is None or self._half[0] != index:
            y = half(layer, x, mask, cache)
            self._half = index, y, save_all([(cache, None)])
            return y
        _, y, after = self._half
        return hand_out(after, y, ())  # type: ignore[no-any-return]

    # All layers at once

    def _pass(self, forward: Callable[[], Any], rows: int) -> Any:
        truly = False
        while True:
            began = time.perf_counter()
            self._notes_from = self._first + truly
            self._stop, self._notes = self._count, []
            y = forward()
            first = self._settle(began, rows)
            if first == self._count:
                return y
            del y
            hand_out(self._before, None, ())
            self._first, truly = first, True

    def _settle(self, began: float, rows: int) -> int:
        """Read back what was rehearsed, keep what was right and fetch what was not.

        Returns the first layer that is not yet done.
        """
        for run in self._runs:
            run.note = None
        if self._notes:
            mx.eval([note.indices for _, note in self._notes])
            self._counters.syncs += 1
            self._counters.rehearsals += 1
            if (watch := self._runs[0].watch) is not None:
                watch.step("rehearse", rows, time.perf_counter() - began)
        named = [(at, note, note.run.named(note)) for at, note in self._notes]
        first = min((at for at, _, (_, absent) in named if len(absent)), default=self._count)
        for at, note, (hits, _) in named:
            if at < first:
                note.run.settled(note, hits)
                note.run.passed(note.layer)
        self._counters.exact_layers += first - self._notes_from
        if first < self._count:
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
