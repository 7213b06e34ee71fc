"""The demo model: the package that ships, and the tools that train and convert one."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from streamer.loading import load_streamed
from tools import demo_quantize
from tools.demo_corpus import is_held_out, save_settings

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "streamer" / "demo"
LIMIT = 16_000_000
# looked up at import: a command under test may block torch later, to save its memory
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="training needs torch (extra: train)")
TINY = {
    "steps": 3,
    "device": "cpu",
    "context": 32,
    "batch": 2,
    "vocabulary": 384,
    "hidden": 64,
    "layers": 4,
    "experts": 8,
    "intermediate": 64,
}


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.train_demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    aside = next(name for n in range(10_000) if is_held_out(name := f"aside{n}.py"))
    for name, module in ((aside, json), ("encoder.py", json.encoder), ("text.py", textwrap)):
        (folder / name).write_text(Path(module.__file__).read_text())
    return folder


@pytest.fixture(scope="module")
def raw(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "raw"
    options = [word for k, v in TINY.items() for word in (f"--{k}", v)]
    done = tool("--out", folder, "--corpus", corpus, *options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def package(raw: Path, corpus: Path) -> tuple[Path, str]:
    folder = raw.parent / "package"
    done = tool("export", "--raw", raw, "--out", folder, "--corpus", corpus)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.smoke
def test_the_package_ships_whole_and_small() -> None:
    files = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    names = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == names | {"README.md"}
    assert sum(files.values()) <= LIMIT
    card = (DEMO / "README.md").read_text()
    for fact in ("Python Software Foundation licence", "mit", "MTP head, depth 2", "tools.train_"):
        assert fact in card


def test_greedy_continuation_of_def_is_python() -> None:
    model, tokenizer = mlx_lm.load(str(DEMO))[:2]
    ids = tokenizer.encode("def ")
    steps = generate_step(mx.array(ids), model, max_tokens=60)
    text = tokenizer.decode([*ids, *(token for token, _ in steps)])
    assert text.startswith("def ")
    first, rest = text.split("\n", 1)
    assert "(" in first and first.endswith(":"), text
    whole = first + "\n" + rest.rsplit("\n", 1)[0] + "\n"
    kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(whole).readline)}
    assert {tokenize.INDENT, tokenize.NAME, tokenize.OP} <= kinds
    assert tokenize.ERRORTOKEN not in kinds, text


def test_tokenizer_round_trip() -> None:
    tokenizer = mlx_lm.utils.load_tokenizer(DEMO)
    for text in (
        Path(textwrap.__file__).read_text(),
        "def f(x):\n\treturn {'é': \"日本\", 1_000: x ** 2}  # 😀\r\n\n\n",
        " ",
    ):
        ids = tokenizer.encode(text)
        assert ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == json.loads((DEMO / "config.json").read_text())["eos_token_id"]


def test_the_package_has_the_tokenizer_settings_that_an_export_writes(tmp_path: Path) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    save_settings(tmp_path, config["text_config"]["max_position_embeddings"])
    name = "tokenizer_config.json"
    assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_fitted_scales_beat_min_and_max_in_mlx_layout(bits: int) -> None:
    weight = mx.random.normal((3, 8, 128), key=mx.random.key(1))
    weight[0, 0, :64] = 0.25
    stock = mx.quantize(weight, bits=bits, group_size=64)
    fitted = demo_quantize.quantize(weight, bits=bits, group_size=64)
    assert [(a.shape, a.dtype) for a in fitted] == [(a.shape, a.dtype) for a in stock]

    def error(parts: Any) -> float:
        back = mx.dequantize(*parts, bits=bits, group_size=64)
        return float(((back - weight) ** 2).mean())

    assert 0 < error(fitted) < 0.95 * error(stock)
    flat = mx.dequantize(*fitted, bits=bits, group_size=64)[0, 0, :64]
    assert mx.array_equal(flat, weight[0, 0, :64])


@needs_torch
@pytest.mark.slow
def test_a_trained_checkpoint_has_published_names_and_streams(raw: Path) -> None:
    config = json.loads((raw / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe"
    index = json.loads((raw / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"mtp.fc.weight", "mtp.norm.weight", "model.layers.0.mlp.experts.gate_up_proj"} < set(
        index
    )
    report = json.loads((raw / "training.json").read_text())
    assert report["options"] == {k: v for k, v in TINY.items() if k != "intermediate"}
    model = load_streamed(raw, slots=0, dtype="float32")
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    model.streamer.close()


@needs_torch
@pytest.mark.slow
def test_export_agrees_with_transformers_and_loads(package: tuple[Path, str]) -> None:
    folder, printed = package
    difference = float(printed.split("logits differ from transformers' by ")[1].split()[0])
    assert difference < 1e-3
    assert "{'def ': 64, 'import ': 64, 'class ': 64}" in printed
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    logits = model(mx.array([tokenizer.encode("def f(x):")]))
    assert logits.dtype == mx.float32 and mx.isfinite(logits).all()
    assert "8 experts of intermediate size" in (folder / "README.md").read_text()


@needs_torch
@pytest.mark.slow
def test_exported_head_has_eight_bits_and_norms_as_they_multiply(
    package: tuple[Path, str], raw: Path
) -> None:
    tensors = mx.load(str(package[0] / "model.safetensors"))
    config = json.loads((package[0] / "config.json").read_text())
    stored: dict[str, mx.array] = {}
    for file in raw.glob("model*.safetensors"):
        stored.update(mx.load(str(file)))
    assert config["mtp_norms_zero_centred"] is False
    for name in ("mtp.norm.weight", "mtp.layers.0.self_attn.k_norm.weight"):
        assert mx.array_equal(tensors[name], stored[name].astype(mx.float32) + 1.0)
    assert mx.array_equal(tensors["mtp.fc.weight"], stored["mtp.fc.weight"].astype(mx.float32))
    module = "mtp.layers.0.mlp.switch_mlp.down_proj"
    assert config["quantization"][module] == {"group_size": 64, "bits": 8}
    parts = [tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
    dense = stored["mtp.layers.0.mlp.experts.down_proj"].astype(mx.float32)
    assert mx.allclose(mx.dequantize(*parts, bits=8, group_size=64), dense, atol=1e-3)


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("case", ["no checkpoint", "another corpus"])
def test_export_refuses_in_one_line(case: str, raw: Path, corpus: Path, tmp_path: Path) -> None:
    source, texts, out = raw, tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(corpus, texts)
    if case == "no checkpoint":
        source = tmp_path / "nowhere"
    else:
        aside = next(path for path in texts.iterdir() if is_held_out(path.name))
        aside.write_text(aside.read_text() + "# more\n")
    done = tool("export", "--raw", source, "--out", out, "--corpus", texts)
    assert done.returncode == 2
    last = done.stderr.rstrip().splitlines()[-1]
    assert ("nowhere" if case == "no checkpoint" else "held-out tokens") in last
    assert "Traceback" not in done.stderr
    assert not out.exists()
