"""Checkpoints of true shapes, made without computing a parameter."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from streamer.checkpoint import Checkpoint
from streamer.opened import open_model
from streamer.shards import Spec
from tools import make_checkpoint
from tools.shapes import SHAPES

# totals of 4-bit conversions, GB, at 4.5 bits a weight and some parts at 8
PUBLISHED = {
    "qwen3.5-35b-a3b": 19.5,
    "qwen3.5-122b-a10b": 68.7,
    "qwen3-next-80b-a3b": 44.8,
    "qwen3-30b-a3b": 17.2,
    "glm-4.5-air": 60.1,
    "glm-4.7-flash": 16.9,
    "deepseek-v3": 378.0,
    "gpt-oss-120b": 65.7,
    "gpt-oss-20b": 11.8,
    "mixtral-8x7b": 26.3,
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_true_sizes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_checkpoint.main(["--like", name, "--out", "unused", "--dry-run"]) == 0
    text = capsys.readouterr().err.splitlines()[-1].split(": ")[1]
    gb = float(text.split()[0]) * (1 << 30) / 1e9
    assert abs(gb / PUBLISHED[name] - 1) < 0.03, gb


def test_it_loads_and_streams_within_bounded_memory(tmp_path: Path) -> None:
    out = tmp_path / "m"
    command = [sys.executable, "-c", "import sys; from tools.make_checkpoint import main\n"]
    command[2] += (
        f"assert main(['--like', 'qwen3-30b-a3b', '--layers', '1', '--out', {str(out)!r}]) == 0\n"
        "from streamer.footprint import peak_footprint; print(peak_footprint())"
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 400 << 20
    assert Checkpoint.open(out).nbytes > 650e6
    load_model(out, lazy=True)
    assert open_model(out).experts == 128
    stats = tmp_path / "s.json"
    command = [sys.executable, "-m", "streamer.run", "--model", str(out), "--memory", "25%"]
    command += ["--prompt", "hello", "--max-tokens", "2", "--stats", str(stats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(stats.read_text())
    assert got["peak_bytes"] <= got["budget_bytes"]
    for file in out.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("mode", sorted(make_checkpoint.MODES))
def test_weights_of_other_modes_keep_a_layers_size(mode: str) -> None:
    bits, group = make_checkpoint.MODES[mode]
    rng = np.random.default_rng(0)

    def made(name: str, rows: int, columns: int, dtype: mx.Dtype) -> mx.array:
        spec = Spec(name, "U8", (rows, columns * dtype.size))
        data = np.concatenate(list(make_checkpoint.noise(spec, rng, mode)))
        return mx.array(data.reshape(rows, -1)).view(dtype)

    w = made("a.weight", 64, 2048 * bits // 32, mx.uint32)
    scales = made("a.scales", 64, 2048 // group, mx.uint8)
    dense = mx.dequantize(w, scales, mode=mode, dtype=mx.float32)
    assert 0.4 < mx.std(dense).item() * 2048**0.5 < 2


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, what in (
        (["--like", "qwen3.5-35b-a3b", "--layers", "2", "--out", "x"], "--layers"),
        (["--like", "gpt-5", "--out", "x"], "--like"),
        (["--like", "gpt-oss-20b", "--layers", "2", "--out", str(tmp_path)], "exists"),
    ):
        assert make_checkpoint.main(argv) == 2
        assert what in capsys.readouterr().err
