"""What a step takes when every expert is at hand, measured on a model that has but some of them.

    resident_step(model, tokens)      # as where the pool holds all: nothing is read back
    hit_step(model, tokens)           # layer by layer, with every choice found in the pool

A few steps run with the pool's slots standing for all experts, by the code that runs
when they do: the logits mean nothing, the time is that of true ones. The tokens put in are
given, so that the routers choose as variously as they would. Pool, counters and caches of
the model's own runs stay as they were.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from .engine import generate
from .executor import Executor
from .loading import StreamedSwitch
from .pool import SlotPool
from .profiler import Profiler
from .speculate import Speculation

STEPS, SECONDS = 48, 1.0  # passes that are timed, fewer where they take longer
WARM, LEAST = 4, 6  # passes before them; timed in any case
PROMPT = 16  # tokens


def resident_step(model: Any, tokens: Sequence[int], depth: int = 0) -> float:
    """Seconds of a step (a verify pass of `depth` drafts) of a model that holds all experts.

    tokens: a text, of more than PROMPT.
    """
    streamer, runs = model.streamer, model.streamer.executors
    there = {layer.path: _part(run, i) for run, i, layer in _layers(runs)}
    with _modules(model, there):
        streamer.executors = []  # as the engine then sees it: no read-back inside a pass
        try:
            return _step(model, tokens, depth)
        finally:
            streamer.executors = runs


def hit_step(model: Any, tokens: Sequence[int], depth: int = 0) -> float:
    """Seconds of a step of the model's executor that finds every expert in the pool."""
    streamed: dict[str, nn.Module] = {
        layer.path: StreamedSwitch(run, i, layer.switch)
        for run, i, layer in _layers(model.streamer.executors)
    }
    with _modules(model, streamed), _all_there(model.streamer.executors):
        return _step(model, tokens, depth)


def _step(model: Any, tokens: Sequence[int], depth: int) -> float:
    """Drafts that are all wrong take what right ones do."""
    streamer, before = model.streamer, model.streamer.watch
    counters = replace(streamer.counters)
    speculation = Speculation(model, streamer.opened.head, depth) if depth else None
    profiler = Profiler(model)
    following = itertools.cycle(tokens[PROMPT:] or tokens)

    def sampler(logprobs: mx.array) -> mx.array:
        # the given token, once the pass is computed
        return mx.array(next(following)) + 0 * mx.argmax(logprobs, axis=-1)

    steps = generate(
        model,
        tokens[:PROMPT],
        make_prompt_cache(model),
        max_tokens=(STEPS + WARM) * (depth + 1),
        sampler=greedy_sampler if depth else sampler,
        speculation=speculation,
    )
    least, began = (WARM + LEAST) * (depth + 1), time.perf_counter()
    try:
        streamer.watch = profiler
        with contextlib.closing(steps):
            for given, _ in enumerate(steps):  # no more in here: it would be timed too
                if given >= least and time.perf_counter() - began > SECONDS:
                    break
    finally:
        streamer.watch = before
        vars(streamer.counters).update(vars(counters))
    times = [sum(s.parts) for s in profiler.steps if s.kind != "prefill"]
    return statistics.median(times[WARM:])  # a stall would be a large part of so few


def _layers(runs: Sequence[Executor]) -> Iterator[tuple[Executor, int, Any]]:
    for run in runs:
        for i, layer in enumerate(run.layers):
            yield run, i, layer


def _part(run: Executor, index: int) -> nn.Module:
    """A layer's switch over some of the slots, another part of the pool for each layer."""
    layer, slots = run.layers[index], run.pool.slots
    if layer.count > slots:
        return _Fewer(run.arrays.bind(layer.switch), slots)
    first = index * layer.count % (slots - layer.count + 1)
    return run.arrays.bind(layer.switch, slice(first, first + layer.count))


class _Fewer(nn.Module):
    """A switch for more experts than there are slots."""

    def __init__(self, switch: nn.Module, slots: int):
        super().__init__()
        self.__dict__["_inner"] = switch, slots

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        switch, slots = self.__dict__["_inner"]
        return switch(x, indices % slots)


@contextlib.contextmanager
def _modules(model: nn.Module, others: dict[str, nn.Module]) -> Iterator[None]:
    modules = dict(model.named_modules())
    before = [(path, modules[path]) for path in others]
    try:
        model.update_modules(tree_unflatten(list(others.items())))
        yield
    finally:
        model.update_modules(tree_unflatten(before))


class _AllThere:
    """Stands for a pool in which every expert is found."""

    def __init__(self, pool: SlotPool):
        self.slots, self.total, self.free = pool.slots, pool.total, list[int]()
        self.resident = [0] * len(pool.slot_of)
        self.slot_of = [
            np.arange(len(table), dtype=np.int32) % pool.slots for table in pool.slot_of
        ]

    def covers(self, layer: int) -> bool:
        return False

    def touch(self, layer: int, experts: Any) -> None:
        return

    def chose(self, layer: int, ids: Any) -> None:
        return

    def chose_in_turn(self, layer: int, ids: Any) -> None:
        return

    def expect_nothing(self) -> None:
        return


@contextlib.contextmanager
def _all_there(runs: Sequence[Executor]) -> Iterator[None]:
    pools, uses = [run.pool for run in runs], [[n.copy() for n in run.uses] for run in runs]
    for run in runs:
        run.settle()
        run.release()
        run.moved()
        run.pool = cast(SlotPool, _AllThere(run.pool))
    try:
        yield
    finally:
        for run, pool, used in zip(runs, pools, uses, strict=True):
            run.settle()
            run.moved()
            run.pool = pool
            for mine, was in zip(run.uses, used, strict=True):
                mine[:] = was
