"""python -m kernels.bench: a table, one JSON line, and floors that are measured."""

from __future__ import annotations

import json
import os
from itertools import cycle
from typing import Any

import mlx.core as mx
import pytest

from kernels import backend, bench

pytestmark = [
    pytest.mark.skipif(not backend.available(), reason="the extension does not run here"),
    pytest.mark.timed,
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", (("up", 96, 128), ("head", 70_000, 64)))
    monkeypatch.setattr(bench, "EXPERTS", (8, 3, 64, 128))
    monkeypatch.setattr(bench, "COLD", 1 << 12)
    monkeypatch.setattr(bench, "GRAPH", 1 << 13)
    monkeypatch.setattr(bench, "READ", 1 << 16)
    monkeypatch.setattr(bench, "ROUNDS", 1000)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_and_one_json_line(small: None, capsys: Any, bits: int) -> None:
    assert bench.main(["--quick", "--bits", str(bits)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["memory_gb_per_second"] > 0 and report["multiply_adds_per_second"] > 0
    results = report["results"]
    assert len(results) == 3 * len(bench.ROWS) == len(table) - 3
    for r in results:
        assert r["ms"] > 0 and r["share"] > 0 and (r["stock_ms"] is not None) == (r["rows"] == 1)
        assert r["to_one_row"] == 1 or r["rows"] > 1


def measured(multiplies: float, products: float) -> bench.Measured:
    rounds = [bench.Floors(9e9, 1.0, 1.0), *2 * [bench.Floors(1000.0, multiplies, products)]]
    return bench.Measured("x", 2, 1000, rounds, bytes=[50, 100, 100], seconds=[9.0, 0.5, 0.5])


def test_the_floor_is_the_larger_of_two() -> None:
    alone = bench.Measured("x", 1, 500, seconds=[1.0, 0.25, 0.4])
    few = measured(1e6, 1e6).result(alone)
    assert (few["floor"], few["share"], few["stock_ms"]) == ("memory", 0.2, None)
    assert few["to_one_row"] == pytest.approx((2 + 1.25) / 2)
    many = measured(4000.0, 8000.0).result(alone)
    assert (many["floor"], many["share"], many["own_share"]) == ("multiply-adds", 0.5, 0.25)


def test_the_spread_leaves_the_first_round_out() -> None:
    assert bench.spread([9e9, 1e9, 2e9, 3e9]) == "2.0 (1.0-3.0)"
    assert bench.spread([2e9]) == "2.0 (2.0-2.0)"


def test_experts_are_read_once_for_all_rows() -> None:
    product = bench.Routed("experts", 4, 4, 64, 128, 4)
    calls, nbytes = product.prepare(8, stock=False)
    stock, same = product.prepare(8, stock=True)
    assert nbytes == same == 3 * 4 * 64 * 128 * 5 // 8
    assert calls[0]().shape == (8, 4, 128) and stock[0]().shape == (8, 4, 1, 128)


def test_stock_and_ours_are_the_same_product() -> None:
    product = bench.Linear("up", 96, 128, 4)
    product._turns = cycle(product._weights[:1])
    x = mx.ones((2, 128))
    calls = [product.prepare(2, stock=stock)[0][0] for stock in (True, False)]
    got, want = (call.func(x, *call.args[1:], **call.keywords) for call in calls)  # type: ignore[attr-defined]
    assert mx.allclose(got, want, rtol=1e-5, atol=1e-3)


def test_floors_want_an_evaluated_array() -> None:
    native = backend.native()
    assert native is not None
    assert native.read_seconds(mx.array([1.0])) >= 0
    with pytest.raises(ValueError, match="floors: "):
        native.read_seconds(mx.ones(4) + 1)


def test_rates_are_of_all_threads_at_once() -> None:
    native = backend.native()
    assert native is not None
    before = backend.threads()
    try:
        backend.set_threads(1)
        one = max(native.multiply_rate(200_000) for _ in range(5))
        backend.set_threads(4)  # at once, so more threads than cores cannot be faster than these
        four = native.multiply_rate(200_000)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
        assert 0 < four <= 1.5 * cores * one
    finally:
        backend.set_threads(before)
    assert native.product_rate(1000) > 0
