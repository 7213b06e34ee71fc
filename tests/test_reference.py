"""The demo's weights, unquantized: transformers' greedy tokens, recorded and live, against ours."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from streamer.engine import generate
from streamer.loading import expert_count, load_streamed
from tools.dequantize import dequantize

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "streamer" / "demo"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "demo_greedy.json").read_text())
# looked up at import: a command under test may block torch later, to save its memory
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "dense"
    dequantize(DEMO, folder)
    return folder


def streamed_tokens(path: Path, slots: int) -> list[list[int]]:
    model = load_streamed(path, slots=slots, io="pread")
    found = []
    for run in GOLDEN["runs"]:
        cache = make_prompt_cache(model)
        steps = generate(model, run["ids"], cache, max_tokens=len(run["tokens"]))
        found.append([step.token for step in steps])
    model.streamer.close()
    return found


def test_the_recorded_tokens_belong_to_the_package() -> None:
    weights = (DEMO / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == GOLDEN["weights_sha256"], (
        "run python -m tools.golden"
    )
    assert [len(run["tokens"]) for run in GOLDEN["runs"]] == [64, 64, 64]


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "smallest"])
@pytest.mark.parametrize("form", ["dense", "package"])
def test_streamed_tokens_are_those_of_transformers(dense: Path, form: str, share: float) -> None:
    path = dense if form == "dense" else DEMO
    slots = int(share * expert_count(path))
    assert streamed_tokens(path, slots) == [run["tokens"] for run in GOLDEN["runs"]]


def test_dequantizing_undoes_norms_layouts_and_names(dense: Path) -> None:
    package = mx.load(str(DEMO / "model.safetensors"))
    found = mx.load(str(dense / "model-00001-of-00001.safetensors"))
    assert {tensor.dtype for tensor in found.values()} == {mx.float32}
    for name, stored in {
        "mtp.norm.weight": "mtp.norm.weight",
        "model.norm.weight": "language_model.model.norm.weight",
        "model.layers.3.self_attn.q_norm.weight": (
            "language_model.model.layers.3.self_attn.q_norm.weight"
        ),
    }.items():
        assert mx.array_equal(found[name] + 1.0, package[stored])
    gated = "model.layers.0.linear_attn.norm.weight"
    assert mx.array_equal(found[gated], package[f"language_model.{gated}"])
    conv = "model.layers.0.linear_attn.conv1d.weight"
    assert found[conv].shape[1:] == (1, 4)
    assert mx.array_equal(found[conv].moveaxis(2, 1), package[f"language_model.{conv}"])
    stack = "mtp.layers.0.mlp.switch_mlp.up_proj"
    up = mx.dequantize(
        *(package[f"{stack}.{part}"] for part in ("weight", "scales", "biases")),
        group_size=64,
        bits=8,
    )
    fused = found["mtp.layers.0.mlp.experts.gate_up_proj"]
    assert mx.array_equal(fused[:, fused.shape[1] // 2 :], up)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="the live reference needs torch (extra: train)")
def test_transformers_gives_the_recorded_tokens() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "tools.golden", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
