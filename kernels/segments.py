"""Qwen3.5's decoder layers in a row as one operation, and the states that it takes and gives.

Where experts are paged a segment ends with what a router chose and the next begins with those
experts. A chain of them runs at once and not by MLX's graph. Where nothing is guessed it brings the
experts in itself, to its end; else it looks their slots up and comes back where one is absent, with
the choice, and goes on when its read has begun.
Rows of a pass can be taken back where a `Tape` was given: keys and values are cut, and for the
states of gated delta nets the pass leaves what they were made of. `kernels.plans` makes segments
of a model.

    python -m pytest tests/test_kernels_segments.py
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from . import backend

Arrivals = Sequence[tuple[Sequence[int], Any]]  # pairs of row and choice, the ticket of their reads
States = tuple[list[mx.array], int, list[bool]]  # tokens in the caches, what may be written over
Seen = Callable[[mx.array, mx.array], None]  # x before the last norm and after it


class Serving(Protocol):
    """What stands behind the pagers of one pool, for a whole pass."""

    def begin(self) -> Any | None:
        """A `kernels.native.ExpertCache`, None where choices are to be fetched one by one."""

    def end(self, layer: int, rows: int, waited: float) -> None:
        """A pass over rows came to its last layer; seconds waited. Raises where a read failed."""

    def lost(self) -> None:
        """The pass ended otherwise, begun here or not."""


class Pager(Protocol):
    """What stands behind a switch whose experts are paged: `switch.pager`, where it has one."""

    switch: nn.Module  # mlx-lm's, over slots
    serving: Serving
    layer: int  # of its serving's cache

    def slots(self) -> np.ndarray | None:
        """Int32 [experts], -1 where one is absent: as they are until anything else is asked of it.

        None where it wants to be asked for every choice.
        """

    def found(self, pagers: Sequence[Any], ids: np.ndarray) -> None:
        """These, in turn, had slots for all that was chosen, int32 [n, T, k], and used."""

    def fetch(self, ids: mx.array, x: mx.array) -> tuple[mx.array, Arrivals]:
        """For experts [1, T, k] of the router's x, evaluated: slots, int32, those being read."""

    def arrived(self, waited: float) -> None:
        """What was fetched has been used; seconds waited for it. Raises where a read failed."""

    def takes(self, pairs: int) -> bool:
        """Whether so many experts at most can be fetched at once."""

    def idle(self) -> bool:
        """Whether to rehearse what follows while that which was fetched is still being read."""

    def guess(self, ids: mx.array) -> mx.array:
        """Rehearsed ids: their slots, int32, -1 where one is absent; its read may be begun."""

    def goes_on(self) -> bool:
        """Whether to rehearse one more."""


class Tape:
    """What a pass of several rows in segments did to its caches, so that rows can be taken back."""

    def __init__(self) -> None:
        self._left: list[tuple[Row, Sequence[Any], list[mx.array], mx.array | None, int]] = []

    def note(
        self,
        row: Row,
        cache: Sequence[Any],
        states: list[mx.array],
        tape: mx.array | None,
        rows: int,
    ) -> None:
        """A segment has run: its states before, and what it left."""
        self._left.append((row, cache, states, tape, rows))

    def rollback(self, kept: int) -> set[int]:
        """Caches of segments as after the first `kept` >= 1 rows; their ids. Once only."""
        done: set[int] = set()
        for row, cache, states, tape, rows in self._left:
            done |= row.rewind(cache, states, tape, rows, kept)
        return done


