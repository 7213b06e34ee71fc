"""A disk of stated bandwidth and latency, imitated, so that benchmarks can be compared.

    streamer bench --disk 1.5GB/s,5GB/s,none        # or 1.5GB/s@100us

Reads are done as ever, best from the page cache, and then held back until such a disk would
have sent them: one at a time through its bandwidth, each `latency` after it was begun, the
latencies of several at once overlapping. All I/O threads share one clock, which runs on
while they do, so that lateness of one is not added to the next.

Limits: only ever slows down. A thread wakes some 10 us late (60 where the kernel cannot be
asked for exact timers), so reads of less than that at this bandwidth are slower than stated.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from dataclasses import dataclass

from .errors import UsageError

FORM = re.compile(r"(\d+(?:\.\d*)?)\s*([KMG]?)B/s(?:@(\d+(?:\.\d*)?)\s*(us|ms))?", re.IGNORECASE)
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "US": 1e-6, "MS": 1e-3}
PR_SET_TIMERSLACK = 29  # <linux/prctl.h>


@dataclass(frozen=True)
class Disk:
    """bandwidth in bytes per second; latency in seconds, of a read that finds the disk idle."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise UsageError(f"no disk reads {self.bandwidth} bytes per second")

    @classmethod
    def parse(cls, text: str) -> Disk | None:
        """From '1.5GB/s', '500MB/s@100us' or 'none'. Raises UsageError."""
        if text.strip() == "none":
            return None
        found = FORM.fullmatch(text.strip())
        if not found or not float(found[1]):
            raise UsageError(f"{text!r} is no disk; write 1.5GB/s, 500MB/s@100us or none")
        latency = float(found[3]) * UNITS[found[4].upper()] if found[3] else 0.0
        return cls(float(found[1]) * UNITS[found[2].upper()], latency)

    def __str__(self) -> str:
        latency = f"@{self.latency * 1e6:g}us" if self.latency else ""
        return f"{self.bandwidth / 1e9:g}GB/s{latency}"


class Clock:
    """When the disk will have done what it was asked. For any number of threads."""

    def __init__(self, disk: Disk):
        self._disk = disk
        self._lock = threading.Lock()
        self._free_at = 0.0  # when it will have sent all it has accepted
        self._exact = threading.local()

    def begin(self, nbytes: int, asked: float) -> float:
        """A read of `nbytes` begins that was `asked` for then; when it is done, for `until`.

        Times are `time.perf_counter`'s. What was asked for is in the disk's queue, though a
        thread takes it up late.
        """
        with self._lock:
            sent = max(self._free_at, asked + self._disk.latency) + nbytes / self._disk.bandwidth
            self._free_at = sent
        return sent

    def until(self, moment: float) -> None:
        """Sleep till then."""
        if not hasattr(self._exact, "done"):
            self._exact.done = True
            _exact_timers()
        if (left := moment - time.perf_counter()) > 0:
            time.sleep(left)


def _exact_timers() -> None:
    """This thread is woken when it asked to be, not up to 50 us later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
