"""Three ways to bring bytes of a file into memory that is already there.

- `Pread`: buffered reads straight into the destinations, no readahead. With
  `drop_behind` the pages are dropped from the page cache after each read, so
  that a byte is not held twice (pool and page cache).
- `Direct`: past the page cache (O_DIRECT on Linux, F_NOCACHE on macOS), through
  one aligned buffer per thread because destinations are not page-aligned.
- `Mapped`: copies out of a read-only mapping; the kernel is asked for the range
  first and the mapped pages are given back after. Left to page faults alone it
  reads 5 to 25 times the bytes wanted, by readahead.

Each is used by several threads at once through `streamer.store.Store`, which
also turns their OSError and EOFError into sentences.

Limits: a file that shrinks in the instant between `Mapped`'s size check and its
copy ends the process with SIGBUS, as with any mapping.

    python -m streamer.probe --expert-bytes 1MB model-*.safetensors
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .errors import StreamerError

MACOS = sys.platform == "darwin"
PAGE = mmap.PAGESIZE
WINDOW = 256 << 10  # bytes that one mapped read has mapped at a time
LATE = 256  # ranges that are dropped from the page cache once more when no read is under way
AROUND = 2 << 20  # touching a page maps its neighbours, at most to the ends of its page table
# Disks have blocks of 512 or 4096 bytes; macOS bypasses its cache by whole pages.
BLOCK = PAGE if MACOS else 4096
# <fcntl.h> of macOS; Python 3.11's fcntl module has no names for them.
F_RDAHEAD, F_NOCACHE = 45, 48
MAX_OPEN_FILES = 10240  # macOS refuses a higher soft limit even where the hard one is infinite


def open_file(path: Path, flags: int = 0) -> int:
    """A read-only descriptor. Raises StreamerError naming `path`."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        if flags and error.errno == errno.EINVAL:
            raise _refused(path, error) from error
        raise StreamerError(f"cannot open {path}: {error.strerror}") from error


def _allow_open_files(n: int) -> None:
    """Raise the soft limit, 256 on macOS: less than the shards of a large checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A map holds a descriptor of its own, and MLX keeps one per shard besides.
    want = 4 * n + 256
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < min(want, most):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(want, most), hard))


class Pread:
    """Buffered reads, one iovec per destination."""

    flags = 0

    def __init__(self, files: Sequence[Path], drop_behind: bool = False):
        self.drop_behind = drop_behind
        self.fds: list[int] = []
        _allow_open_files(len(files))
        try:
            for path in files:
                self.fds.append(open_file(path, self.flags))
                self._advise(self.fds[-1])
        except BaseException:
            self.close()
            raise

    def _advise(self, fd: int) -> None:
        """Experts are read whole and in no order: readahead would only read others'."""
        if not MACOS:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            return
        import fcntl

        fcntl.fcntl(fd, F_RDAHEAD, 0)
        fcntl.fcntl(fd, F_NOCACHE, int(self.drop_behind))

    def fetch(self, file: int, offset: int, parts: Sequence[memoryview], nbytes: int) -> int:
        """Fill `parts`, one after the other, with the `nbytes` bytes at `offset`.

        Returns the bytes asked of the kernel. Raises OSError, and EOFError where
        the file ends before the range does.
        """
        fd = self.fds[file]
        got = _preadv(fd, parts, offset)
        while got < nbytes:
            n = _preadv(fd, _rest(parts, got), offset + got)
            if n == 0:
                raise EOFError
            got += n
        if self.drop_behind:
            self._drop(fd, offset, nbytes)
        return nbytes

    def _drop(self, fd: int, offset: int, nbytes: int) -> None:
        if not MACOS:
            start, size = whole(offset, nbytes, PAGE)
            os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Direct(Pread):
    """Reads that leave nothing in the page cache.

    Raises StreamerError at construction where the filesystem refuses them.
    """

    flags = getattr(os, "O_DIRECT", 0)  # macOS has F_NOCACHE instead, set by _advise

    def __init__(self, files: Sequence[Path]):
        self._local = threading.local()
        super().__init__(files, drop_behind=True)
        devices = set()
        try:
            for path, fd in zip(files, self.fds, strict=True):
                status = os.fstat(fd)
                if status.st_size and status.st_dev not in devices:
                    devices.add(status.st_dev)
                    self._try(path, fd)
        except BaseException:
            self.close()
            raise

    def _advise(self, fd: int) -> None:
        if MACOS:
            super()._advise(fd)

    def _try(self, path: Path, fd: int) -> None:
        try:
            _preadv(fd, [self._buffer(BLOCK)[:BLOCK]], 0)
        except OSError as error:
            raise _refused(path, error) from error

    def _buffer(self, size: int) -> memoryview:
        """This thread's page-aligned buffer of at least `size` bytes."""
        held: memoryview | None = getattr(self._local, "buffer", None)
        if held is None or held.nbytes < size:
            held = self._local.buffer = memoryview(mmap.mmap(-1, size))
        return held

    def fetch(self, file: int, offset: int, parts: Sequence[memoryview], nbytes: int) -> int:
        fd = self.fds[file]
        start, size = whole(offset, nbytes, BLOCK)
        buffer = self._buffer(size)
        first, wanted, got = offset - start, offset - start + nbytes, 0
        while got < wanted:
            n = _preadv(fd, [buffer[got:size]], start + got)
            if got + n >= wanted:
                break
            # Less than asked: an interruption, or the file's end. Only whole blocks count,
            # since the next read must start at one.
            if n == 0 or os.fstat(fd).st_size < offset + nbytes:
                raise EOFError
            got = (got + n) & -BLOCK
        _scatter(np.frombuffer(buffer, np.uint8)[first:wanted], parts)
        return size


