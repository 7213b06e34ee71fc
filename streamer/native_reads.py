"""Reads by the C++ extension: the threads of `streamer.store` without Python's lock.

Same queue, same order, same bytes as the Python threads, which remain the reference and serve
where the extension is not built and where reads are copies out of a mapping. What it is for: a
small expert is a dozen reads, and the lock that each takes from the thread that generates costs
more than the reads themselves.

    STREAMER_READS=python      # turns it off
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import backend

from .backends import BLOCK, Direct, Pread
from .errors import StreamerError
from .ranges import GAP, Piece, Widening

if TYPE_CHECKING:
    from .disk import Disk

ENDED, CANCELLED, CLOSED = -1, -2, -3  # kernels/cpu/reads.h


def usable(source: Pread) -> bool:
    """Whether the extension can read for this back end."""
    if os.environ.get("STREAMER_READS", "") == "python" or type(source) not in (Pread, Direct):
        return False
    return hasattr(backend.native(), "Reads")


class NativeTicket:
    """As `streamer.store.Ticket`."""

    __slots__ = ("_engine", "_native", "_waited")

    def __init__(self, engine: NativeReads, native: Any, waited: Callable[[float], None]):
        self._engine, self._native, self._waited = engine, native, waited

    @property
    def native(self) -> Any:
        """The extension's own."""
        return self._native

    @property
    def done(self) -> bool:
        return self._native.done

    @property
    def seconds(self) -> float:
        return self._native.seconds  # type: ignore[no-any-return]

    def wait(self) -> None:
        if not self._native.done:
            began = time.perf_counter()
            self._native.wait()
            self._waited(time.perf_counter() - began)
        error = self._native.error()
        if error[0]:
            raise self._engine.error(*error)

    def promote(self) -> None:
        self._native.promote()

    def cancel(self) -> None:
        self._native.cancel()


class NativeReads:
    """The engine of one store."""

    def __init__(
        self,
        files: list[Path],
        source: Pread,
        *,
        threads: int,
        chunks: tuple[int, int],
        guess_bytes: int,
        disk: Disk | None,
    ):
        native: Any = backend.native()
        self.files, self._source = files, source
        self._reads = native.Reads(
            source.fds,
            threads=threads,
            direct=isinstance(source, Direct),
            drop_behind=source.drop_behind,
            block=BLOCK,
            gap=GAP,
            chunk_min=chunks[0],
            chunk_max=chunks[1],
            bandwidth=disk.bandwidth if disk else 0.0,
            latency=disk.latency if disk else 0.0,
            guess_bytes=guess_bytes,
        )

    def submit(
        self, pieces: Sequence[Piece], guess: float | None, widen: Sequence[Widening]
    ) -> Any:
        """The extension's ticket. Raises StreamerError for memory that cannot be written."""
        try:
            return self._reads.submit(pieces, widen, guess)
        except BufferError as problem:
            one = pieces[0]
            raise StreamerError(
                f"cannot read {one.dest.nbytes} bytes at offset {one.offset} of "
                f"{self.files[one.file]}: {problem}"
            ) from problem

    @property
    def native(self) -> Any:
        """The extension's own."""
        return self._reads

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes asked of the kernel, reads made."""
        return self._reads.bytes_read, self._reads.reads

    @property
    def guess_bytes(self) -> int:
        return self._reads.guess_bytes

    @guess_bytes.setter
    def guess_bytes(self, nbytes: int) -> None:
        self._reads.guess_bytes = nbytes

    @property
    def logging(self) -> bool:
        return self._reads.logging

    @logging.setter
    def logging(self, on: bool) -> None:
        self._reads.logging = on

    def take_log(self) -> np.ndarray:
        return np.frombuffer(self._reads.take_log()).reshape(-1, 3)

    def stop(self) -> None:
        self._reads.stop()
        self._source.close()

    def error(self, state: int, file: int, offset: int, nbytes: int) -> StreamerError:
        """A sentence for a ticket's error."""
        why = {
            ENDED: "the file is too short; was it truncated?",
            CANCELLED: "the guess was taken back",
            CLOSED: "the expert store was closed",
        }
        reason = why.get(state) or os.strerror(state)
        return StreamerError(
            f"cannot read {nbytes} bytes at offset {offset} of {self.files[file]}: {reason}"
        )
