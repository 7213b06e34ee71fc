"""Seconds that a step takes by each executor: compute, read-backs and one disk, in order.

Layer-wise: a layer's absent experts are known when its router is read back and are read while
those at hand compute. Rehearsed: one pass with what is at hand names absent experts of all
layers; they are queued nearest first and the pass resumes at the first layer that missed,
reading the unnamed as it meets them, before the queue. Looking ahead: while a layer waits those
behind it are rehearsed one by one, as far as the wait lasts, and what they name is queued. `auto`
looks ahead or goes layer by layer by what passes took. What decides is the runtime's own cost
model (`streamer.ways`). The disk serves one byte after the other; a guess that has begun is
finished first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streamer.ways import Effort, Seen, Ways
from tools.demands import Demand
from tools.machines import Costs

# Of a rehearsal after the first incomplete layer, whose own choices are all true: the share of
# the misses that it names, and of what it names that is missed; by share of experts in memory.
# Measured on the demo (docs/LOG.md), first layers included.
REHEARSED = ((0.12, 0.74, 0.79), (0.25, 0.78, 0.81), (0.5, 0.89, 0.89), (0.75, 0.96, 0.96))


@dataclass(frozen=True)
class Naming:
    """How well an executor names what later layers will miss."""

    recall: float
    precision: float


def naming(share: float) -> Naming:
    """Of a rehearsal at a pool that holds `share` of the experts."""
    shares, recalls, precisions = zip(*REHEARSED, strict=True)
    return Naming(
        float(np.interp(share, shares, recalls)), float(np.interp(share, shares, precisions))
    )


def layerwise(
    step: Demand, costs: Costs, named: Naming | None = None, rng: np.random.Generator | None = None
) -> float:
    """Seconds of a step; `named` is of other executors."""
    seconds = costs.once + costs.drafts + step.drafting * (costs.read + costs.miss)
    for need, missed in zip(step.need, step.missed, strict=True):
        seconds += costs.layer + _waiting(need, missed, missed * costs.read, costs)
    return seconds


def _waiting(need: int, missed: int, reading: float, costs: Costs) -> float:
    """What a layer takes more than with all its experts at hand, where `missed` still come.

    All but the last that comes are computed while reading goes on, as far as that lasts.
    """
    if not missed:
        return 0.0
    hidden = min(costs.wait + reading, costs.expert * max(0, need - 1))
    return costs.wait + reading + missed * costs.miss - hidden


def rehearse(step: Demand, costs: Costs, named: Naming, rng: np.random.Generator) -> float:
    """Seconds of a step; what is named of the misses is drawn by recall and precision."""
    start = costs.once + costs.drafts + step.drafting * (costs.read + costs.miss)
    rehearsal = len(step.need) * costs.rehearsed + costs.readback
    first = next((i for i, m in enumerate(step.missed) if m), None)
    if first is None:
        return start + rehearsal
    later = sum(step.missed[first + 1 :])
    total = later + step.missed[first]
    # the first layer's are named without fail: what is left to the others' recall
    recall = (named.recall * total - step.missed[first]) / later if later else 1.0
    recall = min(1.0, max(0.0, recall))
    wrong = recall * (1 / named.precision - 1)
    disk = _Disk(costs.read, costs.read + costs.guess, rehearsal)
    right: dict[int, int] = {}
    for layer in range(first, len(step.need)):
        missed = step.missed[layer]
        right[layer] = missed if layer == first else int(rng.binomial(missed, recall))
        spare = 0 if layer == first else int(rng.poisson(wrong * missed))
        disk.guess(layer, rng.permutation([True] * right[layer] + [False] * spare).tolist())
    now = rehearsal
    for layer in range(first, len(step.need)):
        missed = step.missed[layer]
        there = disk.come(layer, now)
        late = missed - there
        arrives = disk.demand(layer, now, missed - right[layer])
        now += costs.layer
        if late:
            reading = max(0.0, arrives - (now - costs.layer))
            now += _waiting(step.need[layer], late, reading, costs)
    return start + now


class _Disk:
    """One reader, demands before guesses; times in seconds of the step."""

    def __init__(self, read: float, guess: float, free: float):
        """Seconds of a demanded expert and of a guessed one; when the disk is free."""
        self._read, self._guess, self._free = read, guess, free
        self._guesses: deque[tuple[int, bool]] = deque()  # layer, whether it is needed
        self._came: dict[int, list[float]] = {}

    def guess(self, layer: int, right: list[bool]) -> None:
        """Queue experts of a layer, of which some will turn out to be needed."""
        self._guesses.extend((layer, one) for one in right)

    def _run(self, until: float) -> None:
        """Read guesses that begin before `until`."""
        while self._guesses and self._free < until:
            layer, right = self._guesses.popleft()
            self._free += self._guess
            if right:
                self._came.setdefault(layer, []).append(self._free)

    def come(self, layer: int, now: float) -> int:
        """Needed experts of a layer that are there when it is reached; its wrong ones go."""
        self._run(now)
        return sum(t <= now for t in self._came.get(layer, []))

    def demand(self, layer: int, now: float, unnamed: int) -> float:
        """When the last of the layer's experts has come, `unnamed` of them asked for now."""
        queued = sum(one == (layer, True) for one in self._guesses)
        self._guesses = deque(one for one in self._guesses if one[0] != layer)
        under_way = max(self._came.get(layer, [now]))
        if queued + unnamed == 0:
            return max(now, under_way)
        self._free = max(self._free, now) + queued * self._guess + unnamed * self._read
        return self._free