class Mapped(Pread):
    """Copies out of a mapping, which stays empty between reads (RSS does not grow)."""

    def __init__(self, files: Sequence[Path], drop_behind: bool = False):
        super().__init__(files, drop_behind)
        self._maps: list[mmap.mmap | None] = []
        try:
            for path, fd in zip(files, self.fds, strict=True):
                empty = os.fstat(fd).st_size == 0
                self._maps.append(None if empty else _map(path, fd))
            self._bases = [0 if m is None else _address(m) for m in self._maps]
            self._reading = 0
            self._late: list[tuple[int, int, int]] = []
            self._count = threading.Lock()
        except BaseException:
            self.close()
            raise

    def fetch(self, file: int, offset: int, parts: Sequence[memoryview], nbytes: int) -> int:
        fd, mapping = self.fds[file], self._maps[file]
        # A page past the end of the file is a SIGBUS, not an error.
        if mapping is None or min(os.fstat(fd).st_size, len(mapping)) < offset + nbytes:
            raise EOFError
        start, size = whole(offset, nbytes, PAGE)
        if MACOS:
            mapping.madvise(mmap.MADV_WILLNEED, start, size)
        else:  # the same as MADV_WILLNEED, but mmap.madvise holds the GIL meanwhile
            os.posix_fadvise(fd, start, size, os.POSIX_FADV_WILLNEED)
        with self._count:
            self._reading += 1
        try:
            self._copy(mapping, file, offset, parts)
        finally:
            self._done(fd, start, size)
        return nbytes

    def _copy(
        self, mapping: mmap.mmap, file: int, offset: int, parts: Sequence[memoryview]
    ) -> None:
        taken = 0
        for some in _windows(parts, WINDOW):  # what is mapped counts as this process's memory
            length = sum(part.nbytes for part in some)
            _scatter(np.frombuffer(mapping, np.uint8, length, offset + taken), some)
            mapping.madvise(mmap.MADV_DONTNEED, *self._touched(file, offset + taken, length))
            taken += length

    def _done(self, fd: int, start: int, size: int) -> None:
        """Drop what was read, and again once no other read may have it mapped."""
        with self._count:
            self._reading -= 1
            if not self.drop_behind:
                return
            self._drop(fd, start, size)
            self._late = [*self._late[1 - LATE :], (fd, start, size)]
            if self._reading == 0:
                for late in self._late:
                    self._drop(*late)
                self._late = []

    def _touched(self, file: int, offset: int, nbytes: int) -> tuple[int, int]:
        """Start and size of what reading the range has mapped: by addresses, not offsets."""
        base, size = self._bases[file], os.fstat(self.fds[file]).st_size
        start, span = whole(base + offset, nbytes, AROUND)
        first = max(0, start - base)
        return first, min(start + span - base, size) - first

    def close(self) -> None:
        super().close()
        self._maps = []


def whole(offset: int, nbytes: int, unit: int) -> tuple[int, int]:
    """Start and size of the range rounded out to multiples of `unit`, a power of two."""
    start = offset & -unit
    return start, ((offset + nbytes + unit - 1) & -unit) - start


def _preadv(fd: int, parts: Sequence[memoryview], offset: int) -> int:
    while True:
        try:
            return os.preadv(fd, parts, offset)
        except InterruptedError:
            continue


def _rest(parts: Sequence[memoryview], skip: int) -> list[memoryview]:
    """`parts` without their first `skip` bytes."""
    rest = []
    for part in parts:
        if skip < part.nbytes:
            rest.append(part[skip:])
        skip = max(0, skip - part.nbytes)
    return rest


def _windows(parts: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    """`parts` in order, cut into lists of `size` bytes, the last perhaps shorter."""
    some: list[memoryview] = []
    room = size
    for part in parts:
        while part.nbytes > room:
            yield [*some, part[:room]]
            some, part, room = [], part[room:], size
        some.append(part)
        room -= part.nbytes
    if some:
        yield some


def _scatter(source: np.ndarray, parts: Sequence[memoryview]) -> None:
    # np.copyto lets other threads run; copying between memoryviews does not.
    at = 0
    for part in parts:
        np.copyto(np.frombuffer(part, np.uint8), source[at : at + part.nbytes])
        at += part.nbytes


def _map(path: Path, fd: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise StreamerError(f"cannot map {path}: {error}") from error


def _address(mapping: mmap.mmap) -> int:
    return np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]


def _refused(path: Path, error: OSError) -> StreamerError:
    return StreamerError(
        f"{path} lies on a filesystem that refuses direct reads ({error.strerror}); use --io pread"
    )
