"""Direct reads, and what the store leaves in the page cache."""

import ctypes
import errno
import mmap
import os
import random
from pathlib import Path

import pytest
import stores
from stores import check, linux, open_descriptors, open_store, piece

from streamer.errors import StreamerError
from streamer.store import BACKENDS, Piece, Store

files = stores.files


# Direct reads


@linux
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_direct_refused(files, call, monkeypatch):
    before = open_descriptors()
    real = os.open

    def refuse(*args):
        if call == "preadv" or args[1] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(*args)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StreamerError, match=r"shard-0.* refuses direct reads .*--io pread"):
        Store(files, backend="direct")
    assert open_descriptors() <= before


@linux
def test_direct_on_tmpfs():
    """Refused up to Linux 6.5, and either refused or right since."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm to write to")
    path = folder / f"streamer-test-{os.getpid()}"
    try:
        path.write_bytes(random.Random(0).randbytes(9000))
        try:
            reads = Store([path], backend="direct")
        except StreamerError as error:
            assert "refuses direct reads" in str(error)
            return
        with reads:
            pieces = [piece(0, 4000, 5000)]
            reads.read(pieces).wait()
            check(pieces, [path])
    finally:
        path.unlink(missing_ok=True)


# Memory


def cached_bytes(path: Path) -> int:
    """Bytes of the file that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapping)
        size = ctypes.c_size_t(len(mapping))
        assert libc.mincore(ctypes.byref(start), size, pages) == 0
        del start
    return sum(p & 1 for p in pages) * mmap.PAGESIZE


@linux
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop_behind", [False, True])
def test_no_byte_is_held_twice(files, backend, drop_behind):
    path = files[0]
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path):
        pytest.skip("this filesystem keeps its files in memory")
    with open_store(files, backend, drop_behind=drop_behind) as reads:
        reads.read([piece(0, 10_000, 900_001)]).wait()
        kept = cached_bytes(path)
        assert reads.drop_behind == (drop_behind or backend == "direct")
    if reads.drop_behind:
        assert kept == 0
    else:
        assert 900_000 < kept < 1_000_000  # and nothing is read ahead


@linux
def test_mapped_pages_are_given_back(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(32 << 20))

    def mapped() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) << 10

    with Store([path], backend="mmap") as reads:
        dest = memoryview(bytearray(1 << 20))
        before = mapped()
        for i in range(32):
            reads.read([Piece(0, i << 20, dest)]).wait()
        assert mapped() - before < 4 << 20
