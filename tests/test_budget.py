"""The division of a budget, and that the process stays within it."""

import gc
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from families import make_tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model

from kernels import backend, fast
from streamer import budget as budget_module
from streamer import plan, probe
from streamer.budget import (
    MAX_CHUNK,
    MIN_CHUNK,
    RESIDENT_CHUNK,
    SLACK,
    _chunk,
    chunk_workspace,
    divide,
)
from streamer.errors import BudgetError
from streamer.experts import held_bytes
from streamer.footprint import parse_size
from streamer.opened import open_model, trunk_parameters
from streamer.run import DEMO
from streamer.trunk import PIECE, load_trunk


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
def test_a_pool_is_no_larger_than_mlxs_products_bear(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(mixed)
    largest = max(math.prod(t.shape) for fmt in opened.groups for t in fmt)
    monkeypatch.setattr(budget_module, "MOST_ELEMENTS", 5 * largest)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "available", lambda: True)
        assert divide(opened, None, 256, spare=1 << 30).resident
    monkeypatch.setattr(backend, "available", lambda: False)
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    bounded = divide(opened, None, 256, spare=1 << 30)
    assert bounded.resident == on_gpu
    for fmt, slots in zip(opened.groups, bounded.slots, strict=True):
        assert on_gpu or slots == 5 * largest // max(math.prod(t.shape) for t in fmt)


@pytest.mark.smoke
def test_shares(mixed: Path) -> None:
    opened = open_model(mixed)
    for percent in (25, 50, 100):
        budget = divide(opened, f"{percent}%", 256)
        share = sum(budget.slots) / opened.experts
        assert abs(share - percent / 100) < 0.1
        assert budget.total <= budget.limit


@pytest.mark.smoke
@pytest.mark.smoke
def test_the_plan_names_budgets_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.budget.footprint", lambda: 100 << 20)
    opened = open_model(DEMO)
    told = plan._smallest(opened, divide(opened, "1GB", 4096))
    sizes = [parse_size(size) for size in re.findall(r"[0-9.]+ [kMG]B", told)]
    for size, bits in zip(sizes, (16, 2), strict=True):
        divide(opened, size, 4096, kv_bits=bits)
        with pytest.raises(BudgetError):
            divide(opened, size - (2 << 20), 4096, kv_bits=bits)


SESSION = """
import sys
from streamer.run import DEMO, parser
from streamer.session import open_session
text = "".join(path.read_text() for path in sorted(DEMO.parent.glob("*.py")))
options = ["--memory", sys.argv[1], "--context", sys.argv[2], "--kv-bits", "16"]
open_session(parser().parse_args(options), text[: int(sys.argv[3])], DEMO)
"""


