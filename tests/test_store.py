"""The expert store: every back end returns the files' bytes, or a sentence saying why not."""

import ctypes
import errno
import gc
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer import ranges
from streamer.errors import StreamerError, UsageError
from streamer.ranges import BLOCK, GAP, IOV_MAX, Run, cut, merge
from streamer.store import BACKENDS, Piece, Store

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc or Linux's page cache")
SIZES = (1_500_001, 300_000)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for i, size in enumerate(SIZES):
        paths.append(tmp_path / f"shard-{i}.safetensors")
        paths[-1].write_bytes(random.Random(i).randbytes(size))
    return paths


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


# Reading


@pytest.mark.parametrize("drop_behind", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes(files, backend, drop_behind):
    rng = random.Random(backend)
    with open_store(files, backend, drop_behind=drop_behind) as reads:
        for count in (1, 3, 40, 200):
            pieces = some_pieces(rng, count)
            reads.read(pieces).wait()
            check(pieces, files)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_file_in_one_piece(files, backend):
    with open_store(files, backend, threads=3) as reads:
        whole = [piece(0, 0, SIZES[0])]
        reads.read(whole).wait()
        assert reads.counters.reads == 3  # shared by the threads
        check(whole, files)


@pytest.mark.parametrize("backend", ["pread", "direct"])
@pytest.mark.parametrize("limit", [1000, 4096, 5000, 40_000])
def test_short_reads_and_interruptions(files, backend, limit, monkeypatch):
    with open_store(files, backend) as reads:
        # A direct read that made no whole block of progress is made again.
        sizes = random.Random(limit)
        monkeypatch.setattr(os, "preadv", trickle(lambda: sizes.choice([limit, 9000])))
        pieces = [piece(0, 4000 + 1500 * i, 1500) for i in range(14)]
        pieces += [piece(0, 25_000, 3), piece(1, SIZES[1] - 7000, 7000)]
        reads.read(pieces).wait()
        check(pieces, files)


def test_many_callers(files):
    tickets, pieces = [], []
    with Store(files, threads=8) as reads:

        def call(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(20):
                mine = some_pieces(rng, 5)
                tickets.append(reads.read(mine))
                pieces.extend(mine)
                tickets[-1].wait()

        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(tickets) == 160
        assert all(t.done for t in tickets)
        check(pieces, files)


def test_nothing_to_read(files):
    with Store(files) as reads:
        for pieces in ([], [piece(0, 5, 0)]):
            ticket = reads.read(pieces)
            assert ticket.done
            ticket.wait()
        assert reads.counters.reads == 0


def test_counters(files):
    with Store(files, throttle=1e6) as reads:
        ticket = reads.read([piece(0, 10, 100_000)])
        assert not ticket.done
        ticket.wait()
        assert ticket.done
        assert (reads.counters.bytes_read, reads.counters.reads) == (100_000, 1)
        assert 0.05 < reads.counters.wait_seconds < 0.5
    with open_store(files, "direct") as reads:
        reads.read([piece(0, BLOCK - 1, 2)]).wait()
        assert reads.counters.bytes_read == 2 * BLOCK  # as the kernel was asked


@pytest.mark.parametrize("threads", [1, 4])
def test_throttle(files, threads):
    with Store(files, threads=threads, throttle=3e6) as reads:
        began = time.perf_counter()
        tickets = [reads.read([piece(0, i * 100_000, 100_000)]) for i in range(15)]
        for ticket in tickets:
            ticket.wait()
        assert 0.5 * 0.99 <= time.perf_counter() - began <= 0.5 * 1.2


# Ranges


def test_neighbours_become_one_read(files):
    pieces = [piece(0, 1000 + 50 * i, 50) for i in range(9)]
    random.Random(0).shuffle(pieces)
    with Store(files) as reads:
        reads.read(pieces).wait()
        assert (reads.counters.reads, reads.counters.bytes_read) == (1, 450)
        check(pieces, files)


def test_small_gaps_are_read_over(files):
    near = [piece(0, 0, 100), piece(0, 100 + GAP, 100)]
    far = [piece(1, 0, 100), piece(1, 101 + GAP, 100)]
    with Store(files) as reads:
        reads.read(near + far).wait()
        assert (reads.counters.reads, reads.counters.bytes_read) == (3, GAP + 400)
        check(near + far, files)


@pytest.mark.parametrize("step", [3, 5])
def test_more_neighbours_than_one_call_takes(files, step):
    pieces = [piece(0, step * i, 3) for i in range(2 * IOV_MAX + 10)]
    with Store(files) as reads:
        reads.read(pieces).wait()
        assert 3 <= reads.counters.reads <= 5
        check(pieces, files)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(0, 40))))
def test_merge_keeps_every_byte_once(numbers):
    pieces = [Piece(f, o * 1000, memoryview(bytearray(n * 100))) for f, o, n in numbers]
    runs = merge(pieces)
    placed = []
    for run in runs:
        at = run.offset
        for part in run.parts:
            if part.obj is not ranges._DISCARD.obj:
                placed.append((run.file, at, part.nbytes, id(part.obj)))
            at += part.nbytes
        assert at == run.offset + run.nbytes
    kept = [(p.file, p.offset, p.dest.nbytes, id(p.dest.obj)) for p in pieces if p.dest.nbytes]
    assert sorted(placed) == sorted(kept)


