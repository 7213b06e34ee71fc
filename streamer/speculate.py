"""Decoding with the model's own MTP head: draft, verify in one pass, take back what fell.

A `Speculation` belongs to one conversation: it holds the head's cache beside the
model's, and what was measured, from one generation to the next. The engine drives
it; with depth 0 a step is plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from cache.make import most_rows
from mtp.depth import DEEPEST, Depth, Fixed
from mtp.draft import Drafter
from mtp.head import Head
from mtp.hidden import take, watch
from mtp.rollback import Tape, obstacle, updates
from mtp.verify import Rule, likeliest, near_tie

from .loading import StreamedSwitch

Processor = Callable[[mx.array, mx.array], mx.array]  # tokens [T], logits [1, V] -> logits


@dataclass
class Counters:
    """Of all generations; depths[k]: steps that drafted k tokens; near_ties: see `mtp.verify`."""

    drafted: int = 0
    accepted: int = 0
    verify_passes: int = 0
    near_ties: int = 0
    depths: list[int] = field(default_factory=lambda: [0] * (DEEPEST + 1))

    def stats(self) -> dict[str, Any]:
        """The `mtp` block of `--stats`."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "verify_passes": self.verify_passes,
            "depth_histogram": list(self.depths),
            "near_ties": self.near_ties,
        }


class Speculation:
    """A model's head, following one sequence."""

    def __init__(self, model: nn.Module, head: Head, depth: int | None = None):
        """depth: how many tokens each step drafts; None to choose as it runs."""
        self.model, self.head = model, head
        self.depth: Depth | Fixed = Depth() if depth is None else Fixed(depth)
        self.drafter = Drafter(head, self.depth.deepest)
        self.counters = Counters()
        self._updates = updates(model)
        self._drafting: list[float] = []  # seconds of the step's drafts
        watch(head.trunk.norm)

    def follow(self, cached: int) -> None:
        """The next generation goes on after the first `cached` tokens of this sequence."""
        if not cached:
            self.drafter.reset()
        elif self.drafter.rows > cached:
            # the token after the last one kept is another now
            self.drafter.keep(cached - 1)

    def resume(self, cached: int, drafting: tuple[list[Any], Any] | None) -> None:
        """Follow a sequence of `cached` tokens, with its drafter's caches and state if known."""
        self.drafter.reset()
        self.drafter.rows = cached
        if drafting:
            self.drafter.resume(*drafting)

    def hidden(self) -> mx.array:
        """The states [1, T, D] of the pass just built, of the kind the head takes."""
        return take(self.head.trunk.norm, self.head.hidden)

    def prompt(self, tokens: mx.array) -> list[mx.array]:
        """Follow a chunk of the prompt; tokens [T]: the next of each of the pass just built.

        Returns what is to be evaluated with it.
        """
        self.drafter.note(self.hidden(), tokens)
        self.drafter.catch_up(prompt=True)
        flat: Any = tree_flatten([c.state for c in self.drafter.cache])
        return [array for _, array in flat if isinstance(array, mx.array)]

    def record(self, verified: int, stood: int, seconds: float) -> None:
        """A step took `seconds`: of the drafts `verified`, `stood` were accepted."""
        self.counters.depths[verified] += 1
        drafting, self._drafting = tuple(self._drafting), []
        self.depth.record(verified, stood, seconds - sum(drafting), drafting)

    def plain(self, token: mx.array) -> None:
        """A pass over one row was built; token [1]: what it chose."""
        self.drafter.note(self.hidden(), token)

    def verify(
        self,
        cache: list[Any],
        last: mx.array,
        count: int,
        rule: Rule,
        rows: Callable[[mx.array, mx.array], mx.array] | None,
        stop: frozenset[int],
    ) -> Block | None:
        """Draft up to `count` tokens after `last` [1] and run one pass over them.

        rows(logits [1, V], inputs [T]): log probabilities [1, V] after this step's
        `inputs`, the first of them `last`; None where they are those of the logits alone.
        The block ends with the first in `stop`. None where no draft was worth a row; nothing of
        the trunk has run then.
        """
        count = min(count, most_rows(cache) - 1)
        if count < 1:
            return None
        rule.begin()
        watch, began = self.model.streamer.watch, time.perf_counter()
        way = _Greedy() if rule.greedy and rows is None else _Drawn(rule, rows or _alone)
        made = self._draft(last, count, way)
        if watch is not None:
            watch.step("draft", len(made), time.perf_counter() - began)
            began = time.perf_counter()
        if not made:
            rule.end(0)
            return None
        inputs = way.inputs(last, made)
        with Tape(self.model, cache, inputs, self._updates) as tape:
            logits = self.model(inputs, cache=cache)
        hidden = self.hidden()
        stood, tokens, near, probable = way.accept(made, inputs, logits)
        chosen = tokens[: stood + 1]
        end = next((i for i, t in enumerate(chosen) if t in stop), stood)
        c = self.counters
        c.drafted += len(made)
        c.accepted += min(stood, end + 1)
        c.verify_passes += 1
        c.near_ties += sum(near[: end + 1])
        if watch is not None:
            watch.step("verify", len(made) + 1, time.perf_counter() - began)
        return Block(self, tape, rule, chosen[: end + 1], stood, probable, hidden, tokens)

    def _draft(self, last: mx.array, count: int, way: _Greedy | _Drawn) -> list[Any]:
        """Up to `count` tokens worth verifying."""
        self._drafting = []
        depth = self.depth
        if isinstance(depth, Fixed):
            return self.drafter.draft(count, lambda logits, before: way.draft(last, logits, before))
        began = time.perf_counter()

        def goes_on(token: Any) -> tuple[bool, bool]:
            nonlocal began
            confidence = way.confidence(token)
            now = time.perf_counter()
            self._drafting.append(now - began)
            began = now
            return depth.goes_on(confidence, count)

        return self.drafter.draft(
            count, lambda logits, before: way.draft(last, logits, before, True), goes_on
        )


