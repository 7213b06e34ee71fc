"""Token ids in, token ids out: prefill in chunks, then one pass per token.

The engine never sees text. Sampling and logits processors are mlx-lm's; so are
the caches, which the caller may keep for the next turn. A server can drive it:
one `Generation` per request, closed by dropping the iterator.

    for step in generate(model, tokens, cache, max_tokens=64):
        print(step.token)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .loading import Streamer

Sampler = Callable[[mx.array], mx.array]  # log probabilities [1, V] -> token [1]
Processor = Callable[[mx.array, mx.array], mx.array]  # tokens [T], logits [1, V] -> logits


@dataclass(frozen=True)
class Step:
    """One generated token. logprobs: [V], lazy."""

    token: int
    logprobs: mx.array


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


def greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def generate(
    model: nn.Module,
    tokens: Sequence[int],
    cache: list[Any],
    *,
    max_tokens: int,
    sampler: Sampler = greedy,
    processors: Sequence[Processor] = (),
    stop: frozenset[int] = frozenset(),
    timing: Timing | None = None,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Step]:
    """Yield up to `max_tokens` tokens after `tokens`; the one in `stop` is the last.

    cache: mlx-lm's prompt cache, updated in place; `timing.cached` says how far.
    on_prompt(done, total) is called in prefill.
    Raises BudgetError when the process cannot stay within its budget.
    """
    timing = timing if timing is not None else Timing()
    streamer: Streamer = model.streamer
    began = time.perf_counter()
    _prefill(model, tokens, cache, timing, on_prompt)
    history = mx.array(list(tokens)) if processors else None
    run = _Pass(model, cache, sampler, processors, history, timing)
    step = run(mx.array(list(tokens[-1:])))
    on_prompt(len(tokens), len(tokens))
    timing.prompt_tokens += len(tokens)
    for n in range(1, max_tokens + 1):
        # with no read-back inside a pass, the next one is queued before this token is looked at
        ahead = run(step[0]) if streamer.resident and n < max_tokens else None
        token = int(step[0].item())  # type: ignore[arg-type]
        now = time.perf_counter()
        if n == 1:
            timing.prompt_seconds += now - began
            began = now
        timing.generated_tokens += 1
        timing.decode_seconds = now - began
        yield Step(token, step[1])
        if token in stop or n == max_tokens:
            return
        if n % 16 == 0:
            streamer.check()
        step = ahead or run(step[0])


class _Pass:
    """One forward pass over one token and the choice of the next."""

    def __init__(
        self,
        model: nn.Module,
        cache: list[Any],
        sampler: Sampler,
        processors: Sequence[Processor],
        history: mx.array | None,
        timing: Timing,
    ):
        self._model, self._cache = model, cache
        self._sampler, self._processors, self._history = sampler, processors, history
        self._timing, self._first = timing, True

    def __call__(self, token: mx.array) -> tuple[mx.array, mx.array]:
        """token [1] -> (next token [1], logprobs [V]), being evaluated."""
        logits = self._model(token[None], cache=self._cache)[:, -1, :]
        self._timing.cached += 1
        if self._history is not None:
            if not self._first:
                self._history = mx.concatenate([self._history, token])
            self._first = False
            for process in self._processors:
                logits = process(self._history, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = self._sampler(logprobs)
        mx.async_eval(chosen)
        return chosen, logprobs[0]


def _prefill(
    model: nn.Module,
    tokens: Sequence[int],
    cache: list[Any],
    timing: Timing,
    on_prompt: Callable[[int, int], None],
) -> None:
    """Every token but the last, whose pass gives the first logits."""
    streamer: Streamer = model.streamer
    chunk = streamer.budget.chunk
    on_prompt(0, len(tokens))
    while (left := len(tokens) - 1 - timing.cached) > 0:
        part = tokens[timing.cached : timing.cached + min(chunk, left)]
        model(mx.array(list(part))[None], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        streamer.check()
        timing.cached += len(part)
        on_prompt(timing.cached, len(tokens))
