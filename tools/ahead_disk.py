"""A disk that sends chunk after chunk, demands first, then the guess of the nearest deadline.

    disk = Disk(1.5e9)
    read = Read(chunks=5, asked=0.0)
    disk.ask(read, now=0.0)
    disk.finish(read)                          # seconds

For `tools.ahead_table`: simulated time, nothing is read. A chunk under way is never interrupted.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque

CHUNK = 256 << 10  # bytes


class Read:
    def __init__(self, chunks: int, asked: float, deadline: float | None = None):
        self.left, self.asked, self.deadline = chunks, asked, deadline
        self.done = float("inf")


class Disk:
    """Sends chunks one after the other, demands first, then the guess of the nearest deadline."""

    def __init__(self, bandwidth: float):
        self._each = CHUNK / bandwidth
        self._free = 0.0
        self._demands: deque[Read] = deque()
        self._guesses: list[tuple[float, int, Read]] = []
        self._numbers = itertools.count()
        self.busy = 0.0

    def ask(self, read: Read, now: float) -> None:
        self.run(now)
        if read.deadline is None:
            self._demands.append(read)
        else:
            heapq.heappush(self._guesses, (read.deadline, next(self._numbers), read))

    def promote(self, read: Read, now: float) -> None:
        self.run(now)
        if read.left and read.deadline is not None:
            read.deadline = None
            self._guesses = [g for g in self._guesses if g[2] is not read]
            heapq.heapify(self._guesses)
            self._demands.append(read)

    def cancel(self, read: Read, now: float) -> bool:
        """Whether it had not been begun."""
        self.run(now)
        if not read.left:
            return False
        self._guesses = [g for g in self._guesses if g[2] is not read]
        heapq.heapify(self._guesses)
        return True

    def run(self, until: float) -> None:
        while self._next() is not None and self._serve(until):
            pass

    def finish(self, read: Read) -> float:
        while read.left:
            self._serve(float("inf"))
        return read.done

    def left(self, now: float) -> float:
        """Seconds until all demands are there."""
        chunks = sum(r.left for r in self._demands)
        return max(0.0, max(self._free, now) + chunks * self._each - now) if chunks else 0.0

    def _next(self) -> Read | None:
        if self._demands:
            return self._demands[0]
        return self._guesses[0][2] if self._guesses else None

    def _serve(self, until: float) -> bool:
        read = self._next()
        assert read is not None
        start = max(self._free, read.asked)
        if start >= until:
            return False
        self._free = start + self._each
        self.busy += self._each
        read.left -= 1
        if not read.left:
            read.done = self._free
            if self._demands and self._demands[0] is read:
                self._demands.popleft()
            else:
                heapq.heappop(self._guesses)
        return True
