"""What waiting and rehearsing cost here, measured as it runs, and which way a pass is run.

    pace.saw(nbytes, seconds)              # a read that a layer asked for
    pace.allowance()                       # bytes of guesses that may be under way
    effort.looked(s); effort.resumed(s)    # a layer rehearsed; going back to the one that waits
    effort.worth(pace.long())              # whether a pass may have waits long enough
    effort.pays(pace.left(nbytes, since))  # whether to rehearse while it waits
    way = ways.choose(); ways.record(way, Seen(seconds, waited, layers))

Plain numbers, no clock and no model: a test feeds it invented costs. Passes begin layer by layer,
and where the extension serves them go on looking ahead, which costs next to nothing there; another
way is tried when what its trial can lose is a small share of the time gone by, and only where the
numbers leave it something to gain. Passes differ by more than ways do, and texts and machines
change: a trial's passes take turns with the best way's, until the means tell the two apart.
"""

from __future__ import annotations

import math
import statistics
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
TURN = 4  # passes by a way that is tried, and then by the best; the first of them is not counted
SOME = 6  # counted passes of each with which a trial may be over
ENOUGH = 24  # with which it is over
SURE = 2.5  # errors of the difference by which the way must be faster for that
DOUBT = 1.0  # and slower, since staying loses nothing
OUTLIER = 2.0  # medians: a pass that took longer counts as that
HOPELESS = 1.6  # of the best: a pass after which a trial is over
# share of time that trials may lose; guessing differs little from looking ahead
PROBING: dict[Way, float] = dict.fromkeys(WAYS, 0.002) | {"guess": 0.0005}
LOST = 1.0  # passes: what a trial is thought to lose, at least
UNTRIED = 0.5  # and before the first
PAUSE = 4  # times what a pass takes: the most that one is taken for
MARGIN = 1.01  # by which another way must be faster to be changed to
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
        self._seconds = Mean()  # of a pass
        self._waited = {w: Mean() for w in ways}  # share of a pass
        self._missing = Mean()
        self._best: Way = ways[0]
        self._easy = False  # passes are served, so that looking ahead costs next to nothing
        self._trial: Way | None = None
        self._took: dict[Way, list[Seen]] = {}  # by it and by the best, in turns
        self._turn, self._left = ways[0], 0  # whose it is, for so many passes
        self._last: Way | None = None
        self._passes = 0
        self._time = 0.0
        self._lost: dict[Way, float] = {}  # by the last trial, in passes
        self._tried: dict[Way, float] = dict.fromkeys(ways, 0.0)  # when

    def choose(self) -> Way:
        """The way of the next pass."""
        if self._trial is None:
            self._begin()
        elif self._left == 0:
            self._go_on(self._trial)
        return self._best if self._trial is None else self._turn

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
        self._missing.add(seen.missing)
        self._waited[way].add(seen.waited / max(1e-9, seen.seconds))
        # the first after a change finds the pool and caches of the other
        counts, self._last = way == self._last, way
        if self._trial is None:
            return
        self._left = max(0, self._left - 1)
        self._tried[self._trial] = self._time
        longest = max((one.seconds for one in self._took[self._best]), default=0.0)
        if way == self._trial and seen.seconds > HOPELESS * longest > 0:
            self._over(seen.seconds / longest)
        elif way == self._turn and counts:
            self._took[way].append(seen)

    def _begin(self) -> None:
        """A trial, if it is time for one."""
        others = [w for w in self._ways if w != self._best and self.hopeful(w)]
        if self._passes < FIRST or not others:
            return
        unknown = [w for w in others if w not in self._lost]
        if unknown and self._eager:
            self._try(unknown[0])
            return
        for way in others:
            lost = self._seconds.value * self._lost.get(way, UNTRIED)
            if PROBING[way] * (self._time - self._tried[way]) > lost:
                self._try(way)
                return

    def _try(self, way: Way) -> None:
        self._trial, self._took = way, {way: [], self._best: []}
        self._turn, self._left = self._best, TURN

    def _go_on(self, way: Way) -> None:
        """A turn is over: the other's, or what came of both."""
        took, best = self._took[way], self._took[self._best]
        if self._turn == self._best:
            self._turn, self._left = way, TURN
            return
        if not took or not best:  # passes were run another way
            self._over(1.0)
            return
        reading = statistics.fmean(one.reading for one in (*took, *best))
        cost, error = _cost(took, reading)
        least, errors = _cost(best, reading)
        of_best = cost / least
        slower = (of_best - 1 / MARGIN) / max(1e-12, math.hypot(error, errors))
        if len(took) >= ENOUGH or (len(took) >= SOME and not -SURE < slower < DOUBT):
            self._over(of_best)
        else:
            self._turn, self._left = self._best, TURN

    def _over(self, of_best: float) -> None:
        """A pass of the trial's way takes this much of one of the best's."""
        way, self._trial = self._trial, None
        assert way is not None
        passes = max(1, len(self._took[way]))
        if of_best * MARGIN < 1:
            way, self._best, of_best = self._best, way, 1 / of_best
        self._lost[way] = max(LOST, passes * (of_best - 1))

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


def _cost(passes: list[Seen], reading: float) -> tuple[float, float]:
    """Seconds of a pass that reads for so long; by which share they may be off, as a deviation."""
    found = [max(0.0, one.seconds - one.reading + reading) for one in passes]
    most = OUTLIER * statistics.median(found)
    found = [min(one, most) for one in found]
    mean = max(1e-12, statistics.fmean(found))
    error = statistics.stdev(found) / math.sqrt(len(found)) / mean if len(found) > 1 else 1.0
    return mean, error
