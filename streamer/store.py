"""The expert store: byte ranges of the checkpoint's files, read into given memory.

`Store.read(pieces)` queues reads and returns at once; a few threads do them, and
`Ticket.wait()` returns when all of a call's bytes are there. Ranges that are
neighbours in a file become one read with several destinations, and large reads
are cut so that all threads share them. `streamer.backends` has the ways to
read, `streamer.probe` picks one.

Reads that are waited for go before guesses (`streamer.read_queue`); a guess can be
promoted or taken back while it is queued. Nothing is cached and duplicates are read twice.
The threads are the extension's where it can read (`streamer.native_reads`), else Python's.

    with Store([path], backend="pread") as store:
        buffer = bytearray(1 << 20)
        store.read([Piece(0, 4096, memoryview(buffer))]).wait()
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from .backends import Direct, Mapped, Pread
from .disk import Clock, Disk
from .errors import StreamerError, UsageError
from .native_reads import NativeReads, NativeTicket, usable
from .ranges import Piece, Run, Widening, cut, merge, widened
from .read_queue import Guess, ReadQueue

__all__ = ["BACKENDS", "Backend", "Counters", "Piece", "Store", "Ticket"]

Backend = Literal["mmap", "pread", "direct"]
BACKENDS: tuple[Backend, ...] = ("pread", "mmap", "direct")  # simplest first

# 4 to 8 reads in flight saturate a disk; more threads than cores and 4 only contend.
THREADS = min(8, max(4, os.cpu_count() or 1))
CHUNK_MIN, CHUNK_MAX = 256 << 10, 1 << 20  # bytes of one read, where cutting is possible
# Guesses under way: four reads keep a disk busy, and a demand that comes meanwhile waits
# for this much, 0.7 ms at 1.5 GB/s.
GUESS_BYTES = 1 << 20


@dataclass
class Counters:
    """bytes_read: asked of the kernel, with small gaps between pieces and what `direct`
    adds to fill blocks; reads: reads made, after merging and cutting; wait_seconds:
    spent in `Ticket.wait`."""

    bytes_read: int = 0
    reads: int = 0
    wait_seconds: float = 0.0


class Ticket:
    """The reads of one `Store.read` call."""

    __slots__ = ("_asked", "_busy", "_error", "_guesses", "_left", "_store", "_widen", "seconds")

    def __init__(self, store: Store, reads: int, widen: Sequence[Widening] = ()):
        self._store = store  # a store lives as long as it is being waited for
        self._left = reads
        self._asked = time.perf_counter()
        self.seconds = 0.0  # from then until all bytes were there
        self._guesses: list[Guess[Job]] = []  # its reads, where it is a guess
        self._error: StreamerError | None = None
        self._widen = widen
        self._busy = threading.Lock()  # released with the last read
        self._busy.acquire()

    @property
    def done(self) -> bool:
        """All bytes are there, or will never be."""
        return not self._left

    def wait(self) -> None:
        """Return when no read of this ticket is under way any more.

        Raises the first error, a StreamerError naming file and offset. After a
        KeyboardInterrupt reads may still land: wait again before the
        destinations are used for anything else.
        """
        if not self.done:
            began = time.perf_counter()
            with self._busy:
                pass
            self._store._waited(time.perf_counter() - began)
        if self._error is not None:
            raise self._error
        for one in self._widen:
            widened(one)
        self._widen = ()

    @property
    def _engine(self) -> _Engine:
        engine = self._store._engine
        assert isinstance(engine, _Engine)
        return engine

    def promote(self) -> None:
        """Somebody will wait for this guess now: what is still queued becomes a demand."""
        self._asked = time.perf_counter()
        self._engine.queue.promote(self._guesses)

    def cancel(self) -> None:
        """Take a guess back. Reads under way still land: `wait` first, before the
        destinations are used for anything else; it raises if anything was left out.
        Of demands nothing is taken back.
        """
        engine = self._engine
        for guess in engine.queue.cancel(self._guesses):
            engine._finish(self, engine._error(guess.job[1], "the guess was taken back"))


Job = tuple[Ticket, Run]


class Store:
    """The files of one model.

    files: opened at once, addressed by index. backend: see `streamer.backends`.
    drop_behind: keep nothing in the page cache (`direct` never does).
    threads: reads in flight. disk: one to imitate, see `streamer.disk`.

    Raises StreamerError when a file cannot be opened or the back end does not
    work there, UsageError for senseless options.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        backend: Backend = "pread",
        drop_behind: bool = False,
        threads: int = THREADS,
        disk: Disk | None = None,
    ):
        if threads < 1:
            raise UsageError(f"an expert store needs at least one thread, not {threads}")
        if backend not in BACKENDS:
            raise UsageError(f"no I/O back end {backend!r}; there are {', '.join(BACKENDS)}")
        self.files = [Path(f) for f in files]
        self.backend = backend
        self.drop_behind = drop_behind or backend == "direct"
        self.threads = threads
        self.disk = disk
        self._counters = Counters()
        source: Pread
        if backend == "direct":
            source = Direct(self.files)
        elif backend == "mmap":
            source = Mapped(self.files, drop_behind)
        else:
            source = Pread(self.files, drop_behind)
        # Workers hold the engine, not the store, so that a forgotten store closes itself.
        self._engine: _Engine | NativeReads
        if usable(source):
            self._engine = NativeReads(
                self.files,
                source,
                threads=threads,
                chunks=(CHUNK_MIN, CHUNK_MAX),
                guess_bytes=GUESS_BYTES,
                disk=disk,
            )
        else:
            self._engine = _Engine(self.files, source, self._counters, disk)
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, self._engine.stop)

    @property
    def counters(self) -> Counters:
        """What the reads cost so far."""
        if isinstance(self._engine, NativeReads):
            self._counters.bytes_read, self._counters.reads = self._engine.counts
        return self._counters

    @property
    def bytes_read(self) -> int:
        """So far, without bringing `counters` up to date."""
        native = isinstance(self._engine, NativeReads)
        return self._engine.counts[0] if native else self._counters.bytes_read  # type: ignore[union-attr]

    @property
    def native(self) -> NativeReads | None:
        """What reads where the extension does, so that an operation can wait for it."""
        return self._engine if isinstance(self._engine, NativeReads) else None

    @property
    def logging(self) -> bool:
        """Whether reads are noted as they end; what was noted before it is set is forgotten."""
        return self._engine.logging

    @logging.setter
    def logging(self, on: bool) -> None:
        self._engine.logging = on

    def take_log(self) -> np.ndarray:
        """Reads that were noted since the last time, [n, 3] float64, n >= 0: bytes; seconds after
        it was asked for that each began; seconds later that it was done. From any thread."""
        return self._engine.take_log()

    @property
    def guess_bytes(self) -> int:
        """Bytes of guesses under way at once, at most (one read at least); 0 starts none."""
        return self._engine.guess_bytes

    @guess_bytes.setter
    def guess_bytes(self, nbytes: int) -> None:
        self._engine.guess_bytes = nbytes

    def read(
        self,
        pieces: Sequence[Piece],
        guess: float | None = None,
        widen: Sequence[Widening] = (),
    ) -> Ticket | NativeTicket:
        """Queue the pieces; their destinations must stay untouched until the ticket is done.

        guess: nobody may ever need it; it waits for all demands and for guesses of a smaller
        number, and can be promoted or taken back. widen: what `Ticket.wait` finds done besides.
        Raises StreamerError when the store is closed, IndexError for unknown files.
        """
        if any(not 0 <= piece.file < len(self.files) for piece in pieces):
            raise IndexError(f"pieces name files outside 0..{len(self.files) - 1}")
        if isinstance(self._engine, NativeReads):
            if not self._close.alive:
                raise StreamerError("the expert store is closed")
            native = self._engine.submit(pieces, guess, widen)
            return NativeTicket(self._engine, native, self._waited)
        runs = merge(pieces)
        if runs:
            size = -(-sum(run.nbytes for run in runs) // self.threads)
            size = CHUNK_MIN if guess is not None else min(max(size, CHUNK_MIN), CHUNK_MAX)
            runs = [c for run in runs for c in cut(run, size)]
        ticket = Ticket(self, len(runs), widen)
        with self._lock:
            if not self._close.alive:
                raise StreamerError("the expert store is closed")
            self._engine.start(self.threads)
            if guess is None:
                self._engine.queue.demand([(ticket, run) for run in runs])
            else:
                ticket._guesses = [Guess((ticket, run), run.nbytes, guess) for run in runs]
                self._engine.queue.guess(ticket._guesses)
        return ticket

    def close(self) -> None:
        """Finish reads under way, fail those still queued, close the files. Idempotent."""
        with self._lock:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _waited(self, seconds: float) -> None:
        self._counters.wait_seconds += seconds


class _Engine:
    """The queue and its threads, which start with the first read."""

    def __init__(self, files: list[Path], source: Pread, counters: Counters, disk: Disk | None):
        self.files = files
        self.source = source
        self.counters = counters
        self.lock = threading.Lock()
        self._logging = False
        self._log: list[tuple[float, float, float]] = []
        self._clock = None if disk is None else Clock(disk)
        self.queue: ReadQueue[Job] = ReadQueue(GUESS_BYTES)
        self._threads: list[threading.Thread] = []

    @property
    def guess_bytes(self) -> int:
        return self.queue.guess_bytes

    @guess_bytes.setter
    def guess_bytes(self, nbytes: int) -> None:
        self.queue.guess_bytes = nbytes

    @property
    def logging(self) -> bool:
        return self._logging

    @logging.setter
    def logging(self, on: bool) -> None:
        if on and not self._logging:
            self._log = []
        self._logging = on

    def take_log(self) -> np.ndarray:
        with self.lock:
            log, self._log = self._log, []
        return np.array(log, dtype=float).reshape(-1, 3)

    def start(self, threads: int) -> None:
        if not self._threads:
            for i in range(threads):
                thread = threading.Thread(target=self._work, name=f"expert-read-{i}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        for ticket, run in self.queue.stop(len(self._threads)):
            self._finish(ticket, self._error(run, "the expert store was closed"))
        for thread in self._threads:
            # The last reference to a store may go, and so close it, in any thread.
            if thread is not threading.current_thread():
                thread.join()
        self.source.close()

    def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            if isinstance(job, Guess):
                self._do(*job.job, time.perf_counter())  # it may have been held back till now
                self.queue.finished(job)
            else:
                self._do(*job, job[0]._asked)
            del job

    def _do(self, ticket: Ticket, run: Run, asked: float) -> None:
        if ticket._error is not None:
            self._finish(ticket)
            return
        error, nbytes, logging = None, 0, self._logging
        began = time.perf_counter() if logging else 0.0
        until = 0.0 if self._clock is None else self._clock.begin(run.nbytes, asked)
        try:
            nbytes = self.source.fetch(*run)
        except EOFError:
            error = self._error(run, "the file is too short; was it truncated?")
        except OSError as problem:
            error = self._error(run, problem.strerror or str(problem))
            error.__cause__ = problem
        except Exception as problem:  # a thread that dies would leave its waiters waiting
            error = self._error(run, repr(problem))
            error.__cause__ = problem
        if self._clock is not None:
            self._clock.until(until)
        if logging and error is None:
            ended = (nbytes, began - asked, time.perf_counter() - began)
            with self.lock:
                self._log.append(ended)
        self._finish(ticket, error, nbytes)

    def _finish(self, ticket: Ticket, error: StreamerError | None = None, asked: int = 0) -> None:
        with self.lock:
            self.counters.reads += asked > 0
            self.counters.bytes_read += asked
            if ticket._error is None:
                ticket._error = error
            ticket._left -= 1
            done = not ticket._left
        if done:
            ticket.seconds = time.perf_counter() - ticket._asked
            ticket._guesses = []  # they hold the ticket, and it the store
            ticket._busy.release()

    def _error(self, run: Run, why: str) -> StreamerError:
        path = self.files[run.file]
        return StreamerError(
            f"cannot read {run.nbytes} bytes at offset {run.offset} of {path}: {why}"
        )
