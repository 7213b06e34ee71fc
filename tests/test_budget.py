"""The division of a budget, and that the process stays within it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import make_tiny

from streamer import plan
from streamer.budget import divide
from streamer.errors import BudgetError
from streamer.experts import held_bytes
from streamer.opened import open_model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two expert formats: the first layer at 8 bits."""
    layers = {"model.layers.0.*_proj": {"bits": 8, "group_size": 32}}
    quantization = {"bits": 4, "group_size": 32, "layers": layers}
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("mixed"), quantization=quantization)


@pytest.mark.smoke
def test_the_parts_stay_within_the_limit(mixed: Path) -> None:
    opened = open_model(mixed)
    smallest = divide(opened, "min", 256).smallest
    for extra in (0, 10_000, 50_000, 200_000, 1 << 20, 1 << 28):
        budget = divide(opened, smallest + extra + (2 << 20), 256)
        assert budget.total <= budget.limit
        for (fmt, layers), slots in zip(opened.groups.items(), budget.slots, strict=True):
            assert opened.top_k <= slots <= sum(layer.count for layer in layers)
            assert held_bytes(fmt) > 0
    assert budget.resident


@pytest.mark.smoke
def test_shares(mixed: Path) -> None:
    opened = open_model(mixed)
    for percent in (25, 50, 100):
        budget = divide(opened, f"{percent}%", 256)
        share = sum(budget.slots) / opened.experts
        assert abs(share - percent / 100) < 0.1
        assert budget.total <= budget.limit


@pytest.mark.smoke
def test_too_small_names_the_smallest_that_works(mixed: Path) -> None:
    opened = open_model(mixed)
    with pytest.raises(BudgetError, match="smallest budget that works"):
        divide(opened, 10 << 20, 256)
    divide(opened, "min", 256)


def test_longer_contexts_cost_more(mixed: Path) -> None:
    opened = open_model(mixed)
    assert opened.kv_bytes(256) < opened.kv_bytes(257) == opened.kv_bytes(512)


def test_the_plan_is_what_is_loaded(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(mixed), "--memory", "50%", "--context", "64"]
    assert plan.main([*argv, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert plan.main(argv) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert planned["budget"]["slots"] == list(divide(open_model(mixed), "50%", 64).slots)
    low, high = planned["tokens_per_second"]
    assert 0 < low <= high


@pytest.mark.parametrize("memory", ["min", "40%", "130MB"])
def test_the_process_stays_within_its_budget(tmp_path: Path, memory: str) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path / "m", changes={"num_experts": 64})
    stats, prompt = tmp_path / "stats.json", "some words to read first, " * 40
    command = [sys.executable, "-m", "streamer.run", "--model", str(path), "--memory", memory]
    command += ["--raw", "--prompt", prompt, "--max-tokens", "40", "--stats", str(stats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(stats.read_text())
    assert got["peak_bytes"] <= got["budget_bytes"]
    assert got["experts"]["slots"] < got["experts"]["total"] or memory == "130MB"
