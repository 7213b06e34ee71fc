"""What the tests of the expert store share; a test file takes `files` by name."""

import gc
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from streamer.errors import StreamerError
from streamer.store import Piece, Store

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc or Linux's page cache")
SIZES = (1_500_001, 300_000)


@pytest.fixture(params=["extension", "python"])
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> list[Path]:
    """Of the sizes above; the test runs once with each kind of reading threads."""
    monkeypatch.setenv("STREAMER_READS", request.param)
    paths = []
    for i, size in enumerate(SIZES):
        paths.append(tmp_path / f"shard-{i}.safetensors")
        paths[-1].write_bytes(random.Random(i).randbytes(size))
    return paths


@pytest.fixture
def python_reads(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that stand in for the kernel."""
    monkeypatch.setenv("STREAMER_READS", "python")


def open_store(files: list[Path], backend: str, **options) -> Store:
    try:
        return Store(files, backend=backend, **options)
    except StreamerError as error:
        if backend == "direct" and "refuses direct" in str(error):
            pytest.skip(str(error))
        raise


def piece(file: int, offset: int, nbytes: int) -> Piece:
    return Piece(file, offset, memoryview(bytearray(b"\xaa" * nbytes)))


def check(pieces: list[Piece], files: list[Path]) -> None:
    content = [f.read_bytes() for f in files]
    for file, offset, dest in pieces:
        assert bytes(dest) == content[file][offset : offset + dest.nbytes], (file, offset)


def some_pieces(rng: random.Random, count: int) -> list[Piece]:
    """Unaligned, overlapping, neighbouring, empty and at the end of the file."""
    pieces = []
    for _ in range(count):
        file = rng.randrange(len(SIZES))
        n = rng.choice([0, 1, 511, 512, 4096, 5000, 70_000, 290_000])
        offset = rng.choice([0, 4096, SIZES[file] - n, rng.randrange(SIZES[file] - n)])
        pieces.append(piece(file, offset, n))
        if offset + 2 * n <= SIZES[file]:
            pieces.append(piece(file, offset + n, n))
    rng.shuffle(pieces)
    return pieces


def trickle(limit):
    """os.preadv that returns at most `limit()` bytes and is interrupted every third time."""
    real, calls = os.preadv, iter(range(1 << 30))

    def preadv(fd, buffers, offset):
        if next(calls) % 3 == 0:
            raise InterruptedError
        got = min(real(fd, buffers, offset), limit())
        at = 0
        for b in buffers:
            n = max(0, min(b.nbytes, got - at))
            b[n:] = bytes(b.nbytes - n)
            at += b.nbytes
        return got

    return preadv


def open_descriptors() -> set[tuple[int, str]]:
    """Numbers and targets: what a test left open is not in the set it made before (<= it).

    Not their count: stores that other tests forgot go on closing meanwhile.
    """
    gc.collect()  # what other tests left behind
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            stat = os.fstat(int(name))
            target = f"{stat.st_dev}:{stat.st_ino}"
            if sys.platform == "linux":
                target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own, or just closed
            continue
        found.add((int(name), target))
    return found
