"""The extension's threads: where a process may not have as many as are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import backend

pytestmark = [
    pytest.mark.skipif(not backend.available(), reason="the extension does not run here"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space"),
]

FEW = """if 1:
    import resource, sys
    from pathlib import Path
    import mlx.core as mx
    from kernels import backend
    from streamer.store import Piece, Store
    native = backend.native()
    x, w = mx.ones((1, 256)), mx.ones((8192, 256))
    mx.eval(x, w, native.linear(x[:, :1], w[:1, :1]))
    native.set_threads(1)
    buffer, file = bytearray(Path(sys.argv[1]).stat().st_size), Path(sys.argv[1])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + (100 << 20)  # a thread's stack is 8 MB
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
"""


def few(code: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FEW + code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_loop_is_shared_by_the_threads_that_there_are() -> None:
    code = """
    native.set_threads(200)
    for _ in range(20):
        y = native.linear(x, w)
        assert mx.all(y == 256).item()
    print("right")
    """
    assert few(code, __file__) == "right\n"


def test_reads_are_made_by_the_threads_that_there_are() -> None:
    code = """
    store = Store([file], threads=200)
    for _ in range(20):
        buffer[:] = bytes(len(buffer))
        store.read([Piece(0, 0, memoryview(buffer))]).wait()
        assert buffer == file.read_bytes()
    store.close()
    print("right")
    """
    assert few(code, Path(__file__)) == "right\n"