@pytest.mark.parametrize(("context", "characters"), [(10, 4), (8192, 20000)])
def test_what_one_process_names_works_in_another(context: int, characters: int) -> None:
    command = [sys.executable, "-m", "streamer.plan", "--memory", "min", "--context", str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = re.search(r"smallest +([0-9.]+ [kMG]B) works", done.stdout)
    assert size
    command = [sys.executable, "-c", SESSION, size[1], str(context), str(characters)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_too_small_names_the_smallest_that_works(mixed: Path) -> None:
    opened = open_model(mixed)
    with pytest.raises(BudgetError, match="smallest budget that works"):
        divide(opened, 10 << 20, 256)
    divide(opened, "min", 256)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen3_5_moe", "gpt_oss", "deepseek_v32", "deepseek_v41", "llama4"]
)
@pytest.mark.parametrize("rows", [300, 512, 1100])
def test_caches_weigh_what_they_take(tmp_path: Path, family: str, rows: int) -> None:
    path = make_tiny(family, tmp_path / "m")
    model, _ = load_model(path, lazy=True)
    caches = make_prompt_cache(model)
    for n in [128] * (rows // 128) + [rows % 128] * bool(rows % 128):
        model(mx.zeros((1, n), dtype=mx.int32), cache=caches)
    taken = sum(cache.nbytes for cache in caches)
    sliding = sum(cache.nbytes for cache in caches if isinstance(cache, RotatingKVCache))
    kv = open_model(path).kv_bytes(rows)
    assert taken <= kv <= 1.02 * taken * (-(-rows // 256) * 256 / rows) + 4 * sliding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_opened_model_holds_no_weights(tmp_path: Path, dtype: str) -> None:
    """Neither while it is loaded: a stored tensor goes when the one held in its stead is there."""
    changes = {"vocab_size": 60_000}
    path = make_tiny("qwen3_moe", tmp_path / "m", dtype=dtype, changes=changes)
    opened = open_model(path)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    load_trunk(opened, lambda _: None)
    assert mx.get_active_memory() - before < 1.01 * opened.trunk_bytes
    assert opened.trunk_bytes > 3 * PIECE
    assert mx.get_peak_memory() - before < 1.01 * opened.trunk_bytes + PIECE // 2
    whole, _ = load_model(path)
    whole.set_dtype(mx.float32)
    wanted = dict(tree_flatten(whole.parameters()))
    for name, array in trunk_parameters(opened.model):
        assert array.dtype == mx.float32 and mx.array_equal(array, wanted[name])


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


def test_a_plan_that_reads_nothing_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = make_tiny("qwen3_moe", tmp_path / "m", changes={"mlp_only_layers": [0, 1, 2, 3]})
    assert plan.main(["--model", str(dense), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert planned["disk_bytes_per_second"] is None


def test_the_better_end_reads_from_the_page_cache(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(mixed)
    monkeypatch.setattr(plan, "experts_seconds", lambda opened: 1e-3)
    monkeypatch.setattr(plan, "multiply_rate", lambda: float("inf"))
    for settled in (1e6, 4e6):
        choice = probe.Choice("pread", False, 1e6, 0.0, "", settled)
        monkeypatch.setattr(probe, "choose_backend", lambda *_, choice=choice: choice)
        found = plan.foresee(opened, divide(opened, "50%", 64))
        most, least = found.read_bytes
        assert found.disk_bytes_per_second == 1e6
        due = (1 / (1e-3 + most / 1e6), 1 / (1e-3 + least / settled))
        assert found.tokens_per_second == pytest.approx(due)


def ran(path: Path, memory: str, tmp_path: Path) -> dict:
    """The statistics of a run over a prompt of many words, which stayed within its budget."""
    stats, prompt = tmp_path / "stats.json", "some words to read first, " * 40
    command = [sys.executable, "-m", "streamer.run", "--model", str(path), "--memory", memory]
    command += ["--raw", "--prompt", prompt, "--max-tokens", "40", "--stats", str(stats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(stats.read_text())
    assert got["peak_bytes"] <= got["budget_bytes"]
    return got


@pytest.mark.parametrize("memory", ["min", "40%", "130MB"])
def test_the_process_stays_within_its_budget(tmp_path: Path, memory: str) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path / "m", changes={"num_experts": 64})
    got = ran(path, memory, tmp_path)
    assert got["experts"]["slots"] < got["experts"]["total"] or memory == "130MB"


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_a_state_for_every_row_is_foreseen(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's loop over a gated delta net leaves a state of 2 MB for each row of a pass."""
    monkeypatch.setenv("STREAMER_KERNELS", kernels)
    if kernels == "off":  # in the subprocess, and for the plan made here
        monkeypatch.setattr(fast, "keeps_one_state", lambda width: False)
    changes = {
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_hidden_layers": 4,
    }
    path = make_tiny("qwen3_5_moe", tmp_path / "m", changes=changes)
    got = ran(path, "min", tmp_path)
    workspace = chunk_workspace(open_model(path), MIN_CHUNK, got["prompt_tokens"] + 40)
    one = kernels == "on" and backend.available()
    assert (workspace > 16 * 2 << 20) is not one
    spare = got["budget_bytes"] - got["peak_bytes"]
    assert spare < 0.6 * workspace + SLACK, "far too much is reserved"


def test_latent_rows_grow_to_keys_of_every_head(tmp_path: Path) -> None:
    """In a pass of more rows than one, where it is not run over the latents; deepseek_v2 keeps
    them grown."""
    for family, grows in (("mistral4", True), ("deepseek_v3", False), ("deepseek_v2", False)):
        opened = open_model(make_tiny(family, tmp_path / family))
        heads, rank = opened.text("num_attention_heads", 0), opened.text("kv_lora_rank", 0)
        width = opened.text("qk_nope_head_dim", 0) + opened.text("v_head_dim", 0)
        assert heads and rank and width
        assert opened.over_latents == (family == "deepseek_v3")
        more = chunk_workspace(opened, 16, 512) - chunk_workspace(opened, 16, 256)
        scores = 256 * 16 * 12 * heads * (grows or opened.over_latents)
        scores += 256 * 16 * 2 * opened.over_latents
        scores += 256 * 16 * 12 * heads * (family == "deepseek_v2" and not backend.available())
        copied = opened.growth_bytes(512, 16) - opened.growth_bytes(256, 16)
        assert copied == 256 * opened.cache_row
        assert more == 3 * copied // 2 + scores + 256 * 5 * heads * (rank + width) * grows


def test_latent_attention_does_not_shorten_passes(tmp_path: Path) -> None:
    """Its scores are of a block of rows, whatever the pass and the context."""
    changes = {"num_attention_heads": 64, "num_key_value_heads": 64, "kv_lora_rank": 512}
    opened = open_model(make_tiny("deepseek_v3", tmp_path / "m", changes=changes))
    long, short = (chunk_workspace(opened, rows, 8192) for rows in (2048, 64))
    assert long < 450 << 20 < 12 * 64 * 2048 * 8192
    assert long - short < 300 << 20


@pytest.mark.smoke
def test_passes_over_a_prompt_are_long_where_experts_are_paged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as a prompt, and no longer; 512 tokens where everything fits."""
    monkeypatch.setattr("streamer.budget.footprint", lambda: 100 << 20)
    opened = open_model(DEMO)
    monkeypatch.setattr("streamer.budget.held_bytes", lambda fmt: 20 << 20)  # of 320 experts
    for context, chunk in ((64, 64), (65, 128), (1000, 1024), (5000, MAX_CHUNK)):
        budget = divide(opened, "3GB", context)
        assert (budget.resident, budget.chunk) == (False, chunk)
        assert divide(opened, "50%", context).chunk == chunk
        whole = divide(opened, "8GB", context)
        assert (whole.resident, whole.chunk) == (True, min(chunk, RESIDENT_CHUNK))


def test_what_no_chunk_saves_makes_none_smaller(tmp_path: Path) -> None:
    """Expanding latent rows costs the same for any chunk, and once for each."""
    changes = {"num_attention_heads": 64, "num_key_value_heads": 64, "kv_lora_rank": 512}
    opened = open_model(make_tiny("mistral4", tmp_path / "m", changes=changes))
    fixed, whole = (chunk_workspace(opened, n, 1024) for n in (0, 64))
    assert fixed > 2 * (whole - fixed)
    assert _chunk(opened, 1024, max(whole, 4 * (whole - fixed)), 1 << 40)[0] == 64
    assert _chunk(opened, 1024, whole - 1, 1 << 40)[0] < 64
