"""How many tokens to draft next: the depth that gives most tokens a second, as measured.

A step at depth k costs seconds and gives E(k) = 1 + a1 + a1 a2 + ... tokens, a_j the
share of drafts at position j that stand when those before do. Both are measured
while decoding. Seconds are those of the whole step at that depth: rows, drafting,
the experts that more rows ask for and the reads of those absent, as they happen to
be on this machine, with this prompt and this pool. Depth 0 is plain decoding.

A depth never tried is guessed by the line through its neighbours and tried when the
guess is best. Other depths are tried again now and then, for at most `PROBING` of the
time by their own estimates, so that what has become better is found.

    depth = Depth()
    k = depth.choose(limit=8)
    depth.record(k, stood, seconds)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

DEEPEST = 8
PROBING = 0.005  # share of time spent on depths that are not thought best
WINDOW = 24  # steps that seconds are averaged over
PROBE = 3  # steps of a probe; the first of them is not counted
SHIFT = 1.3  # the best depth's cost changing by this makes others worth a look
OLD = 64  # steps after which all but the last `KEPT` seconds are forgotten
KEPT = 3
DRAFTS = 48  # drafts that an acceptance looks back
MARGIN = 1.015  # by which another depth must be better to be changed to
GUESS = 0.6  # acceptance before any draft
PRIOR = 4  # drafts that the position before counts for
ROW = 0.25  # cost of a depth more before any was measured, of a plain step's


class _Seconds:
    """Of the last steps at one depth."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._step = 0
        self.time = 0.0  # seconds of decoding before the last one
        self.value = 0.0

    @property
    def known(self) -> bool:
        return bool(self._last)

    def add(self, sample: float, step: int, time: float) -> None:
        if step - self._step > OLD:
            while len(self._last) > KEPT:
                self._last.popleft()
        self._step, self.time = step, time
        self._last.append(sample)
        # without the extremes: what else the machine does now and then says nothing of a depth
        count = len(self._last)
        away = count // 5 if count > 4 else (count - 1) // 2
        middle = sorted(self._last)[away : len(self._last) - away]
        self.value = sum(middle) / len(middle)


@dataclass
class _Share:
    """Of drafts that stood, forgetting old ones."""

    value: float = 0.0
    count: int = 0

    def add(self, stood: bool) -> None:
        self.count += 1
        self.value += (stood - self.value) / min(self.count, DRAFTS)


class Depth:
    """Chooses between 0 and `deepest`."""

    def __init__(self, deepest: int = DEEPEST):
        self.deepest = deepest
        self._seconds = [_Seconds() for _ in range(deepest + 1)]
        self._stands = [_Share() for _ in range(deepest + 1)]  # by position, from 1
        self._plan = [0] * 3
        self._best = 0
        self._last = -1  # depth of the step before
        self._step = 0
        self._time = 0.0
        self._level = 0, 0.0  # the best depth and its seconds when the others were looked at
        self._due: list[int] = []

    def choose(self, limit: int) -> int:
        """The next step's depth, at most `limit`."""
        if not self._plan:
            self._best = self._find_best()
            self._plan = self._probe()
        return min(self._plan.pop(0), limit)

    def record(self, depth: int, stood: int, seconds: float) -> None:
        """A step at `depth` had its first `stood` drafts accepted and took `seconds`."""
        self._step += 1
        for position in range(1, min(depth, stood + 1) + 1):
            self._stands[position].add(position <= stood)
        # the first step at a depth pays for the change: shapes compiled, the head catching up
        if depth == self._last:
            self._seconds[depth].add(seconds, self._step, self._time)
        elif not self._plan and not self._seconds[depth].known:
            self._plan = [depth] * 3
        self._last = depth
        self._time += seconds

    def tokens(self, depth: int) -> float:
        """Expected tokens of a step."""
        total, chance = 1.0, 1.0
        for position in range(1, depth + 1):
            chance *= self.acceptance(position)
            total += chance
        return total

    def acceptance(self, position: int) -> float:
        """Share of drafts at `position` >= 1 that stand when those before do."""
        before = GUESS if position == 1 else self.acceptance(position - 1)
        mean = self._stands[position]
        n = min(mean.count, DRAFTS)
        return (mean.value * n + before * PRIOR) / (n + PRIOR)

    def seconds(self, depth: int) -> float:
        """Of a step: measured, or on the line through the nearest depths measured."""
        if self._seconds[depth].known:
            return self._seconds[depth].value
        known = [k for k in range(self.deepest + 1) if self._seconds[k].known]
        if not known:
            return 1.0 + ROW * depth
        plain = self._seconds[known[0]].value
        drafting = [k for k in known if k]
        if len(drafting) < 2:
            # the first draft may cost more than the others: each is hoped to be cheap
            return self._seconds[known[-1]].value + ROW * plain * (depth - known[-1])
        a, b = sorted(sorted(drafting, key=lambda k: abs(k - depth))[:2])
        low, high = self._seconds[a].value, self._seconds[b].value
        slope = max(0.0, (high - low) / (b - a))
        return max(low + slope * (depth - a), low / 2)

    def rate(self, depth: int) -> float:
        """Expected tokens per second."""
        return self.tokens(depth) / self.seconds(depth)

    def _find_best(self) -> int:
        best = max(range(self.deepest + 1), key=self.rate)
        return best if self.rate(best) > MARGIN * self.rate(self._best) else self._best

    def _probe(self) -> list[int]:
        """The best depth, or a few steps at another when that has been paid for."""
        others = [k for k in range(self.deepest + 1) if k != self._best]
        beside = {k for k in others if abs(k - self._best) == 1} | {0, max(others, key=self.rate)}
        beside.discard(self._best)
        depth, seconds = self._level
        now = self.seconds(self._best)
        if depth != self._best or not 1 / SHIFT < now / seconds < SHIFT:
            self._due = sorted(beside) if depth == self._best else []
            self._level = self._best, now
        if self._due:
            return [self._due.pop()] * PROBE
        share = PROBING / len(beside)
        for depth in sorted(beside):
            if share * (self._time - self._seconds[depth].time) >= self._loss(depth):
                return [depth] * PROBE
        return [self._best]

    def _loss(self, depth: int) -> float:
        """Seconds that a probe of `depth` is expected to cost over the best depth's."""
        loss = self.seconds(depth) - self.tokens(depth) / self.rate(self._best)
        return PROBE * max(loss, 0.02 * self.seconds(self._best))


class Fixed:
    """The same depth at every step."""

    def __init__(self, depth: int):
        self.deepest = depth

    def choose(self, limit: int) -> int:
        return min(self.deepest, limit)

    def record(self, depth: int, stood: int, seconds: float) -> None:
        """Nothing is learnt."""
