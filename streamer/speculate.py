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
from mlx.utils import tree_flatten

from cache.make import most_rows
from mtp.depth import DEEPEST, Depth, Fixed
from mtp.draft import Drafter
from mtp.head import Head
from mtp.hidden import take, watch
from mtp.rollback import Tape, obstacle, updates
from mtp.verify import Rule, near_tie

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
        rows: Callable[[mx.array, mx.array], mx.array],
        stop: frozenset[int],
    ) -> Block | None:
        """Draft up to `count` tokens after `last` [1] and run one pass over them.

        rows(logits [1, V], inputs [T]): log probabilities [1, V] after this step's
        `inputs`, the first of them `last`. The block ends with the first in `stop`.
        None where no draft was worth a row; nothing of the trunk has run then.
        """
        count = min(count, most_rows(cache) - 1)
        if count < 1:
            return None
        rule.begin()
        watch, began = self.model.streamer.watch, time.perf_counter()
        made = self._draft(last, count, rule, rows)
        if watch is not None:
            watch.step("draft", len(made), time.perf_counter() - began)
            began = time.perf_counter()
        if not made:
            rule.end(0)
            return None
        count, drafts = len(made), mx.concatenate(made)
        mx.async_eval(drafts)  # they are computed while the pass over them is built
        inputs = mx.concatenate([last, drafts])
        with Tape(self.model, cache, inputs[None], self._updates) as tape:
            logits = self.model(inputs[None], cache=cache)
        hidden = self.hidden()
        raw = [logits[:, i] for i in range(count + 1)]
        probable = [rows(r, inputs[: i + 1]) for i, r in enumerate(raw)]
        stood, tokens = rule.accept(drafts, probable)
        ties = mx.zeros(0)
        if rule.greedy:
            ties = mx.concatenate([near_tie(*pair) for pair in zip(raw, probable, strict=True)])
        mx.eval(stood, tokens, ties, *rule.pending)
        accepted = int(stood.item())  # type: ignore[arg-type]
        chosen: list[int] = tokens[: accepted + 1].tolist()  # type: ignore[assignment]
        end = next((i for i, t in enumerate(chosen) if t in stop), accepted)
        c = self.counters
        c.drafted += count
        c.accepted += min(accepted, end + 1)
        c.verify_passes += 1
        c.near_ties += int(ties[: end + 1].sum().item())  # type: ignore[arg-type]
        if watch is not None:
            watch.step("verify", count + 1, time.perf_counter() - began)
        return Block(self, tape, rule, chosen[: end + 1], accepted, probable, hidden, tokens)

    def _draft(
        self,
        last: mx.array,
        count: int,
        rule: Rule,
        rows: Callable[[mx.array, mx.array], mx.array],
    ) -> list[mx.array]:
        """Up to `count` tokens [1] worth verifying."""
        row = last

        def choose(logits: mx.array, before: Sequence[mx.array]) -> mx.array:
            nonlocal row
            row = rows(logits, mx.concatenate([last, *before]))
            return rule.draft(row).astype(last.dtype)

        self._drafting = []
        if isinstance(self.depth, Fixed):
            return self.drafter.draft(count, choose)
        depth, began = self.depth, time.perf_counter()

        def goes_on(token: mx.array) -> tuple[bool, bool]:
            nonlocal began
            confidence = mx.exp(row.max())
            mx.eval(token, confidence)
            now = time.perf_counter()
            self._drafting.append(now - began)
            began = now
            return depth.goes_on(confidence.item(), count)  # type: ignore[arg-type]

        return self.drafter.draft(count, choose, goes_on)


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
    tokens: mx.array

    def settle(self, kept: int) -> None:
        """Leave model and head as after the first `kept` >= 1 tokens, the last not yet run."""
        self.rule.end(kept)
        self.tape.rollback(kept)
        self.owner.drafter.note(self.hidden[:, :kept], self.tokens[:kept])


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
