"""`--kv-bits`: what the plan counts is what is allocated, auto, and the process's bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import KVCache, make_prompt_cache

from cache.compressed import CompressedKVCache
from cache.sizes import CodedSize
from streamer import load, plan, run, stream_generate
from streamer.budget import divide
from streamer.errors import BudgetError, UsageError
from streamer.kv import CODED, read_bits
from streamer.loading import load_streamed
from streamer.opened import open_model
from streamer.run import DEMO

WIDE = {"num_key_value_heads": 4, "head_dim": 128}  # 12 kB a token in float32


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {**WIDE, "max_position_embeddings": 8192}
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("wide") / "m", changes=changes)


def filled(bits: float, widths: tuple[int, int], cuts: list[int], latent: bool) -> Any:
    cache, random = CompressedKVCache(bits, bits, latent), np.random.default_rng(1)
    heads = 1 if latent else 2
    for n in cuts:
        k, v = (mx.array(random.standard_normal((1, heads, n, w)), mx.float32) for w in widths)
        cache.update_and_fetch(k, v)
    mx.eval(cache.state)
    return cache


@pytest.mark.smoke
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bits", CODED)
def test_sizes_are_those_allocated(bits: float, latent: bool) -> None:
    size = CodedSize(1 if latent else 2, (128, 64), 4, latent)
    for cuts in ([3], [40, 1], [300], [1024 + 4 + 64], [1024 + 4 + 128], [500, 500, 100, 1, 1]):
        cache = filled(bits, (128, 64), cuts, latent)
        if cuts[-1] > 16 and not latent:  # as attention does when it has read
            cache.commit()
        raw = 256 * (128 + 64) * 4 * 2
        mx.eval(cache.state)
        assert cache.nbytes <= size.at(sum(cuts), bits) <= cache.nbytes + raw, cuts


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_takes_what_was_planned(family: str, dtype: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path / "m", dtype=dtype)
    opened = open_model(path)
    for bits in (16, 3.5):
        cache = make_prompt_cache(model := load_streamed(path, dtype="auto", kv_bits=bits))
        for n in (512, 512, 300, 1):
            mx.eval(model(mx.zeros((1, n), mx.int32), cache=cache), [c.state for c in cache])
        taken, kv = sum(c.nbytes for c in cache), opened.kv_bytes(1325, bits)
        sliding = sum(c.nbytes for c in cache if not isinstance(c, CompressedKVCache))
        assert taken <= kv <= 1.6 * (taken - sliding) + 4 * sliding
        assert model.streamer.budget.kv_bits == bits


def test_auto_takes_the_most_bits_that_fit(wide: Path) -> None:
    opened = open_model(wide)
    smallest = {
        bits: divide(opened, "min", 4096, kv_bits=bits).smallest + (1 << 20) for bits in (16, 8, 4)
    }
    assert smallest[16] > smallest[8] > smallest[4]
    for bits, limit in smallest.items():
        budget = divide(opened, limit, 4096, kv_bits="auto")
        assert budget.kv_bits == bits and budget.total <= budget.limit
        assert budget.kv == opened.kv_bytes(4096, bits) <= budget.kv_full
    for memory in (None, "min", "50%"):
        assert divide(opened, memory, 4096, kv_bits="auto", spare=1 << 34).kv_bits == 16
    with pytest.raises(BudgetError, match="at 2 bits"):
        divide(opened, 1 << 20, 4096, kv_bits="auto")
    with pytest.raises(BudgetError, match=r"tokens \d"):
        divide(opened, smallest[8], 4096)


def test_auto_says_so(
    wide: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model", str(wide), "--raw", "--prompt", "word " * 40, "--max-tokens", "2"]
    opened = open_model(wide)
    room = divide(opened, "min", 6000, kv_bits=3.5).smallest
    less = divide(opened, "min", 6000).smallest - room
    assert less > 20 << 20
    memory = ["--context", "6000", "--memory", str(room + (12 << 20))]
    assert run.main([*argv, *memory]) == 0
    err = capsys.readouterr().err
    assert "bits (full precision takes" in err and "which does not fit" in err
    assert run.main([*argv, *memory, "--kv-bits", "16"]) == 2
    assert "smallest budget" in capsys.readouterr().err
    assert run.main([*argv, "--kv-bits", "4"]) == 0
    err = capsys.readouterr().err
    assert "at 4 bits (full precision takes" in err and "does not fit" not in err
    assert run.main(argv) == 0
    assert "bits" not in capsys.readouterr().err


def test_plans_show_both_sizes(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(wide), "--memory", "50%", "--context", "4000"]
    assert plan.main([*argv, "--kv-bits", "3.5"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "KV cache" in x)
    assert "at 3.5 bits (48.0 MB in full precision) for 4000 tokens" in line
    assert plan.main(argv) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "KV cache" in x)
    assert "48.0 MB in full precision (" in line and "at 2 bits" in line
    assert plan.main([*argv, "--kv-bits", "2.5", "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)["budget"]
    assert budget["kv_bits"] == 2.5 and budget["kv"] < budget["kv_full"] / 4


def test_a_model_without_coded_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tiny("deepseek_v32", tmp_path / "m")
    argv = ["--model", str(path), "--raw", "--prompt", "x", "--max-tokens", "2"]
    assert run.main([*argv, "--kv-bits", "4"]) == 0
    assert "none of its layers can be held at 4 bits" in capsys.readouterr().err


@pytest.mark.smoke
def test_bits_are_read() -> None:
    assert [read_bits(x) for x in ("auto", "16", 16, 2.5, "2.5", "8.0", 4.0)] == [
        "auto", 16, 16, 2.5, 2.5, 8, 4
    ]  # fmt: skip
    for bad in ("5", 5, "", "1", None, "nan", "3.50001", True):
        with pytest.raises(UsageError, match="KV bits are"):
            read_bits(bad)
    with pytest.raises(UsageError, match="KV bits are"):
        load(DEMO, kv_bits=7)


def test_python_callers_get_compressed_caches() -> None:
    model, tokenizer = load(DEMO, memory="50%", kv_bits=3.5)
    kinds = {type(c) for c in make_prompt_cache(model)}
    assert CompressedKVCache in kinds and KVCache not in kinds
    prompt = "import os\n" * 40
    text = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=20)
    parts = [r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=20)]
    assert "".join(parts) == text != ""


def ran(path: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    stats = tmp_path / "stats.json"
    command = [sys.executable, "-m", "streamer.run", "--model", str(path), "--raw"]
    command += ["--max-tokens", "20", "--stats", str(stats), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(stats.read_text())


@pytest.mark.parametrize("memory", ["min", "100%"])
def test_the_process_stays_within_its_budget(wide: Path, tmp_path: Path, memory: str) -> None:
    """Over a prompt whose keys and values weigh 48 MB in full precision."""
    prompt = "some words to read first, " * 154
    got = ran(wide, tmp_path, "--prompt", prompt, "--kv-bits", "3.5", "--memory", memory)
    assert 3900 < got["prompt_tokens"] < 4100
    assert got["peak_bytes"] <= got["budget_bytes"]
    assert got["kv_cache"]["kind"] == "compressed" and got["kv_cache"]["bits"] == 3.5
    assert got["kv_cache"]["bytes"] < 48e6 / 6
