"""Neighbouring ranges become one read, and no byte is read twice."""

import random

import pytest
import stores
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import check, piece

from streamer import ranges
from streamer.ranges import BLOCK, GAP, IOV_MAX, Run, cut, merge
from streamer.store import Piece, Store

files = stores.files


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
