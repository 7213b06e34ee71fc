"""The table of executors: what a cell says, and that a file is gone on with."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import rehearsal_table
from tools.rehearsal_table import main

pytestmark = pytest.mark.smoke


def cell(model: str, pool: int, disk: float) -> dict[str, Any]:
    rows = []
    for executor, seconds in (("layerwise", [0.02, 0.03, 0.02]), ("lookahead", [0.01, 0.01, 0.02])):
        counted = {"misses": 60, "bytes": 60_000_000, "syncs": 240, "prefetched": 20, "used": 15}
        made = {"executor": executor, "seconds": seconds, "tokens": 30, "passes": 30}
        rows.append(made | counted | {"rehearsed_misses": 60})
    key = {"model": model, "pool": pool, "disk": disk, "drafts": 0}
    return key | {"expert_bytes": 1_000_000, "resident_seconds": 0.008, "rows": rows}


def test_a_cell_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(cell("m", 50, 0.5)) + "\n")
    assert main(["show", str(path)]) == 0
    base, other = capsys.readouterr().out.splitlines()[-2:]
    # two misses a token: 4 ms at 0.5 GB/s, less than computing takes; 30 tokens in 0.7 s
    assert base.split(" | ")[4:] == (
        ["layerwise", "50.0", "1.00", "0.50", "8.0", "0.25", "0.75", "2.0", "17%", "40% |"]
    )
    assert other.split(" | ")[4:8] == ["lookahead", "100.0", "2.00", "1.00"]


def test_cells_that_are_there_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, measured = tmp_path / "cells.jsonl", []

    def measure(model: Path, pool: int, disk: float, names: list[str], args: Any) -> dict[str, Any]:
        measured.append((model.name, pool, disk))
        return cell(model.name, pool, disk)

    monkeypatch.setattr(rehearsal_table, "_cell", measure)
    monkeypatch.setattr(rehearsal_table, "_resident", lambda *_: 0.008)
    path.write_text(json.dumps(cell("m", 50, 0.5)) + "\n")
    options = ["--pools", "75,50", "--disks", "0.5,5", "--out", str(path)]
    for _ in range(2):
        assert main(["run", "m", *options]) == 0
    assert measured == [("m", 75, 0.5), ("m", 75, 5.0), ("m", 50, 5.0)]
