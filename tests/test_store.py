"""The expert store: every back end returns the files' bytes, or a sentence saying why not."""

import errno
import gc
import os
import random
import threading
import time

import pytest
import stores
from stores import SIZES, check, open_descriptors, open_store, piece, some_pieces, trickle

from streamer.disk import Disk
from streamer.errors import StreamerError, UsageError
from streamer.ranges import BLOCK
from streamer.store import BACKENDS, Piece, Store

files = stores.files
python_reads = stores.python_reads


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
def test_short_reads_and_interruptions(files, python_reads, backend, limit, monkeypatch):
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
    with Store(files, disk=Disk(1e6)) as reads:
        ticket = reads.read([piece(0, 10, 100_000)])
        assert not ticket.done
        ticket.wait()
        assert ticket.done
        assert (reads.counters.bytes_read, reads.counters.reads) == (100_000, 1)
        assert 0.05 < reads.counters.wait_seconds < 0.5
    with open_store(files, "direct") as reads:
        reads.read([piece(0, BLOCK - 1, 2)]).wait()
        assert reads.counters.bytes_read == 2 * BLOCK  # as the kernel was asked


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


def test_errors_of_the_disk(files, python_reads, monkeypatch):
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


def test_wait_returns_after_the_last_read(files, python_reads, monkeypatch):
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
    assert open_descriptors() <= before


def test_senseless_options(files):
    for options in ({"threads": 0}, {"backend": "x"}):
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
