"""Take rows back from mlx-lm's caches after a verify pass rejected some of its drafts.

Key-value caches drop their last rows. States (gated delta, Mamba, convolutions)
cannot be cut, so the verify pass leaves a tape: for every state the inputs of its
update, row by row, replayed up to the last row kept. Nothing of the trunk runs
again, and a replayed state is bit for bit that of decoding these rows one by one.

    with Tape(model, cache, tokens) as tape:
        logits = model(tokens, cache=cache)
    tape.rollback(3)                     # as if only the first three tokens had run

mlx-lm's update functions are looked up in the modules of the model at hand and
replaced while the pass runs; layers that run in segments (`kernels.plans`) take their
rows back themselves. One sequence only (batch 1). A model with a state
of another kind is found by `obstacle` before anything is decoded.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache as memo
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ConcatenateKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from kernels import plans
from kernels.segments import Tape as Segments


class RollbackError(RuntimeError):
    """A cache that rows cannot be taken back from. One sentence."""


@dataclass(frozen=True)
class Recurrence:
    """An update `f(..., state, ...) -> (outputs, new state)` over several rows.

    rows: the arguments with an axis of rows, `axis`; outputs have it at the same
    place. one_by_one: several rows at once are rounded otherwise than one at a time.
    """

    rows: tuple[str, ...]
    state: str
    axis: int = 1
    one_by_one: bool = True


FUNCTIONS = {
    # its own loop over rows is the sequential one, on CPU and in its Metal kernel
    "gated_delta_update": Recurrence(("q", "k", "v", "a", "b"), "state", one_by_one=False),
    "ssm_update": Recurrence(("hidden_states", "B", "C", "dt"), "state"),
    "recurrent_gla": Recurrence(("q", "k", "v"), "h", axis=2),
}
METHODS = {"ssm_step": Recurrence(("x",), "state")}

_patching = threading.Lock()  # the modules patched are everyone's


class Tape:
    """What a pass over `tokens` [1, T] did to the caches, so that rows can be taken back."""

    def __init__(
        self,
        model: nn.Module,
        cache: Sequence[Any],
        tokens: mx.array,
        found: Sequence[Place] | None = None,
        *,
        segments: bool = True,
    ):
        """found: `updates(model)`, where it was looked for before; segments: layers may run so."""
        self._model, self._found = model, found
        self._segments = Segments() if segments else None
        self._rows = tokens.shape[1]
        self._caches = list(leaves(cache))
        states = (c for c in self._caches if type(c) is ArraysCache)
        self._states = {id(c): _State(c, tokens) for c in states}
        self._current: _State | None = None
        self._thread = 0
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Tape:
        if not self._states:
            return self
        _patching.acquire()
        self._thread = threading.get_ident()
        if self._segments is not None:
            plans.tape = self._segments, self._thread
        for state in self._states.values():
            state.cache.__dict__["_touch"] = self._touch
            state.cache.__class__ = _Taped
        self._patch(nn.Conv1d, "__call__", self._conv)
        found = updates(self._model) if self._found is None else self._found
        for owner, name, recurrence in found:
            self._patch(owner, name, partial(self._update, recurrence))
        return self

    def __exit__(self, *_: object) -> None:
        if not self._states:
            return
        plans.tape = None
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()
        for state in self._states.values():
            state.cache.__class__ = ArraysCache
            del state.cache.__dict__["_touch"]
        self._current = None
        _patching.release()

    def restart(self, cache: Any) -> None:
        """Forget what a layer did to this cache of states; it runs again."""
        state = self._states[id(cache)]
        state.written, state.windows, state.updates = {}, [], []

    def check(self) -> None:
        """Raises RollbackError when a cache could not be cut after the pass."""
        for state in self._states.values():
            state.plan()
        for cache in self._caches:
            if id(cache) not in self._states and not _can_drop(cache):
                raise RollbackError(f"mlx-lm's {type(cache).__name__} cannot be cut back")

    def rollback(self, kept: int) -> None:
        """Leave the caches as after the first `kept` >= 1 rows of the pass. Once only."""
        if kept == self._rows:
            return
        done = set() if self._segments is None else self._segments.rollback(kept)
        for cache in self._caches:
            if id(cache) in done:
                continue
            if id(cache) in self._states:
                self._states[id(cache)].replay(kept)
            else:
                _drop(cache, self._rows - kept)

    def _patch(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = vars(owner)[name]
        self._undo.append((owner, name, original))
        setattr(owner, name, wrap(original))

    def _touch(self, cache: Any, slot: int, value: mx.array | None) -> None:
        self._current = self._states.get(id(cache))
        if self._current is not None and value is not None:
            self._current.written[slot] = value

    def _conv(self, original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(module: nn.Conv1d, x: mx.array) -> mx.array:
            if self._current is not None and threading.get_ident() == self._thread:
                self._current.windows.append(x)
            return original(module, x)

        return call

    def _update(self, recurrence: Recurrence, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._current is None or threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            update = _Update(original, recurrence, args, kwargs)
            if recurrence.one_by_one:
                if update.argument(recurrence.rows[0]).ndim <= recurrence.axis + 1:
                    return original(*args, **kwargs)  # one row, without an axis of rows
                outputs, state = update.run(self._rows)
            else:
                outputs, state = original(*args, **kwargs)
            self._current.updates.append((update, state))
            return outputs, state

        return call


class _Update:
    """A recorded call of a recurrence."""

    def __init__(
        self,
        function: Callable[..., Any],
        recurrence: Recurrence,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self._function, self._recurrence = function, recurrence
        self._args, self._kwargs = args, kwargs

    def argument(self, name: str) -> Any:
        return self._bind().arguments.get(name)

    def run(self, rows: int) -> tuple[mx.array, mx.array]:
        """Outputs of, and the state after, the first `rows` rows."""
        r, bound = self._recurrence, self._bind()
        outputs, state = [], bound.arguments.get(r.state)
        steps = [(i, i + 1) for i in range(rows)] if r.one_by_one else [(0, rows)]
        for start, end in steps:
            y, state = self._call(bound, start, end, state)
            outputs.append(y)
        assert state is not None
        return mx.concatenate(outputs, axis=r.axis) if len(outputs) > 1 else outputs[0], state

    def _bind(self) -> inspect.BoundArguments:
        return _signature(self._function).bind(*self._args, **self._kwargs)

    def _call(
        self, bound: inspect.BoundArguments, start: int, end: int, state: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        r = self._recurrence
        values = dict(bound.arguments) | {r.state: state}
        cut = (*[slice(None)] * r.axis, slice(start, end))
        for name in r.rows:
            values[name] = values[name][cut]
        part = inspect.BoundArguments(bound.signature, values)  # type: ignore[arg-type]
        return self._function(*part.args, **part.kwargs)


@memo
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


class _State:
    """The slots of one ArraysCache: those that a recurrence wrote, and windows of last rows."""

    def __init__(self, cache: ArraysCache, tokens: mx.array):
        self.cache = cache
        self._tokens, self._before = tokens, list(cache.cache)
        self.written: dict[int, mx.array] = {}
        self.windows: list[mx.array] = []  # inputs of convolutions: a slot and then the rows
        self.updates: list[tuple[_Update, mx.array]] = []

    def replay(self, kept: int) -> None:
        for slot, source in self.plan().items():
            if isinstance(source, _Update):
                self.cache.cache[slot] = source.run(kept)[1]
                continue
            end = source.shape[1] - self._tokens.shape[1] + kept
            start = max(0, end - self.written[slot].shape[1])
            self.cache.cache[slot] = mx.contiguous(source[:, start:end])

    def plan(self) -> dict[int, _Update | mx.array]:
        """What each written slot comes from: an update, or rows of which it is the last."""
        plan: dict[int, _Update | mx.array] = {}
        windows = list(self.windows)
        for slot, value in sorted(self.written.items()):
            update = next((u for u, state in self.updates if state is value), None)
            if update is not None:
                plan[slot] = update
            elif windows and self._is_tail(value, windows[0]):
                plan[slot] = windows.pop(0)
            elif value.ndim == 2 and mx.issubdtype(value.dtype, mx.integer):
                before = self._before[slot]
                tokens = self._tokens.astype(value.dtype)
                plan[slot] = tokens if before is None else mx.concatenate([before, tokens], axis=1)
            else:
                raise RollbackError("the model keeps a state that is updated in an unknown way")
        if windows:
            raise RollbackError("the model has a convolution whose state is not known")
        return plan

    def _is_tail(self, value: mx.array, window: mx.array) -> bool:
        batch, width, channels = value.shape if value.ndim == 3 else (0, 0, 0)
        return window.shape == (batch, width + self._tokens.shape[1], channels)


class _Taped(ArraysCache):
    """An ArraysCache that says when a layer reads or writes it."""

    stands_for = ArraysCache

    def __getitem__(self, slot: int) -> Any:
        self.__dict__["_touch"](self, slot, None)
        return self.cache[slot]

    def __setitem__(self, slot: int, value: mx.array) -> None:
        self.__dict__["_touch"](self, slot, value)
        self.cache[slot] = value


def forget(cache: Any) -> None:
    """The layer of this cache runs a second time: a tape is to hold that run alone."""
    touch = vars(cache).get("_touch")
    if touch is not None:
        touch.__self__.restart(cache)


def leaves(cache: Iterable[Any]) -> Iterable[Any]:
    """The caches inside `cache`, lists of caches opened."""
    for one in cache:
        if isinstance(one, CacheList):
            yield from leaves(one.caches)
        elif one is not None:
            yield one


Place = tuple[Any, str, Recurrence]  # module or class, name there, what it is


def updates(model: nn.Module) -> tuple[Place, ...]:
    """Those that `model` may call; walks all of its modules."""
    return _updates_of(tuple({type(m) for m in model.modules()}))


@memo
def _updates_of(types: tuple[type, ...]) -> tuple[Place, ...]:
    found: dict[tuple[int, str], Place] = {}
    for kind in types:
        module = sys.modules[kind.__module__]
        for name, recurrence in FUNCTIONS.items():
            if callable(vars(module).get(name)):
                found[id(module), name] = module, name, recurrence
        for name, recurrence in METHODS.items():
            if name in vars(kind):
                found[id(kind), name] = kind, name, recurrence
    return tuple(found.values())


def _can_drop(cache: Any) -> bool:
    return isinstance(cache, RotatingKVCache) or cache.is_trimmable()


def _drop(cache: Any, rows: int) -> None:
    """Take back the last rows of one pass over more than `rows` rows."""
    if isinstance(cache, RotatingKVCache | ConcatenateKVCache):
        # a pass of several rows leaves them last, after all that a window needs
        end = cache.keys.shape[2] - rows
        cache.keys, cache.values = cache.keys[..., :end, :], cache.values[..., :end, :]
        cache.offset -= rows
        if isinstance(cache, RotatingKVCache):
            cache._idx = end
    elif cache.trim(rows) != rows:
        raise RollbackError(f"mlx-lm's {type(cache).__name__} does not hold the rows of its pass")


def obstacle(model: nn.Module) -> str | None:
    """Why rows cannot be taken back from this model's caches, or None where they can.

    Builds a pass over three rows that is never evaluated.
    """
    cache, tokens = make_prompt_cache(model), mx.zeros((1, 3), dtype=mx.int32)
    try:
        with Tape(model, cache, tokens, segments=False) as tape:
            model(tokens, cache=cache)
        tape.check()
    except RollbackError as error:
        return str(error)
    except AttributeError as error:  # a cache that is no mlx-lm cache
        return f"mlx-lm's model has a cache of its own: {error}"
    return None
