"""How many drafts the next pass verifies: those that are worth their row, as measured.

A row costs seconds and gives the chance that its draft stands. The chance is read off
the head's own confidence, corrected by how often drafts as confident stood before;
the seconds are those of whole passes by their number of rows: the experts that more
rows ask for and the reads of those absent, as they happen to be on this machine, with
this prompt and this pool. A draft is verified if its chance is worth more than its
seconds at the present rate, so an unsure head costs a draft and not a row.

Whether to draft at all is decided between two ways of decoding, plain and drafting, by
their rates. The other way is tried again now and then, for at most `PROBING` of the
time by its own estimate, so that what has become better is found.

    depth = Depth()
    most = depth.choose(limit=8)                            # 0: a plain step
    verify, more = depth.goes_on(confidence, limit=most)    # after each draft
    depth.record(verified, stood, seconds, drafting)

Confidences say nothing of the token that was drawn, only of what it was drawn from,
or residual sampling would not be exact.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field

DEEPEST = 8
PROBING = 0.005  # share of time spent on the way that is not thought best
FIRST = 8  # plain steps before the first draft
PROBE = 3  # steps of a probe; the first of them is not counted
WINDOW = 24  # steps that seconds are averaged over
OLD = 96  # steps after which all but the last `KEPT` seconds are forgotten
KEPT = 3
FORGOTTEN = 400  # steps after which a depth that is not used is thought of by its neighbours again
STEPS = 48  # drafting steps that their rate looks back
MARGIN = 1.01  # by which the other way must be better to be changed to
EDGES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # of confidence, for its correction
PRIOR = 3.0  # drafts that the head's own word counts for
MEMORY = 96  # drafts that a correction looks back
ROW = 0.3  # cost of a row before any was measured, of a plain step's
HOPE = 0.1  # the same of one row more than was measured, or it would not be tried
DRAFT = 0.2  # and of a draft
GUESS = 0.8  # acceptance before any draft


class _Seconds:
    """Of the last passes of one kind."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._step = 0
        self.value = 0.0

    def known(self, step: int = 0) -> bool:
        """Whether there are enough, and not all of them long ago."""
        return len(self._last) > 1 and step - self._step < (FORGOTTEN if self._fixed else OLD)

    @property
    def _fixed(self) -> bool:
        return len(self._last) >= KEPT

    def add(self, sample: float, step: int) -> None:
        if step - self._step > OLD:
            while len(self._last) > KEPT:
                self._last.popleft()
        self._step = step
        self._last.append(sample)
        # without the extremes: what else the machine does now and then says nothing of a depth
        count = len(self._last)
        if count < KEPT:
            self.value = min(self._last)
            return
        away = count // 5 if count > 4 else (count - 1) // 2
        middle = sorted(self._last)[away : len(self._last) - away]
        self.value = sum(middle) / len(middle)


@dataclass
class _Share:
    """Of drafts that stood, forgetting old ones."""

    value: float = 0.0
    count: int = 0

    def add(self, stood: bool) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (stood - self.value) / self.count

    def expected(self, prior: float) -> float:
        return (self.value * self.count + prior * PRIOR) / (self.count + PRIOR)


@dataclass
class _Step:
    """A drafting step: drafts made and verified, tokens expected of it."""

    drafts: int
    verified: int
    tokens: float


class _Seen:
    """Of the last drafting steps; before there were any, of one that is guessed."""

    def __init__(self, steps: Collection[_Step]):
        steps = steps or [_Step(1, 1, 1 + GUESS)]
        self.steps, self.drafts = len(steps), sum(s.drafts for s in steps)
        self.verified = Counter(s.verified for s in steps)
        self.tokens = sum(s.tokens for s in steps)


