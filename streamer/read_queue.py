"""Which read is next: demand before guess, the nearest guess first, guesses bounded.

A demand is a read that somebody waits for, a guess one that may turn out useless. Demands
go through a plain first-come queue and cost what that costs; guesses wait beside it, and a
nudge in the queue says that there is one. No guess starts while demands are queued before
its nudge, and those under way hold `guess_bytes` at most: that is what a demand may find
before it on the disk, and the most that wrong guesses cost it.

Limits: a read under way is never interrupted; demands have no deadlines, since a layer's
are all waited for before the next layer's are known.

    queue = ReadQueue(guess_bytes=1 << 20)
    queue.demand([job]); queue.guess([Guess(job, nbytes, deadline=3)])
    job = queue.get()
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Guess(Generic[Job]):
    """A read that may turn out useless. `job` is the caller's; deadlines are only compared."""

    __slots__ = ("deadline", "job", "nbytes", "queued")

    def __init__(self, job: Job, nbytes: int, deadline: float):
        self.job, self.nbytes, self.deadline = job, nbytes, deadline
        self.queued = False


class ReadQueue(Generic[Job]):
    """For any number of threads. guess_bytes may be changed at any time; 0 starts no guess."""

    def __init__(self, guess_bytes: int):
        self.guess_bytes = guess_bytes
        self._queue: queue.SimpleQueue[Job | _Nudge | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._guesses: list[tuple[float, int, Guess[Job]]] = []
        self._numbers = itertools.count()
        self._nudges = 0  # in the queue
        self._guessing = 0  # bytes of guesses under way

    def demand(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._queue.put(job)

    def guess(self, guesses: Iterable[Guess[Job]]) -> None:
        with self._lock:
            for guess in guesses:
                guess.queued = True
                heapq.heappush(self._guesses, (guess.deadline, next(self._numbers), guess))
                self._nudge()

    def get(self) -> Job | Guess[Job] | None:
        """The next read, waiting for one; None once for every `stop`. `finished` takes a guess."""
        while isinstance(job := self._queue.get(), _Nudge):
            with self._lock:
                self._nudges -= 1
                guess = self._next()
            if guess is not None:
                return guess
        return job

    def finished(self, guess: Guess[Job]) -> None:
        """A guess that `get` gave is over; those held back may start."""
        with self._lock:
            self._guessing -= guess.nbytes
            if self._guesses:
                self._nudge()

    def promote(self, guesses: Iterable[Guess[Job]]) -> None:
        """They are demands now; those that are under way or over stay as they are."""
        self.demand(guess.job for guess in self.cancel(guesses))

    def cancel(self, guesses: Iterable[Guess[Job]]) -> list[Guess[Job]]:
        """Take back those that have not started; returns them."""
        with self._lock:
            taken = [g for g in guesses if g.queued]
            for guess in taken:
                guess.queued = False
        return taken

    def stop(self, threads: int) -> list[Job]:
        """Wake so many threads for good; returns what was still queued."""
        left: list[Job] = []
        with self._lock:
            left += [g.job for _, _, g in self._guesses if g.queued]
            self._guesses.clear()
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None and not isinstance(job, _Nudge):
                left.append(job)
        for _ in range(threads):
            self._queue.put(None)
        return left

    def _nudge(self) -> None:
        self._nudges += 1
        self._queue.put(_NUDGE)

    def _next(self) -> Guess[Job] | None:
        while self._guesses and not self._guesses[0][2].queued:
            heapq.heappop(self._guesses)
        if not self._guesses or not self.guess_bytes:
            return None
        if self._queue.qsize() > self._nudges:
            self._nudge()  # demands first
            return None
        guess = self._guesses[0][2]
        if self._guessing and self._guessing + guess.nbytes > self.guess_bytes:
            return None  # what is under way nudges when it is over
        heapq.heappop(self._guesses)
        guess.queued = False
        self._guessing += guess.nbytes
        return guess


class _Nudge:
    pass


_NUDGE = _Nudge()
