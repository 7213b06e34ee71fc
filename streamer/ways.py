"""What waiting and rehearsing cost here, measured as it runs, and which way a pass is run.

    pace.saw(nbytes, seconds)              # a read that a layer asked for
    pace.allowance()                       # bytes of guesses that may be under way
    effort.looked(s); effort.resumed(s)    # a layer rehearsed; going back to the one that waits
    effort.worth(pace.long())              # whether a pass may have waits long enough
    effort.pays(pace.left(nbytes, since))  # whether to rehearse while it waits
    way = ways.choose(); ways.record(way, Seen(seconds, waited, layers))

Plain numbers, no clock and no model: a test feeds it invented costs. Passes begin layer by layer,
and where the extension serves them go on looking ahead, which costs next to nothing there; another
way is tried for a few passes when what its trial can lose is a small share of the time gone by, and
only where the numbers leave it something to gain. Passes differ by more than ways do: a trial ends
early only where it is clearly slower, and the way that another took the place of is tried again
soon, since it was measured before that.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

Choice = Literal["auto", "layerwise", "lookahead", "rehearse"]
EXECUTORS: tuple[Choice, ...] = ("layerwise", "lookahead", "rehearse", "auto")
Way = Literal["layerwise", "lookahead", "guess", "rehearse"]  # guess: lookahead, and guessers
WAYS: tuple[Way, ...] = ("layerwise", "lookahead", "guess", "rehearse")  # as they are tried

GUESSES = 1 << 20  # bytes of guesses under way at most: four reads keep a disk busy
DELAY = 0.7e-3  # seconds that they may hold up a demand
FADING = 0.1  # weight of the newest sample
FORGETTING = 1.01  # by which the best read becomes worse with each that is no better
FIRST = 6  # passes before any trial
TRIAL = 4  # passes of a trial; the first of them is not counted
WINDOW = 16  # passes whose median is a way's cost
ENOUGH = 12  # of them, with which a trial is over
SLOWER = 1.05  # by which a way is slower that is left before
HOPELESS = 1.6  # and at once
# share of time that trials may lose; guessing differs little from looking ahead
PROBING: dict[Way, float] = dict.fromkeys(WAYS, 0.002) | {"guess": 0.0005}
LEAST = 0.1  # what a trial is thought to lose of its time, at least
PAUSE = 4  # times what a pass takes: the most that one is taken for
MARGIN = 1.01  # by which another way must be faster to be changed to
FAVOUR = 1.03  # and by so much more where it would take the place of layer-wise; back, by less
AGAIN = 100  # passes without rehearsing after which its costs are thought to be less
FORGOTTEN = 0.8  # and by how much
SLACK = 1.2  # times a layer's rehearsal: left of a wait in which one is begun
WORTH_WAITING = 0.1  # share of a pass that it waits, below which looking ahead gains nothing
RARE = 0.25  # layers of a pass that miss, above which rehearsing all of it does not pay


class Mean:
    """A mean that forgets."""

    def __init__(self, start: float = 0.0):
        self.value, self.count = start, 0

    def add(self, sample: float) -> None:
        self.count += 1
        self.value += (sample - self.value) * max(FADING, 1 / self.count)


class Pace:
    """How long reads take that a layer waits for."""

    def __init__(self) -> None:
        self._waits = Mean()
        self._each = Mean()  # seconds a byte, the latency at this depth of the queue included
        self._best = 0.0  # the least of late

    def saw(self, nbytes: int, seconds: float) -> None:
        """They came within `seconds`."""
        each = seconds / max(1, nbytes)
        self._waits.add(seconds)
        self._each.add(each)
        self._best = min(each, self._best * FORGETTING) if self._best else each

    @property
    def each(self) -> float:
        """Seconds a byte; 0 while unknown."""
        return self._each.value

    @property
    def best(self) -> float:
        """Seconds a byte when nothing else is read; 0 while unknown."""
        return self._best

    def long(self) -> float:
        """Seconds of a long wait: twice the average of layers that missed."""
        return 2 * self._waits.value

    def left(self, nbytes: int, since: float) -> float:
        """Seconds that `nbytes` asked for `since` seconds ago still take; 0 while unknown."""
        return max(0.0, nbytes * self._each.value - since)

    def allowance(self) -> int:
        """Bytes of guesses that may be under way: a demand that comes then waits for them."""
        each = self._each.value
        return GUESSES if not each else min(GUESSES, max(GUESSES // 4, int(DELAY / each)))


class Effort:
    """What it costs to rehearse the layers behind one that waits."""

    def __init__(self) -> None:
        self._layer, self._return, self._end = Mean(), Mean(), Mean()
        self._idle = 0  # passes since it could pay

    @property
    def layer(self) -> float:
        """Seconds that rehearsing a layer takes; 0 while unknown."""
        return self._layer.value

    @property
    def end(self) -> float:
        """Seconds of a pass's end, its last experts and the head; 0 while unknown."""
        return self._end.value

    def ended(self, seconds: float) -> None:
        """The end of a pass took so long."""
        self._end.add(seconds)

    def looked(self, seconds: float) -> None:
        """A layer was rehearsed and read back."""
        self._layer.add(seconds)

    def resumed(self, seconds: float) -> None:
        """From the end of the rehearsal back to where the layer waited."""
        self._return.add(seconds)

    def worth(self, longest: float) -> bool:
        """Whether to look out for waits in a pass, where none is `longest` seconds or longer.

        Costs of long ago are forgotten little by little, so that it is tried again.
        """
        self._idle = 0 if self.pays(longest) else self._idle + 1
        if self._idle >= AGAIN:
            self._idle = 0
            self._layer.value *= FORGOTTEN
            self._return.value *= FORGOTTEN
        return not self._idle

    def pays(self, left: float) -> bool:
        """Whether a layer is rehearsed in the time that is `left`, and the way back gone.

        Somewhat more than that: what is at hand of the layer that waits is computed again, and
        reads take longer while something computes.
        """
        return left > SLACK * self._layer.value + self._return.value

    def goes_on(self, left: float) -> bool:
        """Whether to rehearse one more, and be back at the waiting layer in time."""
        return left > self._layer.value + self._return.value


