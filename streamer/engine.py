"""Token ids in, token ids out: prefill in chunks, then one pass per token, or per block of drafts.

The engine never sees text. Sampling and logits processors are mlx-lm's; so are
the caches, which the caller may keep for the next turn. A server can drive it:
one `Generation` per request, closed by dropping the iterator.

    for step in generate(model, tokens, cache, max_tokens=64):
        print(step.token)
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import greedy_sampler

from kernels.sampling import NumpySampler, Sampler, faster
from kernels.segments import grow
from mtp.rollback import leaves
from mtp.verify import as_seed, random_state, rule_for

from .loading import Streamer
from .speculate import Block, Processor, Speculation


@dataclass(frozen=True)
class Step:
    """One generated token. logprobs: [V], lazy; drafted: by the MTP head, and accepted."""

    token: int
    logprobs: mx.array
    drafted: bool = False


@dataclass
class Timing:
    """Seconds and tokens of a generation, filled in while it runs.

    cached: how many of its tokens, prompt first, the KV cache has taken in.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0
    cached: int = 0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first, which belongs to the prompt."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    model: nn.Module,
    tokens: Sequence[int],
    cache: list[Any],
    *,
    max_tokens: int,
    sampler: Sampler = greedy_sampler,
    processors: Sequence[Processor] = (),
    stop: frozenset[int] = frozenset(),
    timing: Timing | None = None,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
    speculation: Speculation | None = None,
    seeded: bool = True,
    before: Sequence[int] = (),
) -> Generator[Step]:
    """Yield up to `max_tokens` tokens after `tokens`; the one in `stop` is the last.

    cache: mlx-lm's prompt cache, updated in place; when this iterator is closed,
    `timing.cached` says how far. on_prompt(done, total) is called in prefill.
    speculation: drafts with the MTP head; greedy tokens stay the same and sampled ones
    keep their distribution. seeded: sampled ones stay the same too, at some cost in
    acceptance. before: those that the cache holds, which processors are given too. Raises
    BudgetError when the process cannot stay within its budget.
    """
    timing = timing if timing is not None else Timing()
    streamer: Streamer = model.streamer
    sampler = faster(sampler)
    began = time.perf_counter()
    prefill(model, tokens, cache, timing, on_prompt, speculation)
    history = [*before, *tokens[:-1]]
    run = _Run(model, cache, sampler, processors, history, timing, speculation)
    rule = rule_for(sampler, seeded=seeded)
    pass_began = time.perf_counter()
    queued: _Passed | None = run.one(mx.array(list(tokens[-1:])))
    on_prompt(len(tokens), len(tokens))
    timing.prompt_tokens += len(tokens)
    n = checked = depth = 0
    step_began = pass_began
    while True:
        block: Block | None = None
        following = 0
        if depth:
            block = run.several(depth, rule, stop)
        if block:
            chosen, rows = block.chosen, block.rows
        else:
            pass_began = step_began if queued else time.perf_counter()
            passed = queued or run.one(run.last)
            left = max_tokens - n - 1
            following = _depth(speculation, left)
            # with no read-back inside a pass, the next is queued before this token is looked at
            ahead = streamer.resident and left and not following and not run.waits(passed)
            state = random_state()
            queued = run.one(passed.token) if ahead else None
            chosen, rows = [int(passed.token.item())], [passed.logprobs]  # type: ignore[arg-type]
        now = time.perf_counter()
        if streamer.watch is not None and not block:
            streamer.watch.step("decode", 1, now - pass_began)
        if n == 0:
            timing.prompt_seconds += now - began
            began = now
        elif speculation:
            stood = block.accepted if block else 0
            speculation.record(len(block.rows) - 1 if block else 0, stood, now - step_began)
        given, ended = 0, True
        try:
            for given, (token, logprobs) in enumerate(zip(chosen, rows, strict=False), 1):
                n += 1
                if block:
                    run.keep(block, given, final=given == len(chosen))
                timing.generated_tokens += 1
                timing.decode_seconds = now - began
                yield Step(token, logprobs[0], block is not None and given <= block.accepted)
                if token in stop or n == max_tokens:
                    return
            ended = False
        finally:
            if block and given < len(chosen):
                run.keep(block, max(1, given), final=True)
            if ended and queued and not rule.greedy:  # what it drew is taken back
                mx.random.seed(as_seed(state))
        if n // 16 > checked:
            checked = n // 16
            streamer.check()
        depth = _depth(speculation, max_tokens - n) if block else following
        step_began = time.perf_counter()


def _depth(speculation: Speculation | None, left: int) -> int:
    """Drafts of the next step, which gives up to one token more."""
    return speculation.depth.choose(left - 1) if speculation and left > 1 else 0


@dataclass(frozen=True)
class _Passed:
    """A pass over one row, being evaluated: the token it chose [1], log probabilities [1, V]."""

    token: mx.array
    logprobs: mx.array