class Row:
    """A segment of layers and the states that it takes and gives. It holds no model."""

    def __init__(
        self,
        op: Any,
        layers: list[tuple[int, bool]],
        modules: Sequence[nn.Module],
        pager: Pager | None,
        seen: Seen | None = None,
    ):
        """layers: (index, whether it is a gated delta net) of each; pager: of what it ends with.

        seen: is told of hidden states, which the op then gives behind the logits.
        """
        self.op, self._layers, self.pager, self._seen = op, layers, pager, seen
        nets = {i: modules[i]["linear_attn"] for i, linear in layers if linear}
        self._shapes = {
            i: (
                (net.conv_kernel_size - 1, net.conv_dim),
                (net.num_v_heads, net.head_v_dim, net.head_k_dim),
            )
            for i, net in nets.items()
        }
        attention = {i: modules[i]["self_attn"] for i, linear in layers if not linear}
        self._heads = {i: (net.num_key_value_heads, net.head_dim) for i, net in attention.items()}

    @property
    def kept(self) -> bool:
        return self.op.kept

    def __call__(
        self, inputs: list[mx.array], cache: Sequence[Any], tape: Tape | None = None
    ) -> list[mx.array]:
        """What the op gives before tape and states, lazily; the caches hold the new states."""
        states = self.states(inputs[0].shape, cache)
        out = self.op(inputs, *states, tape is not None)
        return self.taken(out, states, inputs[0].shape[1], cache, tape)

    def soon(
        self, inputs: list[mx.array], cache: Sequence[Any], tape: Tape | None = None
    ) -> list[mx.array]:
        """The same for who will look at it before anything else: at once where nothing is awaited.

        MLX's graph and its thread cost more than a small model's layer.
        """
        native = backend.native()
        assert native is not None
        if not native.there(inputs):
            return self(inputs, cache, tape)
        states = self.states(inputs[0].shape, cache)
        out = self.op.now(inputs, *states, tape is not None)
        return self.taken(out, states, inputs[0].shape[1], cache, tape)

    def peek(self, inputs: list[mx.array], states: States) -> list[mx.array]:
        """What the op gives before the states, evaluated; the caches hold what they held."""
        out = self.op.now(inputs, *states)
        return out[: len(out) - len(states[0])]  # type: ignore[no-any-return]

    def states(self, shape: Sequence[int], cache: Sequence[Any]) -> States:
        """What the caches hold, tokens in them, and which may be written where they lie."""
        batch, rows = shape[0], shape[1]
        states: list[mx.array] = []
        fresh: list[bool] = []
        offset = 0
        for i, linear in self._layers:
            one = cache[i]
            if linear:
                for slot, state in enumerate(one.cache):
                    if state is None:
                        state = mx.zeros((batch, *self._shapes[i][slot]))
                    states.append(state)
                fresh += (False, False)
            else:
                offset = one.offset
                _make_room(one, batch, rows, *self._heads[i])
                goes_on = _appended(one).goes_on(one.keys, one.values, offset)
                states += (one.keys, one.values)
                fresh += (goes_on, goes_on)
        return states, offset, fresh

    def taken(
        self,
        out: list[mx.array],
        given: States,
        rows: int,
        cache: Sequence[Any],
        tape: Tape | None,
    ) -> list[mx.array]:
        """Put the states into the caches; what comes before them."""
        at = len(out) - len(given[0])
        states = iter(out[at:])
        before: list[mx.array] = []
        for j, (i, linear) in enumerate(self._layers):
            one, first, second = cache[i], next(states), next(states)
            if linear:
                one.cache[0], one.cache[1] = first, second
                before += given[0][2 * j : 2 * j + 2]
            else:
                one.keys, one.values, one.offset = first, second, given[1] + rows
                _appended(one).set(first, second, one.offset)
        if tape is not None:
            if before:
                at -= 1
            tape.note(self, cache, before, out[at] if before else None, rows)
        if self._seen is not None:
            self._seen(*out[1:3])
        return out[:at]

    def rewind(
        self,
        cache: Sequence[Any],
        states: list[mx.array],
        tape: mx.array | None,
        rows: int,
        kept: int,
    ) -> set[int]:
        """The caches as after the first `kept` of the last pass's `rows`; their ids.

        states, tape: of the gated delta nets before it, and what it left.
        """
        moved = iter(() if tape is None else self.op.rewind(states, tape, rows, kept))
        for i, linear in self._layers:
            one = cache[i]
            if linear:
                one.cache[0], one.cache[1] = next(moved), next(moved)
                continue
            own = _appended(one)
            ours = own.goes_on(one.keys, one.values, one.offset)
            one.trim(rows - kept)
            if ours:  # nobody else has seen what is written over
                own.set(one.keys, one.values, one.offset)
        return {id(cache[i]) for i, _ in self._layers}


