"""Which guesses are read ahead, and what came of them.

    foresight.begin(tokens, guess=True, rehearse=False)
    foresight.chose(layer, ids, misses, x)                  # after its demands were queued
    foresight.end()

A guess is read where it is about as likely right as the disk is busy with what layers ask for: of a
right one the pass gains what the disk would else have idled, by a wrong one it loses what the disk
would else have done. How likely is learnt for each source and strength. On a saturated disk
guessing thus ends by itself.
Guesses hold an eighth of the slots at most, those of a rehearsal what is left of the pool.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .counters import Tally
from .guess import REHEARSED, Guess, Guesser, Moment, Rehearsed
from .ways import Mean

if TYPE_CHECKING:
    from .residency import Residency

REHEARSAL = "rehearsal"
NEXT = "next"  # a rehearsal of the next pass
BUCKETS = 8  # of strengths
PRIOR = 6  # guesses that a strength weighs before any has come true or not
SLOWEST = 0.01  # weight of the newest outcome, at least
LEAST = 0.5  # no guess is read that is less likely
LEEWAY = 0.1  # nor one that is less likely by this than the disk is busy
SHARE = 8  # a part of the slots
FAR = 1.0  # seconds between passes that have nothing to do with each other


@dataclass
class _Likely:
    """How often guesses of one source and strength were right."""

    share: float
    count: int = PRIOR

    def add(self, right: bool) -> None:
        self.count += 1
        self.share += (right - self.share) * max(SLOWEST, 1 / self.count)

    def add_all(self, right: int, count: int) -> None:
        """So many at once, in no order."""
        if count:
            self.count += count
            weight = max(1 - (1 - SLOWEST) ** count, count / self.count)
            self.share += (right / count - self.share) * weight


class Foresight:
    """The guesses about one pool's layers."""

    def __init__(self, run: Residency, tallies: dict[str, Tally]):
        self._run, self._tallies = run, tallies
        self.rehearsed = Rehearsed()
        self._sources: dict[str, Guesser] = {}
        self._likely = {REHEARSAL: _buckets(), NEXT: _buckets()}
        self._named: dict[int, dict[int, list[tuple[str, int]]]] = {}  # layer -> expert -> by whom
        self._read: set[tuple[int, int]] = set()
        self._working: list[Tally] = []  # of sources that guess in this pass
        self._tokens = np.zeros(0, dtype=np.int32)
        self.busy = Mean()  # share of its time that the disk reads what layers ask for
        self._learning: list[Guesser] = []  # sources that observe this pass
        self._guessing = False  # and guess in it
        self._at, self._nbytes = 0.0, 0  # when it was last looked at, and bytes wanted until then

    @property
    def learns(self) -> bool:
        """Whether a source is to observe passes in which it does not guess."""
        return any(guesser.learns for guesser in self._sources.values())

    def use(self, sources: Mapping[str, Guesser]) -> None:
        """Guess by these."""
        self._sources = dict(sources)
        self._likely = {name: _buckets() for name in (REHEARSAL, NEXT, *sources)}

    def begin(self, tokens: np.ndarray, *, guess: bool, rehearse: bool) -> None:
        """A pass over tokens [T] begins.

        guess: by the sources, which else only observe it; rehearse: layers may be rehearsed.
        """
        self._tokens, self._guessing = tokens, guess
        self._learning = [one for one in self._sources.values() if one.learns and len(tokens)]
        names = [*(self._sources if guess else ()), *([REHEARSAL] if rehearse else ())]
        self._working = [self._tallies.setdefault(name, Tally()) for name in names]
        self._clock()
        if guess:
            self._ask(Moment(tokens), (0, frozenset()))

    def end(self) -> None:
        """The pass is over."""
        self._learning, self._guessing = [], False
        self._working = []
        self._named.clear()
        self._read.clear()

    @property
    def listens(self) -> bool:
        """Whether `chose` matters for calls that miss nothing."""
        return bool(self._learning or self._guessing or self._named)

    def _clock(self) -> None:
        """How busy the disk was since the pass before with what was asked for."""
        now, nbytes = time.perf_counter(), self._run.counters.bytes_wanted
        if 0 < now - self._at < FAR:
            share = (nbytes - self._nbytes) * self._run.pace.best / (now - self._at)
            self.busy.add(min(1.0, share))
        self._at, self._nbytes = now, nbytes

    def chose(self, layer: int, ids: np.ndarray, misses: Sequence[int], x: mx.array | None) -> None:
        """The layer chose ids [..., k]; of these `misses` were absent; x: its routers' input."""
        for tally in self._working:
            tally.misses += len(misses)
        if self._named:
            self._score(layer, misses)
        if not (self._learning or self._guessing):
            return
        if len(self._tokens) * ids.shape[-1] != ids.size:
            return
        rows = ids.reshape(len(self._tokens), -1)
        for guesser in self._learning:
            guesser.observe(layer, self._tokens, rows)
        if self._guessing:
            given = None
            if x is not None:
                given = np.array(x if x.dtype == mx.float32 else x.astype(mx.float32))
                given = given.reshape(len(rows), -1)
            keep = layer, frozenset(ids.reshape(-1).tolist())
            self._ask(Moment(self._tokens, layer, given), keep)

    def rehearse(
        self,
        layer: int,
        chosen: tuple[list[int], list[int]],
        deadline: int,
        keep: tuple[int, frozenset[int]] | None,
    ) -> None:
        """A layer was rehearsed and chose these resident and absent experts: read the absent.

        keep: (layer, experts) of the call that waits.
        """
        run, (hits, absent) = self._run, chosen
        run.pool.expect(layer, hits)
        self.rehearsed.named(layer, absent)
        kept = 0 if keep is None else len(keep[1])
        room = run.pool.slots - run.ahead.held - kept - len(hits) - len(absent)
        wanted = self._note(REHEARSAL, self.rehearsed.guess(Moment(self._tokens)))
        experts = [e for e, likely in wanted.get(layer, {}).items() if likely >= self._least()]
        self._prefetch(layer, experts, deadline, room, keep)

    def trusts(self, rehearsal: str) -> bool:
        """Whether what layers name that are rehearsed in this pass, or for the next, is read."""
        return self._likely[rehearsal][_bucket(REHEARSED)].share >= self._least()

    def came(self, rehearsal: str, misses: int, outcome: tuple[int, int, int, int]) -> None:
        """Of a pass that the extension ran: experts named, right, read and used.

        misses: of the pass, where it could have been rehearsed.
        """
        tally = self._tallies.setdefault(rehearsal, Tally())
        named, right, read, used = outcome
        tally.misses += misses
        tally.named += named
        tally.right += right
        tally.read += read
        tally.used += used
        self._likely[rehearsal][_bucket(REHEARSED)].add_all(right, named)

    def _least(self) -> float:
        return max(LEAST, self.busy.value - LEEWAY)

    def _ask(self, moment: Moment, keep: tuple[int, frozenset[int]]) -> None:
        """Read what the sources name now, as far as it is likely."""
        run, least = self._run, self._least()
        best: dict[int, dict[int, float]] = {}
        for name, guesser in self._sources.items():
            for layer, found in self._note(name, guesser.guess(moment)).items():
                of_layer = best.setdefault(layer, {})
                for expert, likely in found.items():
                    of_layer[expert] = max(likely, of_layer.get(expert, 0.0))
        slots = run.pool.slots
        most = min(slots // SHARE, slots - len(keep[1]))
        for layer, of_layer in sorted(best.items()):
            good = [e for e, likely in of_layer.items() if likely >= least]
            good.sort(key=lambda e: -best[layer][e])
            self._prefetch(layer, good, layer + 1, most - run.ahead.held, keep)

    def _note(self, name: str, guesses: Iterable[Guess]) -> dict[int, dict[int, float]]:
        """Remember what a source names that is absent; layer -> expert -> how likely it is."""
        found: dict[int, dict[int, float]] = {}
        likely, tables = self._likely[name], self._run.pool.slot_of
        for layer, expert, strength in guesses:
            if tables[layer][expert] >= 0:
                continue
            bucket = _bucket(strength)
            self._named.setdefault(layer, {}).setdefault(expert, []).append((name, bucket))
            found.setdefault(layer, {})[expert] = likely[bucket].share
        return found

    def _prefetch(
        self,
        layer: int,
        experts: Sequence[int],
        deadline: int,
        room: int,
        keep: tuple[int, frozenset[int]] | None,
    ) -> None:
        new = [e for e in experts if not self._run.ahead.reads(layer, e)][: max(0, room)]
        if not new:
            return
        self._run.prefetch(layer, new, deadline, room, keep)
        for expert in new:
            self._read.add((layer, expert))
            for name in {name for name, _ in self._named[layer][expert]}:
                self._tallies[name].read += 1

    def _score(self, layer: int, misses: Sequence[int]) -> None:
        missed = set(misses)
        for expert, by in self._named.pop(layer, {}).items():
            right = expert in missed
            for name, bucket in dict(by).items():
                tally = self._tallies[name]
                tally.named += 1
                tally.right += right
                tally.used += right and (layer, expert) in self._read
                self._likely[name][bucket].add(right)


def _bucket(strength: float) -> int:
    return min(BUCKETS - 1, int(strength * BUCKETS))


def _buckets() -> list[_Likely]:
    return [_Likely((i + 0.5) / BUCKETS) for i in range(BUCKETS)]