# How many drafts stand, the tokens after each row, whether each was near a tie, and their rows.
Accepted = tuple[int, list[int], list[bool], list[mx.array]]


class _Greedy:
    """Drafts and rows looked at as they come: no graph, nothing to wait for."""

    def __init__(self) -> None:
        self._confidence = 0.0

    def draft(
        self, last: mx.array, logits: mx.array, before: Sequence[int], confident: bool = False
    ) -> int:
        found = likeliest(logits, confident)[-1]
        self._confidence = found.confidence
        return found.token

    def confidence(self, token: int) -> float:
        return self._confidence

    def inputs(self, last: mx.array, drafts: list[int]) -> mx.array:
        return mx.array([[int(last.item()), *drafts]])  # type: ignore[arg-type]

    def accept(self, drafts: list[int], inputs: mx.array, logits: mx.array) -> Accepted:
        found = likeliest(logits)
        tokens = [one.token for one in found]
        pairs = enumerate(zip(drafts, tokens, strict=False))
        stood = next((i for i, (ours, true) in pairs if ours != true), len(drafts))
        probable = _alone(logits[0])  # lazy: seldom looked at
        rows = [probable[i : i + 1] for i in range(len(tokens))]
        return stood, tokens, [one.near for one in found], rows


class _Drawn:
    """Drafts drawn and verified by a rule, all in one graph."""

    def __init__(self, rule: Rule, rows: Callable[[mx.array, mx.array], mx.array]):
        self._rule, self._rows = rule, rows
        self._row = mx.zeros(0)

    def draft(
        self, last: mx.array, logits: mx.array, before: Sequence[mx.array], confident: bool = False
    ) -> mx.array:
        self._row = self._rows(logits[:, -1], mx.concatenate([last, *before]))
        return self._rule.draft(self._row).astype(last.dtype)

    def confidence(self, token: mx.array) -> float:
        confidence = mx.exp(self._row.max())
        mx.eval(token, confidence)
        return confidence.item()  # type: ignore[return-value]

    def inputs(self, last: mx.array, drafts: list[mx.array]) -> mx.array:
        inputs = mx.concatenate([last, *drafts])[None]
        mx.async_eval(inputs)  # they are computed while the pass over them is built
        return inputs

    def accept(self, drafts: list[mx.array], inputs: mx.array, logits: mx.array) -> Accepted:
        raw = [logits[:, i] for i in range(inputs.size)]
        probable = [self._rows(row, inputs[0, : i + 1]) for i, row in enumerate(raw)]
        stood, tokens = self._rule.accept(mx.concatenate(drafts), probable)
        ties = mx.zeros(0)
        if self._rule.greedy:
            ties = near_tie(mx.concatenate(raw), mx.concatenate(probable))
        mx.eval(stood, tokens, ties, *self._rule.pending)
        return int(stood.item()), tokens.tolist(), ties.tolist(), probable  # type: ignore[arg-type,return-value]


def _alone(logits: mx.array, before: mx.array | None = None) -> mx.array:
    """Log probabilities of logits [..., V], whatever came before."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@dataclass
class Block:
    """The tokens of one verify pass; chosen[:accepted] were drafts; rows: log probabilities."""

    owner: Speculation
    tape: Tape
    rule: Rule
    chosen: list[int]
    accepted: int
    rows: list[mx.array]
    hidden: mx.array
    tokens: list[int]  # of every row; those after chosen count for nothing

    def settle(self, kept: int) -> None:
        """Leave model and head as after the first `kept` >= 1 tokens, the last not yet run."""
        self.rule.end(kept)
        self.tape.rollback(kept)
        self.owner.drafter.note(_first(self.hidden, kept), self.tokens[:kept])


def _first(hidden: mx.array, rows: int) -> mx.array:
    """The first rows of states [1, T, D], evaluated as they are: a slice would have to be."""
    if rows == hidden.shape[1]:
        return hidden
    if hidden.dtype != mx.float32:
        return hidden[:, :rows]
    return mx.array(np.array(hidden, copy=False)[:, :rows])


def why_not(model: nn.Module) -> str | None:
    """Why this model cannot take drafts back, or None where it can. Reads no expert."""
    switches = [m for m in model.modules() if isinstance(m, StreamedSwitch)]
    runs = [m.__dict__["_run"] for m in switches]
    try:
        for switch in switches:
            switch.__dict__["_run"] = _nothing
        return obstacle(model)
    finally:
        for switch, run in zip(switches, runs, strict=True):
            switch.__dict__["_run"] = run


def _nothing(layer: int, inner: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
    return mx.zeros((*indices.shape, x.shape[-1]), dtype=x.dtype)