@settings(deadline=None)
@given(
    st.integers(0, 20_000),
    st.lists(st.integers(1, 30_000), min_size=1, max_size=8),
    st.integers(1, 20_000),
)
def test_cut_shares_a_run_evenly(offset, lengths, size):
    parts = [memoryview(bytearray(n)) for n in lengths]
    run = Run(1, offset, list(parts), sum(lengths))
    cuts = cut(run, size)
    assert run.parts == parts
    at = offset
    for c in cuts:
        assert (c.file, c.offset) == (1, at)
        assert c.nbytes == sum(p.nbytes for p in c.parts) <= size + BLOCK
        at += c.nbytes
    assert at == offset + run.nbytes
    assert all(c.offset % BLOCK == 0 for c in cuts[1:])  # no block is read twice
    for i, part in enumerate(p for c in cuts for p in c.parts):
        part[:] = bytes([i % 251 + 1]) * part.nbytes
    assert all(0 not in bytes(p) for p in parts)  # every byte has its place


# Errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [0, 100_000, 100_352, 102_400])
def test_truncated_while_running(files, backend, left):
    with open_store(files, backend) as reads:
        os.truncate(files[0], left)
        good = piece(1, 0, 9000)
        ticket = reads.read([piece(0, 90_000, 14_000), good])
        for _ in range(2):
            with pytest.raises(StreamerError, match=r"offset 90000 of .*shard-0.* truncated"):
                ticket.wait()
        reads.read([good]).wait()  # the store goes on
        check([good], files)


@pytest.mark.parametrize("backend", BACKENDS)
def test_range_past_the_end(files, backend):
    with open_store(files, backend) as reads:
        with pytest.raises(StreamerError, match="too short"):
            reads.read([piece(1, SIZES[1] - 10, 11)]).wait()
        with pytest.raises(StreamerError, match="too short"):
            reads.read([piece(1, SIZES[1] + 10**6, 11)]).wait()


def test_errors_of_the_disk(files, monkeypatch):
    with Store(files) as reads:

        def broken(fd, buffers, offset):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(StreamerError, match=r"10 bytes at offset 7 of .*shard-1.*output error"):
            reads.read([piece(1, 7, 10)]).wait()


def test_a_destination_that_cannot_be_written_hangs_nothing(files):
    with Store(files, threads=1) as reads:
        for _ in range(3):
            with pytest.raises(StreamerError, match="offset 0 of"):
                reads.read([Piece(0, 0, memoryview(b"constant"))]).wait()


def test_wait_returns_after_the_last_read(files, monkeypatch):
    """An error is not told while other reads still write to their destinations."""
    real = os.preadv

    def preadv(fd, buffers, offset):
        if offset == 0:
            raise OSError(errno.EIO, "broken")
        time.sleep(0.2)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with Store(files, threads=2) as reads:
        pieces = [piece(0, 500_000, 9000), piece(1, 0, 9000)]
        with pytest.raises(StreamerError, match="broken"):
            reads.read(pieces).wait()
        check(pieces[:1], files)


def test_files_that_cannot_be_opened(files, tmp_path):
    before = open_descriptors()
    for backend in BACKENDS:
        with pytest.raises(StreamerError, match=r"cannot open .*absent.*No such file"):
            Store([*files, tmp_path / "absent"], backend=backend)
    gc.collect()
    assert open_descriptors() == before


def test_senseless_options(files):
    for options in ({"threads": 0}, {"throttle": 0}, {"throttle": float("nan")}, {"backend": "x"}):
        with pytest.raises(UsageError):
            Store(files, **options)
    with Store(files) as reads:
        for file in (-1, 2):
            with pytest.raises(IndexError):
                reads.read([piece(file, 0, 1)])


def test_empty_files(tmp_path):
    (tmp_path / "empty").touch()
    for backend in BACKENDS:
        reads = open_store([tmp_path / "empty"], backend)
        with reads, pytest.raises(StreamerError, match="too short"):
            reads.read([piece(0, 0, 1)]).wait()


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
    assert open_descriptors() == before


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


# Life and death


def open_descriptors() -> int:
    gc.collect()  # what other tests left behind
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_while_reading(files, backend):
    before = open_descriptors()
    reads = open_store(files, backend, threads=2, throttle=1e6)
    tickets = [reads.read([piece(0, i * 1000, 50_000)]) for i in range(30)]
    began = time.perf_counter()
    reads.close()
    assert time.perf_counter() - began < 1  # not the 1.5 s that all would take
    failed = 0
    for ticket in tickets:
        assert ticket.done
        try:
            ticket.wait()
        except StreamerError as error:
            assert "closed" in str(error)
            failed += 1
    assert 25 <= failed <= 30
    reads.close()
    with pytest.raises(StreamerError, match="closed"):
        reads.read([piece(0, 0, 1)])
    gc.collect()
    assert open_descriptors() == before


def test_close_waits_for_the_read_under_way(files, monkeypatch):
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
    reads = Store(files, threads=1, throttle=1e5)
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
    before, threads = open_descriptors(), threading.active_count()
    for _ in range(3):
        got = piece(0, 0, 1000)
        Store(files).read([got]).wait()
        check([got], files)
    until = time.monotonic() + 5
    while (open_descriptors(), threading.active_count()) != (before, threads):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_no_threads_before_the_first_read(files):
    before = threading.active_count()
    with Store(files, threads=3) as reads:
        assert threading.active_count() == before
        reads.read([piece(0, 0, 1)]).wait()
        assert threading.active_count() == before + 3
    assert threading.active_count() == before


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpreter_exit_with_reads_under_way(files, backend):
    open_store(files, backend).close()
    code = """if 1:
        import sys
        from streamer.store import Piece, Store
        store = Store([sys.argv[1]], backend=sys.argv[2], throttle=2e5)
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
