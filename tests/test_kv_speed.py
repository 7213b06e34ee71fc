"""tools.kv_speed: a table, one JSON line, floors that are measured where the kernels run."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest

from kernels import backend
from tools import kv_speed


def test_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(kv_speed, "ROUNDS", 1000)
    kv_speed.main(["--contexts", "300", "--bits", "3.5", "2", "--repeats", "2"])
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    runs = report["runs"]
    assert len(runs) == 2 * len(kv_speed.ROWS) == len(table) - 2
    for run in runs:
        assert run["codes_ms"] > 0 and run["mlx_ms"] > 0
        assert run["codes_to_one_row"] == 1 or run["rows"] > 1
        if backend.available():
            assert all(run[f"{name}_ms"] > 0 for name in ("full", "codes_floor", "full_floor"))


def test_a_floor_is_the_larger_of_two() -> None:
    floors = kv_speed.Floors(read=[9.0, 1e-3, 1e-3], multiply=[9.0, 1e-6, 1e-6])
    assert floors.ms(2, 100) == pytest.approx(2.0)
    assert floors.ms(2, 1e6) == pytest.approx(1000.0)
    assert kv_speed.Floors().ms(2, 100) is None


def test_a_pass_is_taken_back() -> None:
    cache = kv_speed.filled(kv_speed.CompressedKVCache(3, 3), 200, mx.float32)
    before = cache.offset
    assert kv_speed.step(cache, 4, mx.float32) > 0
    assert cache.offset == before