class Pages:
    """Segments of which each but the last ends with a choice of experts that are paged."""

    def __init__(self, rows: list[Row]):
        self._rows = rows
        self._ops = [row.op for row in rows]
        self._pagers = [row.pager for row in rows if row.pager is not None]
        self._last = {pager.serving: pager.layer for pager in self._pagers}

    def takes(self, choices: int) -> bool:
        """Whether a pass with so many choices of experts in a layer can be run."""
        return all(pager.takes(choices) for pager in self._pagers)

    def __call__(
        self, inputs: list[mx.array], cache: Sequence[Any], tape: Tape | None = None
    ) -> list[mx.array]:
        """As `Row`'s, but evaluated. The caches hold what they held if it raises."""
        shape = inputs[0].shape
        states = [row.states(shape, cache) for row in self._rows]
        try:
            gave = self._served(inputs, states, tape is not None)
            if gave is None:
                gave = self._asked(inputs, states, tape is not None)
        except BaseException:
            for serving in self._last:
                serving.lost()
            raise
        for row, out, given in zip(self._rows, gave, states, strict=True):
            last = row.taken(out, given, shape[1], cache, tape)
        return last

    soon = __call__

    def _served(
        self, inputs: list[mx.array], states: list[States], taped: bool
    ) -> list[list[mx.array]] | None:
        """What each segment gives, where experts are brought in without asking; else None."""
        native: Any = backend.native()
        made = {serving: serving.begin() for serving in self._last}
        if any(one is None for one in made.values()):
            return None
        caches = [(made[pager.serving], pager.layer) for pager in self._pagers]
        gave, _, waited = native.go_on(self._ops, states, inputs, [], taped, (), caches)
        rows = inputs[0].shape[1]
        for serving, layer in self._last.items():
            serving.end(layer, rows, waited)
            waited = 0.0
        return gave  # type: ignore[no-any-return]

    def _asked(
        self, inputs: list[mx.array], states: list[States], taped: bool
    ) -> list[list[mx.array]]:
        """What each segment gives, the pagers being asked wherever an expert is absent."""
        native: Any = backend.native()
        gave: list[list[mx.array]] = []
        arrivals: Arrivals = ()
        rehearsed: tuple[int, list[mx.array]] = (0, [])
        while True:
            at = len(gave)
            slots = [pager.slots() for pager in self._pagers[at:]]
            now, choices, waited = native.go_on(
                self._ops[at:], states[at:], inputs, slots, taped, arrivals
            )
            if at:
                self._pagers[at - 1].arrived(waited)
            if len(now) > 1:
                self._pagers[at].found(self._pagers[at : at + len(now) - 1], choices)
            gave += now
            at = len(gave)
            if at == len(self._rows):
                return gave
            waiting = self._pagers[at - 1]
            stream, normed, ids, scores, opening = now[-1][:5]
            found, arrivals = waiting.fetch(ids, normed)
            inputs = [stream, normed, found, scores, opening]
            if arrivals and max(at, rehearsed[0]) + 1 < len(self._rows) and waiting.idle():
                if rehearsed[0] <= at:
                    rehearsed = at, _without(inputs, arrivals)
                rehearsed = self._rehearse(waiting, *rehearsed, states)

    def _rehearse(
        self, waiting: Pager, at: int, inputs: list[mx.array], states: list[States]
    ) -> tuple[int, list[mx.array]]:
        """Run segments from `at` on with the experts at hand, for as long as `waiting` does.

        Returns the first that was not run, and what it would take.
        """
        while at + 1 < len(self._rows):
            stream, normed, ids, scores, opening = self._rows[at].peek(inputs, states[at])
            slots = self._pagers[at].guess(ids)
            inputs, at = [stream, normed, slots, scores, opening], at + 1
            if not waiting.goes_on():
                break
        return at, inputs


def _without(inputs: list[mx.array], arrivals: Arrivals) -> list[mx.array]:
    """What a segment takes, without the experts that are still being read."""
    slots = np.array(inputs[2])
    for pairs, _ in arrivals:
        slots.reshape(-1)[list(pairs)] = -1
    return [*inputs[:2], mx.array(slots), *inputs[3:]]


def _make_room(cache: KVCache, batch: int, rows: int, heads: int, width: int) -> None:
    if cache.keys is None:
        shape = batch, heads, -(-rows // cache.step) * cache.step, width
        cache.keys = cache.values = mx.zeros(shape)
    else:
        grow(cache, rows)


def grow(cache: KVCache, rows: int) -> None:
    """Room for `rows` more, as KVCache makes it: by whole steps, cut to what is there first.

    At once, and what the rows lay in is free: a pass holds that of all layers to its end.
    """
    if cache.keys is None or cache.offset + rows <= cache.keys.shape[2]:
        return
    ours = _written.pop(id(cache), None)  # which holds it too
    for name in ("keys", "values"):
        old = getattr(cache, name)
        more = mx.zeros((*old.shape[:2], -(-rows // cache.step) * cache.step, old.shape[3]))
        parts = [old[..., : cache.offset, :], more.astype(old.dtype)]
        setattr(cache, name, mx.concatenate(parts, axis=2))
        del old, parts
        mx.eval(getattr(cache, name))
    if ours is not None:
        _appended(cache).set(cache.keys, cache.values, cache.offset)


_written: dict[int, tuple[weakref.ref[Any], Any]] = {}  # by cache


def _appended(cache: KVCache) -> Any:
    """What was appended to this cache last."""
    number = id(cache)
    found = _written.get(number)
    if found is None or found[0]() is not cache:
        gone = weakref.ref(cache, lambda ref: _forget(number, ref))
        found = _written[number] = gone, backend.native().Appended()  # type: ignore[union-attr]
    return found[1]


def _forget(number: int, ref: weakref.ref[Any]) -> None:
    if number in _written and _written[number][0] is ref:
        del _written[number]
