"""Who holds this process's memory, sampled beside a run.

    ledger = Ledger(model, lambda: caches, files)     # once the model is loaded
    with Sampler(ledger) as sampler:
        ...generate...
    sampler.samples[0].owners["pool"]

Every owner is measured on its own: weights and caches by their arrays, the workspace by
what MLX holds beyond them, free buffers by what MLX and malloc keep for later, the runtime
by what the process held besides when the model was loaded and by how its heap and the pages of
its files (code run for the first time) grew since.
That they add up to the footprint is therefore a check, not a definition.

The page cache of the checkpoint's files is the system's, lies outside of the footprint and
is given up when memory is short; Linux 6.5 or newer says how much it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .footprint import PAGE, footprint
from .opened import in_head, trunk_parameters

OWNERS = ("runtime", "trunk", "head", "pool", "kv", "workspace", "free")
PERIOD = 0.02  # seconds between samples, at first
SHARE = 0.003  # of the time: the period is longer where a sample takes long
HEAP_EVERY = 10  # samples at most for each walk over malloc's free blocks, which is slow
MOST = 480  # samples kept: past it every other one goes and the period doubles
SETTLING = 0.02  # seconds in which a new thread slows those beside it, before the run
STEADY = 0.01  # a footprint that changed by more is looked into anew
TRIES = 5
CACHESTAT = 451  # the system call, on every Linux architecture
CACHE_SHARE = 0.001  # of the time may go into asking for the page cache


class Sample(NamedTuple):
    """Bytes; seconds since the sampler began. page_cache: None where the system does not say."""

    seconds: float
    footprint: int
    owners: dict[str, int]
    page_cache: int | None


class Ledger:
    """What each owner holds now."""

    def __init__(self, model: Any, caches: Callable[[], Iterable[Any]], files: Sequence[Path]):
        """caches: KV caches of the trunk and the head, as they are at the time."""
        parameters = trunk_parameters(model)
        held = [0, 0]
        for path, array in parameters:
            held[in_head(path)] += array.nbytes
        self._fixed = {
            "trunk": held[False],
            "head": held[True],
            "pool": sum(e.arrays.nbytes for e in model.streamer.executors),
        }
        self._caches = caches
        self._cached = _PageCache(files)
        self._cached()  # not while the run that is watched has begun
        self._footprint = _Footprint()
        self._asked = 0
        self._look()
        self._base, self._base_free = self._other, self._heap_free
        self._base_files = self._footprint.files()
        self._runtime = footprint() - mx.get_active_memory() - mx.get_cache_memory()

    def _look(self) -> None:
        """What malloc gave out to others than MLX, and what it keeps."""
        heap = _heap()
        self._looked = self._footprint()
        self._other = heap.used - mx.get_active_memory() - mx.get_cache_memory()
        self._heap_free = heap.free

    def sample(self, seconds: float) -> Sample:
        """Taken again while a pass moves memory under it."""
        moved = abs(self._footprint() - self._looked) > STEADY * self._looked
        if moved or self._asked % HEAP_EVERY == 0:
            self._look()
        self._asked += 1
        for _ in range(TRIES):
            before = self._footprint()
            owners = self._owners()
            now = self._footprint()
            if abs(now - before) <= STEADY * now:
                break
        return Sample(seconds, now, owners, self._cached())

    def _owners(self) -> dict[str, int]:
        active, free = mx.get_active_memory(), mx.get_cache_memory()
        kv = sum(cache.nbytes for cache in self._caches())
        known = sum(self._fixed.values()) + kv
        return {
            "runtime": self._runtime
            + (self._other - self._base)
            + (self._footprint.files() - self._base_files),
            **self._fixed,
            "kv": kv,
            "workspace": max(0, active - known),
            "free": free + max(0, self._heap_free - self._base_free),
        }


class Sampler:
    """Asks a ledger from a thread of its own while the block runs."""

    def __init__(
        self, ledger: Ledger, period: float = PERIOD, most: int = MOST, share: float = SHARE
    ):
        """share: of the time that sampling may take."""
        self.samples: list[Sample] = []
        self._ledger, self._period, self._most, self._share = ledger, period, most, share
        self._cost = 0.0  # processor seconds of a sample
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="memory-samples", daemon=True)

    def __enter__(self) -> Sampler:
        self._began = time.perf_counter()
        self._take()
        self._thread.start()
        time.sleep(SETTLING)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._take()

    @property
    def began(self) -> float:
        """`time.perf_counter()` of the samples' second 0."""
        return self._began

    def _work(self) -> None:
        while not self._over.wait(max(self._period, self._cost / self._share)):
            self._take()

    def _take(self) -> None:
        began = time.thread_time()
        self.samples.append(self._ledger.sample(time.perf_counter() - self._began))
        spent = time.thread_time() - began
        # of the last dozen or so: one sample in HEAP_EVERY takes longer
        self._cost = self._cost + (spent - self._cost) / HEAP_EVERY if self._cost else spent
        if len(self.samples) >= self._most:  # of each two the larger stays: peaks are the point
            pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
            self.samples = [max(pair, key=lambda s: s.footprint) for pair in pairs]
            self._period *= 2


class _Footprint:
    """`footprint()`, many times over: the file that tells it stays open."""

    def __init__(self) -> None:
        self._fd = -1
        if sys.platform == "linux":
            self._fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def __call__(self) -> int:
        return footprint() if self._fd < 0 else self._pages(1)

    def files(self) -> int:
        """The part of it that lies in files: libraries and interpreter; 0 where nothing says so."""
        return 0 if self._fd < 0 else self._pages(2)

    def _pages(self, field: int) -> int:
        return int(os.pread(self._fd, 128, 0).split()[field]) * PAGE

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _Heap(NamedTuple):
    used: int
    free: int


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _heap() -> _Heap:
    """What malloc has given out and what it keeps; nothing where it is not glibc's."""
    if _mallinfo is None:
        return _Heap(0, 0)
    info = _mallinfo()
    return _Heap(info.uordblks + info.hblkhd, info.fordblks)


def _find_mallinfo() -> Callable[[], Any] | None:
    with contextlib.suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).mallinfo2
        function.restype = _MallInfo
        return function
    return None


_mallinfo = _find_mallinfo()


class _Range(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")
    ]


class _PageCache:
    """Bytes of files that the system keeps in memory.

    Linux counts them page by page, 0.1 s for each GB: asked seldom enough to cost nothing.
    """

    def __init__(self, files: Sequence[Path]):
        self._fds: list[int] = []
        self._last: int | None = None
        self._next = 0.0
        if sys.platform == "linux":
            self._syscall = ctypes.CDLL(None, use_errno=True).syscall
            self._fds = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]

    def __call__(self) -> int | None:
        began = time.perf_counter()
        if began >= self._next:
            self._last = self._ask()
            now = time.perf_counter()
            self._next = now + (now - began) / CACHE_SHARE
        return self._last

    def _ask(self) -> int | None:
        pages = 0
        for fd in self._fds:
            found, whole = _CacheStat(), _Range(0, 0)
            if self._syscall(CACHESTAT, fd, ctypes.byref(whole), ctypes.byref(found), 0) != 0:
                return None
            pages += found.cache
        return pages * PAGE if self._fds else None

    def __del__(self) -> None:
        for fd in self._fds:
            os.close(fd)