@dataclass
class Depth:
    """Chooses what to draft and verify, up to `deepest` drafts a step."""

    deepest: int = DEEPEST
    _passes: list[_Seconds] = field(default_factory=list)  # by drafts verified
    _plain: _Seconds = field(default_factory=_Seconds)
    _first: _Seconds = field(default_factory=_Seconds)  # draft, with what was verified before
    _later: _Seconds = field(default_factory=_Seconds)  # every further draft
    _stands: list[_Share] = field(default_factory=lambda: [_Share() for _ in range(len(EDGES) + 1)])
    _overall: _Share = field(default_factory=_Share)
    _steps: deque[_Step] = field(default_factory=lambda: deque(maxlen=STEPS))
    _seen: _Seen = field(default_factory=lambda: _Seen(()))
    _drafting: bool = False  # the way thought best
    _probe: int = 0  # steps left of a probe of the other way
    _last: bool | None = None  # whether the step before drafted
    _step: int = 0
    _time: float = 0.0
    _since: float = 0.0  # time when the other way was last tried
    _rate: float = 0.0  # present rate, tokens per second
    _chances: list[tuple[int, float]] = field(default_factory=list)  # bin, chance of each draft

    def __post_init__(self) -> None:
        self._passes = [_Seconds() for _ in range(self.deepest + 1)]

    def choose(self, limit: int) -> int:
        """Most drafts of the next step, at most `limit`; 0 for a plain one."""
        self._chances = []
        if not self._probe:
            self._decide()
        return min(self.deepest, limit) if self._drafting != (self._probe > 0) else 0

    def goes_on(self, confidence: float, limit: int) -> tuple[bool, bool]:
        """(whether to verify the next draft, whether to draft one more after it).

        confidence: the largest probability that the draft was chosen from; limit: drafts at most.
        """
        position = len(self._chances) + 1
        place = bisect.bisect(EDGES, confidence)
        before = self._chances[-1][1] if self._chances else 1.0
        chance = before * self._stands[place].expected(confidence)
        rate = self._rate or 1 / self._pass(0)
        row = self._pass(position) - self._pass(position - 1)
        if chance < rate * row:
            return False, False
        self._chances.append((place, chance))
        # one row more than was measured, at most: a guess may be far off
        tried = max((k for k, p in enumerate(self._passes) if p.known(self._step)), default=0)
        if position == min(limit, self.deepest, tried + 1):
            return True, False
        next_row = self._pass(position + 1) - self._pass(position)
        draft = self._later.value if self._later.known() else DRAFT * self._pass(0)
        return True, chance * self._overall.expected(GUESS) > rate * (next_row + draft)

    def record(
        self, verified: int, stood: int, seconds: float, drafting: tuple[float, ...]
    ) -> None:
        """A pass over `verified` drafts of which `stood` did took `seconds`.

        drafting: seconds of each draft made before it; none for a plain step.
        """
        self._step += 1
        drafted = bool(drafting)
        for (place, _), stands in zip(self._chances, [True] * stood + [False], strict=False):
            self._stands[place].add(stands)
            self._overall.add(stands)
        # the first step of a way pays for the change: shapes compiled, the head catching up
        if drafted == self._last:
            if drafted:
                self._passes[verified].add(seconds, self._step)
                self._first.add(drafting[0], self._step)
                for one in drafting[1:]:
                    self._later.add(one, self._step)
            else:
                self._plain.add(seconds, self._step)
        if drafted:
            expected = 1.0 + sum(chance for _, chance in self._chances[:verified])
            self._steps.append(_Step(len(drafting), verified, expected))
            self._seen = _Seen(self._steps)
        self._last = drafted
        self._time += seconds + sum(drafting)
        if self._probe and drafted != self._drafting:
            self._probe -= 1
            self._since = self._time

    def rates(self) -> tuple[float, float]:
        """Tokens per second of (plain, drafting) decoding; guessed where not measured."""
        plain = self._plain.value if self._plain.known() else self._pass(0)
        # a step without drafts is no slower than with them, whatever it was long ago
        plain = min([plain, *(p.value for p in self._passes if p.known(self._step))])
        first = self._first.value if self._first.known() else DRAFT * plain
        later = self._later.value if self._later.known() else first
        seen = self._seen
        seconds = seen.steps * (first - later) + seen.drafts * later
        seconds += sum(n * self._pass(k) for k, n in seen.verified.items())
        return 1 / plain, seen.tokens / seconds

    def _pass(self, verified: int) -> float:
        """Seconds of a pass over `verified` drafts: measured, or on the line through others."""
        known = [k for k, p in enumerate(self._passes) if p.known(self._step)]
        if verified in known:
            return self._passes[verified].value
        plain = self._plain.value if self._plain.known() else 1.0
        drafting = [k for k in known if k]
        if not drafting:
            return (self._passes[0].value if known else plain) + plain * ROW * verified
        if not verified:
            return plain
        below = max((k for k in drafting if k < verified), default=0)
        above = min((k for k in drafting if k > verified), default=0)
        low = self._passes[below].value if below else plain
        if above:
            return low + (self._passes[above].value - low) * (verified - below) / (above - below)
        under = max((k for k in drafting if k < below), default=0)
        slope = HOPE * plain
        if under:
            slope = max(0.0, (low - self._passes[under].value) / (below - under))
        return low + slope * (verified - below)

    def _decide(self) -> None:
        """Which way is best, and whether to try the other."""
        plain, drafting = self.rates()
        if self._steps and self._plain.known():
            now, other = (drafting, plain) if self._drafting else (plain, drafting)
            if other > MARGIN * now:
                self._drafting = not self._drafting
                self._since = self._time
        self._rate = drafting if self._drafting else plain
        if not self._steps:
            due = self._step >= FIRST
        else:
            other = plain if self._drafting else drafting
            # a probe loses what its seconds would have given otherwise, and never nothing
            lost = max(0.02, 1 - other / self._rate) * PROBE / other
            due = PROBING * (self._time - self._since) > lost
        if due:
            self._probe = PROBE


class Fixed:
    """The same depth at every step."""

    def __init__(self, depth: int):
        self.deepest = depth

    def choose(self, limit: int) -> int:
        return min(self.deepest, limit)

    def record(
        self, verified: int, stood: int, seconds: float, drafting: tuple[float, ...]
    ) -> None:
        """Nothing is learnt."""