def lookahead(step: Demand, costs: Costs, named: Naming, rng: np.random.Generator) -> float:
    """Seconds of a step; what a rehearsed layer names of its misses is drawn as for `rehearse`."""
    effort = Effort()
    effort.looked(costs.rehearsed)
    disk = _Disk(costs.read, costs.read + costs.guess, 0.0)
    right = [0] * len(step.need)
    now, known = 0.0, 0  # known: layers that were rehearsed or run
    for layer, (need, missed) in enumerate(zip(step.need, step.missed, strict=True)):
        known = max(known, layer + 1)
        there = disk.come(layer, now)
        arrives = disk.demand(layer, now, missed - right[layer])
        now += costs.layer
        if missed == there:
            continue
        reading = max(0.0, arrives - (now - costs.layer))
        resumed, until = now, now + _waiting(need, missed - there, reading, costs)
        wanted = effort.pays(until - now)
        while wanted and known < len(step.need):
            resumed += costs.rehearsed
            right[known] = int(rng.binomial(step.missed[known], named.recall))
            wrong = named.recall * (1 / named.precision - 1) * step.missed[known]
            spare = int(rng.poisson(wrong))
            disk.guess(known, rng.permutation([True] * right[known] + [False] * spare).tolist())
            known += 1
            wanted = effort.goes_on(until - resumed)
        now = max(resumed, until)
    return now + costs.once + costs.drafts + step.drafting * (costs.read + costs.miss)


Executor = Callable[[Demand, Costs, Naming, np.random.Generator], float]
EXECUTORS: dict[str, Executor] = {
    "layerwise": layerwise,  # type: ignore[dict-item]
    "rehearse": rehearse,
    "lookahead": lookahead,
}
NAMES = (*EXECUTORS, "auto")


def _auto(
    steps: Sequence[Demand], costs: Costs, named: Naming, rng: np.random.Generator
) -> Iterator[float]:
    """Seconds of each step."""
    ways = Ways(("lookahead", "layerwise"))
    for step in steps:
        way = ways.choose()
        seconds = EXECUTORS[way](step, costs, named, rng)
        computing = costs.once + costs.drafts + costs.layer * len(step.need)
        missing, reading = sum(m > 0 for m in step.missed), sum(step.missed) * costs.read
        ways.record(way, Seen(seconds, max(0.0, seconds - computing), missing, reading))
        yield seconds


def rate(
    steps: Sequence[Demand], costs: Costs, executor: str, share: float, seed: int = 0
) -> float:
    """Tokens a second over these steps."""
    rng, named = np.random.default_rng(seed), naming(share)
    if executor == "auto":
        seconds = sum(_auto(steps, costs, named, rng))
    else:
        seconds = sum(EXECUTORS[executor](step, costs, named, rng) for step in steps)
    return sum(step.kept for step in steps) / seconds
