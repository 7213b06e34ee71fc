"""The whole runtime where MLX has a GPU: paged experts, drafts, compressed caches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from streamer.loading import load_streamed
from streamer.run import DEMO

GPU = mx.default_device() == mx.Device(mx.gpu)
pytestmark = pytest.mark.skipif(not GPU, reason="MLX has no GPU here")
PROMPT = "def area(width, height):\n    "


def tokens(model: Any, tokenizer: Any, count: int = 24) -> list[int]:
    replies = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=count)
    return [reply.token for reply in replies]


@pytest.mark.parametrize("slots", [0, 160])
def test_paged_tokens_are_those_of_mlx_lm(slots: int) -> None:
    plain, tokenizer = mlx_lm.load(str(DEMO))
    streamed = load_streamed(DEMO, slots=slots)
    assert tokens(streamed, tokenizer) == tokens(plain, tokenizer)
    assert streamed.streamer.counters.misses > 0


@pytest.mark.parametrize("options", [[], ["--mtp", "2"], ["--kv-bits", "4"]], ids=str)
def test_run(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamer.run", "--memory", "50%", "--prompt", PROMPT]
    stats = tmp_path / "stats.json"
    command += ["--max-tokens", "24", "--stats", str(stats), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(stats.read_text())
    assert told["backend"] == "gpu" and told["generated_tokens"] == 24
    assert told["peak_bytes"] <= told["budget_bytes"]