class _Run:
    """The passes of one generation."""

    def __init__(
        self,
        model: nn.Module,
        cache: list[Any],
        sampler: Sampler,
        processors: Sequence[Processor],
        tokens: Sequence[int],
        timing: Timing,
        speculation: Speculation | None,
    ):
        """tokens: those before the first pass."""
        self._model, self._cache = model, cache
        self._sampler, self._processors = sampler, processors
        self._timing, self._speculation = timing, speculation
        self._history = mx.array(list(tokens), dtype=mx.int32)  # tokens that were put in
        self._growing = [one for one in leaves(cache) if type(one) is KVCache]
        self._base = 0  # cached tokens before the block
        self.last = self._history[:0]  # [1], the token to be put in next

    def one(self, token: mx.array) -> _Passed:
        """Put in token [1] and choose the next."""
        self._make_room(1)
        logits = self._model(token[None], cache=self._cache)[:, -1, :]
        self._timing.cached += 1
        logprobs = self._rows(logits, token)
        self._put_in(token)
        self.last = self._sampler(logprobs)
        if self._speculation:
            self._speculation.plain(self.last)
        mx.async_eval(self.last)
        return _Passed(self.last, logprobs)

    def _make_room(self, rows: int) -> None:
        """Caches grow one by one, not all in a pass."""
        for cache in self._growing:
            grow(cache, rows)

    def waits(self, passed: _Passed) -> bool:
        """Whether the sampler waits for its row: a pass queued sooner would be waited for."""
        return isinstance(self._sampler, NumpySampler) and self._sampler.at_once(passed.logprobs)

    def several(self, count: int, rule: Any, stop: frozenset[int]) -> Block | None:
        """Put in the last token and up to `count` drafts, or nothing where none is worth it."""
        assert self._speculation is not None
        self._make_room(count + 1)
        self._base = self._timing.cached
        last = self.last if self.last.dtype == mx.int32 else self.last.astype(mx.int32)
        rows = self._rows if self._processors else None
        return self._speculation.verify(self._cache, last, count, rule, rows, stop)

    def keep(self, block: Block, given: int, *, final: bool) -> None:
        """The first `given` tokens of a block are out; final: the others will not be."""
        self._timing.cached = self._base + given
        if final:
            if self._processors:
                out = mx.array(block.tokens[: given - 1], dtype=mx.int32)
                self._put_in(mx.concatenate([self.last.astype(mx.int32), out]))
            self.last = mx.array(block.tokens[given - 1 : given])
            block.settle(given)

    def _rows(self, logits: mx.array, tokens: mx.array) -> mx.array:
        """Log probabilities [1, V] after `tokens` were put in too."""
        if self._processors:
            history = mx.concatenate([self._history, tokens.astype(mx.int32)])
            for process in self._processors:
                logits = process(history, logits)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def _put_in(self, tokens: mx.array) -> None:
        if self._processors:
            self._history = mx.concatenate([self._history, tokens.astype(mx.int32)])


def prefill(
    model: nn.Module,
    tokens: Sequence[int],
    cache: list[Any],
    timing: Timing,
    on_prompt: Callable[[int, int], None],
    speculation: Speculation | None,
) -> None:
    """Every token but the last, whose pass gives the first logits, from `timing.cached` on.

    on_prompt is told after each layer, in tokens' worth of work. What it raises ends the prompt;
    the caches are then of no use.
    """
    streamer: Streamer = model.streamer
    chunk = streamer.budget.chunk
    on_prompt(0, len(tokens))
    while (left := len(tokens) - 1 - timing.cached) > 0:
        end = timing.cached + min(chunk, left)
        part = tokens[timing.cached : end]
        began = time.perf_counter()
        with _layer_by_layer(streamer, timing.cached, len(part), len(tokens), on_prompt):
            model(mx.array(list(part))[None], cache=cache)
            mx.eval([c.state for c in cache])
        if speculation:
            following = mx.array(list(tokens[timing.cached + 1 : end + 1]))
            mx.eval(speculation.prompt(following))
        if streamer.watch is not None:
            streamer.watch.step("prefill", len(part), time.perf_counter() - began)
        mx.clear_cache()
        streamer.check()
        timing.cached += len(part)
        on_prompt(timing.cached, len(tokens))


@contextlib.contextmanager
def _layer_by_layer(
    streamer: Streamer, done: int, part: int, total: int, on_prompt: Callable[[int, int], None]
) -> Iterator[None]:
    """Tell on_prompt of a pass over `part` tokens as its layers' experts are through."""
    layers = sum(len(run.layers) for run in streamer.executors)
    through = itertools.count(1)

    def after() -> None:
        on_prompt(done + min(part - 1, part * next(through) // layers), total)

    try:
        for run in streamer.executors:
            run.after = after
        yield
    finally:
        for run in streamer.executors:
            run.after = None
