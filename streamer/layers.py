"""Stand before a model's decoder layers, and put back what their caches held.

    layers = decoder_layers(model, paths)
    attach(model, layers, hooks)
    stand_before(layers); ...; stand_aside(layers)

The model's call is `hooks.whole(forward, tokens, cache)` then, and in between that of its layer i
is `hooks.part(i, call, arguments)`, where `forward()` and `call()` are what they were before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn


class Hooks(Protocol):
    def whole(self, forward: Callable[[], Any], tokens: mx.array, cache: Any) -> Any: ...

    def part(self, index: int, call: Callable[[], Any], arguments: Sequence[Any]) -> Any: ...


def attach(model: nn.Module, layers: Sequence[Any], hooks: Hooks) -> None:
    """The model's calls are the hooks' from now on; those of its layers when they are asked for."""
    for index, layer in enumerate(layers):
        layer.__dict__["_hooks"] = hooks, index
    model.__dict__["_hooks"] = hooks
    model.__class__ = _whole(type(model))


def stand_before(layers: Sequence[Any]) -> None:
    """The layers' calls are the hooks', until `stand_aside`."""
    for layer in layers:
        kind: type[nn.Module] = type(layer)
        layer.__class__ = _part(kind)


def stand_aside(layers: Sequence[Any]) -> None:
    """The layers are what they were: whoever runs several of them as one may."""
    for layer in layers:
        layer.__class__ = type(layer).__mro__[1]


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


# (thing, its place among the arguments if it is no cache, what it held)
Saved = list[tuple[Any, int | None, dict[str, Any]]]


def save_all(things: Iterable[tuple[Any, int | None]]) -> Saved:
    """What each thing (with its place) holds, those that can hold something."""
    return [(thing, place, save(thing)) for thing, place in things if holds(thing)]


def hand_out(after: Saved, y: Any, arguments: Sequence[Any]) -> Any:
    """y, with all things as they were when saved."""
    for thing, place, state in after:
        restore(thing, state)
        if place is not None and arguments[place] is not thing:  # another in every pass
            restore(arguments[place], state)
    return y


def save(thing: Any) -> dict[str, Any]:
    """What a cache holds now: references, since its arrays change past what is held only."""
    state: dict[str, Any] = {}
    for name, value in _attributes(thing).items():
        if isinstance(value, list):
            state[name] = list(value)
        elif holds(value):
            state[name] = _Inner(value, save(value))
        elif not callable(value):
            state[name] = value
    return state


def _attributes(thing: Any) -> dict[str, Any]:
    return thing if type(thing) is dict else vars(thing)


def holds(value: Any) -> bool:
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
        hooks, index = self.__dict__["_hooks"]
        arguments = (*args, *kwargs.values())
        return hooks.part(index, lambda: kind.__call__(self, *args, **kwargs), arguments)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@functools.cache
def _whole(kind: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(kind.__call__)
    def call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", args[0] if args else None)
        hooks = self.__dict__["_hooks"]
        return hooks.whole(lambda: kind.__call__(self, inputs, *args, **kwargs), inputs, cache)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
