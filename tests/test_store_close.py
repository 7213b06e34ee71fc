"""A store that is closed, forgotten or cut off leaves no thread and no descriptor behind."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import stores
from stores import check, open_descriptors, open_store, piece

from streamer.disk import Disk
from streamer.errors import StreamerError
from streamer.store import BACKENDS, Store

pytestmark = pytest.mark.timed

files = stores.files
python_reads = stores.python_reads


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_while_reading(files, backend):
    before = open_descriptors()
    reads = open_store(files, backend, threads=2, disk=Disk(2e5))
    tickets = [reads.read([piece(0, i * 1000, 50_000)]) for i in range(60)]
    began = time.perf_counter()
    reads.close()
    assert time.perf_counter() - began < 7  # not the 15 s that all would take
    failed = 0
    for ticket in tickets:
        assert ticket.done
        try:
            ticket.wait()
        except StreamerError as error:
            assert "closed" in str(error)
            failed += 1
    assert 45 <= failed <= 60
    reads.close()
    with pytest.raises(StreamerError, match="closed"):
        reads.read([piece(0, 0, 1)])
    gc.collect()
    assert open_descriptors() <= before


def test_close_waits_for_the_read_under_way(files, python_reads, monkeypatch):
    real, begun = os.preadv, threading.Event()

    def preadv(fd, buffers, offset):
        begun.set()
        time.sleep(0.2)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reads = Store(files)
    pieces = [piece(0, 5, 5000)]
    ticket = reads.read(pieces)
    begun.wait()
    reads.close()
    assert ticket.done
    ticket.wait()
    check(pieces, files)


def test_waiter_is_released_by_close(files):
    reads = Store(files, threads=1, disk=Disk(1e5))
    tickets = [reads.read([piece(0, i, 20_000)]) for i in range(9)]
    errors = []

    def wait() -> None:
        try:
            tickets[-1].wait()
        except StreamerError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    reads.close()
    waiter.join(5)
    assert len(errors) == 1


def test_a_forgotten_store_closes_itself(files):
    before, threads = open_descriptors(), set(threading.enumerate())
    for _ in range(3):
        got = piece(0, 0, 1000)
        Store(files).read([got]).wait()
        check([got], files)
    until = time.monotonic() + 5
    while not (open_descriptors() <= before and set(threading.enumerate()) <= threads):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_no_threads_before_the_first_read(files, python_reads):
    before = set(threading.enumerate())
    with Store(files, threads=3) as reads:
        assert set(threading.enumerate()) <= before
        reads.read([piece(0, 0, 1)]).wait()
        assert len(set(threading.enumerate()) - before) == 3
    assert set(threading.enumerate()) <= before


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpreter_exit_with_reads_under_way(files, backend):
    open_store(files, backend).close()
    code = """if 1:
        import sys
        from streamer.disk import Disk
        from streamer.store import Piece, Store
        store = Store([sys.argv[1]], backend=sys.argv[2], disk=Disk(2e5))
        tickets = [store.read([Piece(0, i, memoryview(bytearray(50_000)))]) for i in range(99)]
        print("bye")
    """
    began = time.perf_counter()
    done = run_python(code, files[0], backend)
    assert (done.returncode, done.stdout, done.stderr) == (0, "bye\n", "")
    assert time.perf_counter() - began < 10  # not the 25 s that all reads would take


def test_more_files_than_the_soft_limit(files):
    code = """if 1:
        import resource, sys
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        from streamer.store import Store
        Store([sys.argv[1]] * 150, backend="mmap").close()
    """
    done = run_python(code, files[0])
    assert (done.returncode, done.stderr) == (0, "")
