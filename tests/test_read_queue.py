"""Which read goes first: the queue alone, and a store on a slow disk under wrong guesses."""

from __future__ import annotations

import random
import statistics
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.disk import Disk
from streamer.errors import StreamerError
from streamer.read_queue import Guess, ReadQueue
from streamer.store import CHUNK_MIN, Piece, Store

pytestmark = pytest.mark.timed

SIZE = 8 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "experts.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


def piece(offset: int, nbytes: int) -> Piece:
    return Piece(0, offset, memoryview(bytearray(nbytes)))


def take(queue: ReadQueue[int]) -> int | None:
    """What one thread would do next."""
    got = queue.get()
    if isinstance(got, Guess):
        queue.finished(got)
        return got.job
    return got


@pytest.mark.smoke
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from("npc"))))
def test_order_against_a_sorted_list(reads: list[tuple[bool, int, str]]) -> None:
    """n: left alone, p: promoted, c: taken back; only guesses can be."""
    queue: ReadQueue[int] = ReadQueue(guess_bytes=1)
    expected: list[tuple[bool, int, int, int]] = []
    for i, (guessed, deadline, action) in enumerate(reads):
        if not guessed:
            queue.demand([i])
            expected.append((False, 0, i, i))
            continue
        guess = Guess(i, 100, deadline)
        queue.guess([guess])
        if action == "p":
            queue.promote([guess])
            expected.append((False, 0, i, i))
        elif action == "c":
            assert queue.cancel([guess]) == [guess] and not queue.cancel([guess])
        else:
            expected.append((True, deadline, i, i))
    got = [take(queue) for _ in expected]
    assert got == [i for *_, i in sorted(expected)]
    assert queue.stop(1) == [] and take(queue) is None


@pytest.mark.smoke
def test_guesses_under_way_are_bounded_and_demands_are_not() -> None:
    queue: ReadQueue[int] = ReadQueue(guess_bytes=250)
    queue.guess([Guess(i, 100, 0) for i in range(4)])
    first, second = queue.get(), queue.get()
    assert isinstance(first, Guess) and isinstance(second, Guess)
    late: list[int | None] = []
    other = threading.Thread(target=lambda: late.extend(take(queue) for _ in "12"), daemon=True)
    other.start()
    queue.demand([9])
    time.sleep(0.05)
    assert late == [9]  # 300 bytes of guesses would be under way
    queue.finished(first)
    other.join(5)
    assert late == [9, 2]


@pytest.mark.smoke
def test_no_guess_starts_when_they_are_off() -> None:
    queue: ReadQueue[int] = ReadQueue(guess_bytes=0)
    queue.guess([Guess(1, 1, 0)])
    queue.demand([2])
    assert take(queue) == 2
    assert queue.stop(1) == [1]
    assert take(queue) is None


def test_a_guess_that_is_asked_for_overtakes_the_others(file: Path) -> None:
    with Store([file], threads=1, disk=Disk(20e6)) as store:
        guesses = [store.read([piece(i << 18, CHUNK_MIN)], guess=i) for i in range(8)]
        guesses[7].promote()
        guesses[7].wait()
        assert sum(g.done for g in guesses) <= 3


def test_guesses_taken_back_are_not_read(file: Path) -> None:
    with Store([file], threads=1, disk=Disk(20e6)) as store:
        guesses = [store.read([piece(i << 19, 1 << 19)], guess=0) for i in range(8)]
        for guess in guesses:
            guess.cancel()
        for guess in guesses[1:]:
            with pytest.raises(StreamerError, match="taken back"):
                guess.wait()
        assert store.counters.bytes_read <= 2 * CHUNK_MIN
        demand = store.read([piece(0, 1000)])
        demand.cancel()
        demand.wait()  # somebody waits for it: it is read


def test_wrong_guesses_cost_a_demand_what_was_under_way(file: Path) -> None:
    """A disk of 50 MB/s; demands of 256 KiB take 5 ms alone, and behind all guesses 84."""
    rate = 50e6

    times: dict[bool, list[float]] = {True: [], False: []}
    with Store([file], disk=Disk(rate)) as store:
        store.guess_bytes = 64 << 10
        for i in range(24):  # in turns: whatever slows the machine slows both
            guessing = bool(i % 2)
            tickets = []
            if guessing:
                tickets = [store.read([piece(j << 16, 64 << 10)], guess=0) for j in range(64)]
            time.sleep(0.005)
            began = time.perf_counter()
            store.read([piece(i // 2 << 18, 256 << 10)]).wait()
            times[guessing].append(time.perf_counter() - began)
            for ticket in tickets:
                ticket.cancel()
    without, behind = statistics.median(times[False]), statistics.median(times[True])
    assert behind < without + 2 * (64 << 10) / rate + 0.01
