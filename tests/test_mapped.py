"""Reads through a mapping leave nothing mapped, so that a budget holds with --io mmap."""

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from streamer.memory_cgroup import drop_page_cache
from streamer.store import Piece, Store

SIZE = 192 << 20
EACH = 100_000  # bytes of a read; not whole pages


@pytest.mark.skipif(sys.platform != "linux", reason="RSS of a file mapping is Linux's to count")
def test_scattered_reads_leave_nothing_mapped(tmp_path: Path) -> None:
    file = tmp_path / "data"
    data = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    file.write_bytes(data.tobytes())
    drop_page_cache(file)
    file.read_bytes()
    offsets = range(1000, SIZE - EACH, 700_000)
    out = np.zeros((len(offsets), EACH), np.uint8)
    out[:] = 1  # touched, so that it counts before the reads
    with Store([file], backend="mmap") as store:
        pieces = [Piece(0, at, memoryview(part)) for at, part in zip(offsets, out, strict=True)]
        store.read(pieces).wait()
        mapped = sum(m.rss for m in psutil.Process().memory_maps() if m.path == str(file))
    for at, part in zip(offsets, out, strict=True):
        assert np.array_equal(part, data[at : at + EACH])
    assert mapped == 0, f"{mapped / 1e6:.1f} MB stayed mapped"
