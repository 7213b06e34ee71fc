"""Large arrays on huge pages: the same bytes wherever they lie."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kernels import backend, pages

LARGE = 5 << 20  # two whole pages of 2 MB at least


def huge() -> int:
    """kB of this process on huge pages."""
    return int(re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[0])


@pytest.fixture
def transparent() -> None:
    """Skips where the system gives no huge pages."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not backend.available() or not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("no huge pages here")


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (5, 1), (3, LARGE)])
def test_zeros(shape: tuple[int, int]) -> None:
    mx.eval(mx.full((3 * LARGE,), 7, dtype=mx.uint8))  # freed, for zeros to be made in
    array = pages.zeros(*shape)
    assert array.shape == shape and array.dtype == mx.uint8 and not mx.any(array)


def test_zeros_are_written_where_they_lie() -> None:
    array = pages.zeros(4, LARGE)
    np.array(array, copy=False)[2] = 9
    assert mx.array_equal(mx.any(array == 9, axis=1), mx.array([False, False, True, False]))


def test_zeros_lie_on_huge_pages(transparent: None) -> None:
    before = huge()
    array = pages.zeros(16, LARGE)
    # memory in pieces may have fewer of them
    assert huge() - before > array.nbytes >> 12


def test_what_is_moved_stays_the_same(transparent: None) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 32, 4 * LARGE, dtype=np.uint32)
    array = mx.array(values)
    mx.eval(array)
    before = huge()
    if pages.move(array):  # needs Linux 6.1
        assert huge() - before > array.nbytes >> 12
    assert np.array_equal(np.array(array), values)


def test_small_arrays_are_left_alone() -> None:
    array = mx.arange(100)
    mx.eval(array)
    assert not pages.move(array)