@dataclass(frozen=True)
class Seen:
    """A pass: seconds in all, seconds waited for reads, layers that missed; reading: seconds that
    reading what it missed takes, whether waited for or not; served: without Python in between."""

    seconds: float
    waited: float = 0.0
    missing: float = 0.0
    reading: float = 0.0
    served: bool = False


class Ways:
    """Chooses the way of the next pass by what passes took.

    Passages of a text miss unequally much: what reading took longer or shorter than on average
    is taken off.
    """

    def __init__(self, ways: tuple[Way, ...] = WAYS, eager: bool = True):
        """eager: what is not known yet is tried at once, and not when a trial's turn has come."""
        self._ways, self._eager = ways, eager
        self._costs: dict[Way, deque[float]] = {w: deque(maxlen=WINDOW) for w in ways}
        self._reading, self._seconds = Mean(), Mean()  # of a pass
        self._waited = {w: Mean() for w in ways}  # share of a pass
        self._missing = Mean()
        self._best: Way = ways[0]
        self._easy = False  # passes are served, so that looking ahead costs next to nothing
        self._trial: Way | None = None
        self._left = 0  # passes of the trial
        self._back: tuple[Way, int] | None = None  # to be tried again, after so many passes
        self._last: Way | None = None
        self._passes = 0
        self._time = 0.0
        self._tried: dict[Way, float] = dict.fromkeys(ways, 0.0)  # when

    def choose(self) -> Way:
        """The way of the next pass."""
        if self._left == 0 and self._trial is not None:
            self._judge(self._trial)
        if self._left == 0:
            self._begin()
        return self._best if self._trial is None else self._trial

    def record(self, way: Way, seen: Seen) -> None:
        """A pass was run that way."""
        if self._seconds.count > FIRST and seen.seconds > PAUSE * self._seconds.value:
            # what came between this pass and the next was no decoding; or all is slower now
            seen = replace(seen, seconds=PAUSE * self._seconds.value)
        self._passes += 1
        if seen.served and not self._easy:
            self._easy = True
            if self._passes == 1 and "lookahead" in self._ways:
                self._best = "lookahead"
        self._time += seen.seconds
        self._seconds.add(seen.seconds)
        self._reading.add(seen.reading)
        seconds = seen.seconds - seen.reading + self._reading.value
        if way == self._trial and seconds > HOPELESS * (self._cost(self._best) or seconds):
            self._costs[way].extend((seconds, seconds))
            self._left = 1
        elif way == self._last:  # the first after a change finds the pool and caches of the other
            self._costs[way].append(seconds)
        self._last = way
        self._missing.add(seen.missing)
        self._waited[way].add(seen.waited / max(1e-9, seen.seconds))
        if self._left and way == self._trial:
            self._left -= 1
            self._tried[way] = self._time

    def _cost(self, way: Way) -> float | None:
        """Seconds of a pass, None while unknown."""
        found = self._costs[way]
        return statistics.median(found) if len(found) > 1 else None

    def _judge(self, way: Way) -> None:
        """So many passes of a trial are over: whether it goes on, and if not, what came of it."""
        best, cost = self._cost(self._best), self._cost(way)
        if best is None or cost is None:  # its passes were run another way
            self._trial = None
            return
        if len(self._costs[way]) < ENOUGH and cost < SLOWER * best:
            self._left = TRIAL - 1
            return
        again = self._back is not None and self._back[0] == way
        if best > self._margin(way) * cost:
            if self._back is None:
                self._back = self._best, self._passes + WINDOW
            self._best = way
        if again:
            self._back = None
        self._trial = None

    def _margin(self, way: Way) -> float:
        """How much faster the way must be than the best.

        Medians of a few passes differ by hundredths, and one that looks faster by chance stays.
        """
        if self._best == "layerwise" and not self._easy:
            return MARGIN * FAVOUR
        return MARGIN / FAVOUR if way == "layerwise" else MARGIN

    def _begin(self) -> None:
        """A trial, if it is time for one."""
        others = [w for w in self._ways if w != self._best and self.hopeful(w)]
        if self._passes < FIRST or not others:
            return
        if (best := self._cost(self._best)) is None:
            return
        unknown = [w for w in others if self._cost(w) is None]
        if unknown and self._eager:
            self._try(unknown[0])
            return
        if self._back is not None:
            if self._passes >= self._back[1]:
                self._try(self._back[0])
            return
        for way in others:
            cost = self._cost(way) or best
            lost = TRIAL * self._seconds.value * max(LEAST, cost / best - 1)
            if PROBING[way] * (self._time - self._tried[way]) > lost:
                self._try(way)
                return

    def _try(self, way: Way) -> None:
        self._trial, self._left = way, TRIAL
        self._costs[way].clear()  # of another time

    def hopeful(self, way: Way) -> bool:
        """Whether there is anything to gain.

        Where passes are served, guessers and rehearsals of whole passes only bring Python back.
        """
        if self._easy and way in ("guess", "rehearse"):
            return False
        if way in ("lookahead", "guess"):
            return self._waited[self._best].value > WORTH_WAITING
        if way == "rehearse":
            return self._missing.value < RARE
        return True
