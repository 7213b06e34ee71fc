"""Byte ranges to read: neighbours merged into one read, large ones cut for several threads.

Plain data and two functions; `streamer.store` does the reading.

    merge([Piece(0, 0, a), Piece(0, a.nbytes, b)])  # one run with two destinations
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from .backends import BLOCK

IOV_MAX = os.sysconf("SC_IOV_MAX")
# Reading up to this many bytes between two pieces takes less time than a second read:
# nine pieces of 16 KiB, 16 KiB apart, 0.55 ms for 0.67; of 64 KiB 1.0-1.45 for 1.2-1.5.
GAP = 16 << 10
_DISCARD = memoryview(bytearray(GAP))


class Piece(NamedTuple):
    """`dest.nbytes` bytes at `offset` of file number `file`.

    dest: writable, contiguous, of format "B".
    """

    file: int
    offset: int
    dest: memoryview


class Widening(NamedTuple):
    """16-bit floats in `stored` become float32 in `out`; brain: bfloat16 ones."""

    stored: memoryview
    out: memoryview
    brain: bool


def widened(one: Widening) -> None:
    """Do it, exactly."""
    out = np.frombuffer(one.out, np.float32)
    if one.brain:
        stored = np.frombuffer(one.stored, np.uint16)
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[:] = np.frombuffer(one.stored, np.float16)


class Run(NamedTuple):
    """One read: `nbytes` at `offset` into `parts`, one after the other."""

    file: int
    offset: int
    parts: list[memoryview]
    nbytes: int


def merge(pieces: Iterable[Piece]) -> list[Run]:
    """Runs by file and offset: pieces at most GAP apart become one; empty ones vanish.

    What lies between is read too, and thrown away. Overlapping pieces stay apart.
    A run has at most IOV_MAX parts.
    """
    runs: list[Run] = []
    parts: list[memoryview] = []
    in_file, start, end = -1, 0, 0
    for file, offset, dest in sorted(pieces, key=itemgetter(0, 1)):
        n = dest.nbytes
        if not n:
            continue
        gap = offset - end
        if 0 <= gap <= GAP and file == in_file and len(parts) < IOV_MAX - 1:
            if gap:
                parts.append(_DISCARD[:gap])
            parts.append(dest)
        else:
            if parts:
                runs.append(Run(in_file, start, parts, end - start))
            in_file, start, parts = file, offset, [dest]
        end = offset + n
    if parts:
        runs.append(Run(in_file, start, parts, end - start))
    return runs


def cut(run: Run, size: int) -> list[Run]:
    """Runs of equal lengths, about `size` bytes at most, cut between blocks of the file."""
    count = -(-run.nbytes // size)
    if count == 1:
        return [run]
    step = -(-run.nbytes // count)
    cuts = []
    start, end = run.offset, run.offset + run.nbytes
    at, parts = start, run.parts[::-1]
    while start < end:
        stop = min(end, (start + step + BLOCK - 1) & -BLOCK)
        taken = []
        while at < stop:
            part = parts.pop()
            if at + part.nbytes > stop:
                parts.append(part[stop - at :])
                part = part[: stop - at]
            taken.append(part)
            at += part.nbytes
        cuts.append(Run(run.file, start, taken, stop - start))
        start = stop
    return cuts
