"""Which way of reading is fastest on this disk for experts of this size.

`choose_backend` reads random, uncached parts of the checkpoint in every way that
works here, taking turns, in about 0.3 s and 64 MB, and weighs in the page cache:
where memory beyond the budget could hold a good part of the files, buffered
reads are served from there after the first time; where it could not, nothing
may be held twice, in the pool and in the page cache. `measure` times one way.

Limits: what was written in the last seconds may still be only in memory, holes
in sparse files are not on the disk at all, and macOS cannot be told to forget
what it has cached: buffered reads then look faster than the disk is.

    python -m streamer.probe --expert-bytes 1MB CHECKPOINT
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .backends import MACOS, open_file, whole
from .console import Parser, command
from .errors import StreamerError, UsageError
from .footprint import available_memory, format_size, parse_size
from .store import THREADS, Backend, Piece, Store

PROBE_BYTES, PROBE_SECONDS = 64 << 20, 0.3
GRAIN_MAX = 2 << 20  # reads are cut anyway; larger experts take proportionally longer
WAVE, WAVE_BYTES = 8, 4 << 20  # experts asked for at once, about a layer's misses
SMALL = 64 << 20  # files not worth a choice, bytes
CACHEABLE = 0.1  # share of the files that memory must be able to cache for it to matter
TIE = 1.1
FOLIO = 2 << 20  # Linux forgets whole folios only, and makes them up to this size


class Way(NamedTuple):
    """A back end and whether it keeps its bytes out of the page cache."""

    backend: Backend
    drop_behind: bool = False

    def __str__(self) -> str:
        return f"{self.backend} with drop-behind" if self.drop_behind else self.backend


# Simplest first; the first within TIE of the best is taken.
AMPLE = (Way("pread"), Way("mmap"), Way("direct"))
# Direct reads take half the processor time of drop-behind (0.3 s and 0.6 s per GB).
TIGHT = (Way("direct"), Way("pread", drop_behind=True))


class Measurement(NamedTuple):
    """Uncached bytes per second with several experts asked for at once; seconds until one
    expert alone has come; bytes per second of a second reading, None if nothing is kept."""

    bandwidth: float
    latency: float
    cached_bandwidth: float | None


class Choice(NamedTuple):
    """How to open the `Store`, what to expect of it, and why, in one line.

    settled_bytes_per_s: the rate once the page cache holds what it can.
    """

    backend: Backend
    drop_behind: bool
    bandwidth_bytes_per_s: float
    latency_s: float
    reason: str
    settled_bytes_per_s: float


def choose_backend(
    files: Sequence[Path], expert_bytes: int, budget: int, threads: int = THREADS
) -> Choice:
    """The best way to read experts of `expert_bytes` from `files`.

    budget: bytes of memory this process still means to take; what is available
    beyond it can hold page cache. Raises StreamerError when a file cannot be
    opened, UsageError when there is nothing to read.
    """
    total = sum(_size(f) for f in files)
    spare = max(0, available_memory() - budget)
    cached = min(1.0, spare / max(total, 1))
    ways: Sequence[Way] = AMPLE if cached >= CACHEABLE else TIGHT
    if total <= SMALL:
        ways = AMPLE[:1]
    results = race(files, expert_bytes, ways, threads=threads)

    def cost(way: Way) -> float:
        """Seconds per byte once the page cache holds what it can."""
        found = results[way]
        share = cached if found.cached_bandwidth else 0.0
        return share / (found.cached_bandwidth or 1.0) + (1 - share) / found.bandwidth

    least = min(cost(way) for way in results)
    way = next(way for way in results if cost(way) <= TIE * least)
    found = results[way]
    others = ", ".join(f"{w} {_rate(r.bandwidth)}" for w, r in results.items() if w != way)
    why = f"{way} reads {_rate(found.bandwidth)} here" + (f" ({others})" if others else "")
    if total <= SMALL:
        why += f"; the files are small, {format_size(total)}"
    elif ways is TIGHT:
        why += f"; {format_size(spare)} to spare cannot cache {format_size(total)} of files"
    else:
        why += f"; memory to spare could cache {cached:.0%} of {format_size(total)} of files"
    return Choice(way.backend, way.drop_behind, found.bandwidth, found.latency, why, 1 / cost(way))


def measure(
    files: Sequence[Path],
    expert_bytes: int,
    backend: Backend,
    *,
    drop_behind: bool = False,
    threads: int = THREADS,
    limit_bytes: int = PROBE_BYTES,
    limit_seconds: float = PROBE_SECONDS,
) -> Measurement:
    """One way of reading, timed. Raises StreamerError when it does not work here."""
    way = Way(backend, drop_behind)
    return race(files, expert_bytes, [way], threads, limit_bytes, limit_seconds)[way]


def race(
    files: Sequence[Path],
    expert_bytes: int,
    ways: Sequence[Way],
    threads: int = THREADS,
    limit_bytes: int = PROBE_BYTES,
    limit_seconds: float = PROBE_SECONDS,
) -> dict[Way, Measurement]:
    """The ways that work here, taking turns on parts of the files that none has read.

    Reads about `limit_bytes` from disk and starts no round after `limit_seconds`.
    Raises StreamerError when no way works.
    """
    if expert_bytes < 1:
        raise UsageError(f"experts of {expert_bytes} bytes cannot be read")
    grain = min(expert_bytes, GRAIN_MAX)
    with contextlib.ExitStack() as stack:
        stores: dict[Way, Store] = {}
        for way in ways:
            try:
                store = Store(
                    files, backend=way.backend, drop_behind=way.drop_behind, threads=threads
                )
            except StreamerError:
                if way is ways[-1] and not stores:
                    raise
                continue
            stores[way] = stack.enter_context(store)
        wave = min(WAVE, WAVE_BYTES // grain)
        rounds = max(1, limit_bytes // len(stores) // (grain * (wave + 1)))
        fds = [open_file(f) for f in files]
        for fd in fds:
            stack.callback(os.close, fd)
        count = (rounds * (wave + 1) + 1) * len(stores)
        cells = _cells([os.fstat(fd).st_size for fd in fds], grain, count)
        buffer = memoryview(bytearray(grain * wave))
        trials = {way: _Trial(store, fds, buffer, grain) for way, store in stores.items()}
        for trial in trials.values():
            trial.start(cells)
        until = time.perf_counter() + limit_seconds
        for i in range(rounds):
            # A disk that tires, or caches, must not favour the first or the last.
            for trial in list(trials.values())[:: -1 if i % 2 else 1]:
                trial.round(cells)
            if time.perf_counter() > until:
                break
    return {way: trial.result(expert_bytes) for way, trial in trials.items()}


Cell = tuple[int, int, int]  # file, offset, bytes


class _Trial:
    """Times one store in rounds of a single expert and a wave of several."""

    def __init__(self, store: Store, fds: list[int], buffer: memoryview, grain: int):
        self._store, self._fds, self._buffer, self._grain = store, fds, buffer, grain
        self._wave = buffer.nbytes // grain
        self._alone: list[float] = []
        self._cold: list[float] = []
        self._warm: list[float] = []

    def start(self, cells: Iterator[Cell]) -> None:
        """Start the store's threads, outside the times taken."""
        file, offset, _ = next(cells)
        self._timed([(file, offset, 1)], forget=False)

    def round(self, cells: Iterator[Cell]) -> None:
        self._alone.append(self._timed([next(cells)], forget=True))
        wave = list(itertools.islice(cells, self._wave))
        nbytes = sum(n for _, _, n in wave)
        self._cold.append(nbytes / self._timed(wave, forget=True))
        if not self._store.drop_behind:
            self._warm.append(nbytes / self._timed(wave, forget=False))

    def _timed(self, cells: list[Cell], forget: bool) -> float:
        pieces = []
        for i, (file, offset, n) in enumerate(cells):
            pieces.append(Piece(file, offset, self._buffer[i * self._grain :][:n]))
            if forget and not MACOS:
                start, size = whole(offset, n, FOLIO)
                os.posix_fadvise(self._fds[file], start, size, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        self._store.read(pieces).wait()
        return max(time.perf_counter() - began, 1e-9)

    def result(self, expert_bytes: int) -> Measurement:
        bandwidth = statistics.median(self._cold)
        rest = (expert_bytes - self._grain) / bandwidth
        cached = statistics.median(self._warm) if self._warm else None
        return Measurement(bandwidth, statistics.median(self._alone) + rest, cached)


def _cells(sizes: Sequence[int], grain: int, count: int) -> Iterator[Cell]:
    """Parts of the files in random order, none twice until all `count` are used up.

    Files smaller than `grain` count as one part.
    """
    # The same places every time would be cached the second time.
    rng = random.Random()
    ends = list(itertools.accumulate(max(size // grain, size > 0) for size in sizes))
    if not ends or not ends[-1]:
        raise UsageError("there is nothing to read in the files to probe")
    numbers = rng.sample(range(ends[-1]), min(count, ends[-1]))
    for number in itertools.cycle(numbers):
        file = bisect_right(ends, number)
        offset = (number - (ends[file - 1] if file else 0)) * grain
        yield file, offset, min(grain, sizes[file] - offset)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StreamerError(f"cannot open {path}: {error.strerror}") from error


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.2f} GB/s"


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m streamer.probe", description="Time the ways of reading experts from a disk."
    )
    parser.add_argument("paths", nargs="+", type=Path, help="files, or folders of safetensors")
    parser.add_argument("--expert-bytes", default="1MB", help="size of an expert")
    parser.add_argument("--budget", default="1GB", help="memory that the run would take")
    args = parser.parse_args(argv)
    expert_bytes, budget = parse_size(args.expert_bytes), parse_size(args.budget)
    files = [
        file
        for path in args.paths
        for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    ]
    for way, found in race(files, expert_bytes, AMPLE + TIGHT[1:]).items():
        again = _rate(found.cached_bandwidth) if found.cached_bandwidth else "-"
        print(
            f"{way!s:24}{_rate(found.bandwidth):>12}  cached {again:>12}"
            f"  one expert {found.latency * 1e3:6.2f} ms"
        )
    print(choose_backend(files, expert_bytes, budget).reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
