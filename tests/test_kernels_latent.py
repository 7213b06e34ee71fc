"""Latent attention of several rows: over the latents, by blocks, and what mlx-lm's is."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models import mla
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from cache.make import make_cache
from cache.side import Side
from kernels import backend, fast, latent

FAMILIES = sorted({*latent.MODELS, "glm_moe_dsa", "kimi_k25", "longcat_flash_ngram"})
NATIVE = pytest.mark.skipif(not backend.available(), reason="the extension isn't built")
# whose rows sum in another order alone, by mlx-lm: one row gathers what it attends to where several
# mask the rest; a linear attention
UNLIKE = {"deepseek_v32", "glm_moe_dsa", "bailing_hybrid"}
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3]])
OTHERS = {"mistral4": "joins positions to the keys of all heads, so it needs them made"}


@pytest.fixture
def plain() -> Iterator[Callable[[], Any]]:
    """A context in which mlx-lm's own code runs."""
    yield fast.uninstall
    fast.install()  # as conftest did, for the tests after this one


def run(model: Any, *passes: int) -> list[mx.array]:
    cache, at, out = make_prompt_cache(model), 0, []
    for rows in passes:
        out.append(model(TOKENS[:, at : at + rows], cache=cache))
        mx.eval(out[-1])
        at += rows
    return out


def near(got: mx.array, want: mx.array, tolerance: float = 1e-4) -> bool:
    return bool((mx.abs(got - want).max() <= tolerance * mx.abs(want).max()).item())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_mlx_lms(family: str, tmp_path: Any, plain: Callable[[], Any]) -> None:
    model = load_model(make_tiny(family, tmp_path / "m"))[0]
    fast.install()
    got = run(model, 16, 1, 4, 3, 1)
    plain()
    assert latent.replaced(model)
    for a, b in zip(got, run(model, 16, 1, 4, 3, 1), strict=True):
        assert near(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_what_one_pass_is(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave the caches that it leaves."""
    model = load_model(make_tiny(family, tmp_path / "m"))[0]
    fast.install()
    whole = run(model, 20, 5)
    heads = 0

    def few(count: int, keys: int) -> int:
        nonlocal heads
        heads = count
        return 7

    monkeypatch.setattr(latent, "rows_of", few)
    parts = run(model, 20, 5)
    assert heads > 1
    for a, b in zip(parts, whole, strict=True):
        assert near(a, b, 1e-5)


@pytest.mark.smoke
def test_no_keys_of_all_heads_are_made(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm makes them in every pass of several rows: where it does not, kernels.latent can go."""
    made: list[tuple[int, ...]] = []
    for kind in (mla.MultiLinear, mla.QuantizedMultiLinear):
        call = latent._MULTI[kind]

        def noted(self: Any, x: mx.array, transpose: bool = True, _call: Any = call) -> mx.array:
            if x.shape[1] == 1 and self["weight"].shape[0] > 1:
                made.append(x.shape)
            return _call(self, x, transpose)

        monkeypatch.setattr(kind, "__call__", noted)
    model = load_model(make_tiny("deepseek_v3", tmp_path / "m"))[0]
    with_them = run(model, 8, 2)
    assert [shape[2] for shape in made] == [8, 8] * 3 + [10, 10] * 3
    monkeypatch.undo()
    fast.install()
    for a, b in zip(run(model, 8, 2), with_them, strict=True):
        assert near(a, b)


def test_memory_of_a_long_pass_is_a_blocks(tmp_path: Any) -> None:
    """Scores of 2,048 rows and 64 heads over 2,048 tokens would be a gigabyte, three times."""
    changes = {"num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 2}
    model = load_model(make_tiny("deepseek_v3", tmp_path / "m", changes=changes))[0]
    fast.install()
    cache = make_prompt_cache(model)
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(model(mx.zeros((1, 2048), mx.int32), cache=cache))
    assert mx.get_peak_memory() - before < 500 << 20


def test_every_model_that_makes_them_is_named() -> None:
    found = {}
    for path in Path(mlx_lm.models.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for call in getattr(node, "body", []):
                if isinstance(node, ast.ClassDef) and getattr(call, "name", "") == "__call__":
                    names = {n.attr for n in ast.walk(call) if isinstance(n, ast.Attribute)}
                    if {"embed_q", "unembed_out"} <= names:
                        found[path.stem] = node.name
    assert {name: kind for name, kind in found.items() if name not in OTHERS} == latent.MODELS
    assert set(OTHERS) <= set(found)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNLIKE))
def test_rows_have_the_bits_of_rows_alone(family: str, tmp_path: Any) -> None:
    model = load_model(make_tiny(family, tmp_path / "m"))[0]
    fast.install()
    whole, alone = run(model, 16, 8), run(model, 16, *8 * [1])
    assert mx.array_equal(whole[1], mx.concatenate(alone[1:], axis=1))


@NATIVE
def test_codes_of_latents_are_not_decoded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of several rows reads them as one of one does, and gives its rows' bits."""
    changes = {"num_hidden_layers": 3, "kv_lora_rank": 64}
    model = load_model(make_tiny("deepseek_v3", tmp_path / "m", changes=changes))[0]
    fast.install()
    dense = Side.dense
    decoded: list[int] = []
    tokens = mx.array([[(7 * i) % 90 + 1 for i in range(500)]])
    out = []
    for passes in ((5,), 5 * (1,)):
        cache = make_cache(model, 4, 4)
        mx.eval(model(tokens[:, :495], cache=cache))
        monkeypatch.setattr(Side, "dense", lambda side: decoded.append(1) or dense(side))
        at, rows = 495, []
        for n in passes:
            rows.append(model(tokens[:, at : at + n], cache=cache))
            mx.eval(rows[-1])
            at += n
        out.append(mx.concatenate(rows, axis=1))
        monkeypatch.undo()
        assert cache[0].keys.coded >= 320
    assert not decoded
    assert mx.array_equal(*out)


@pytest.mark.smoke
@pytest.mark.parametrize("batch", [1, 2])
def test_scores_of_positions(batch: int) -> None:
    rng = np.random.default_rng(batch)
    q, k = (rng.standard_normal((batch, n, m, 24)).astype(np.float32) for n, m in ((3, 5), (1, 70)))
    turned = latent.Positions(mx.array(k)).swapaxes(-1, -2)  # of which nothing is a copy
    assert turned.nbytes == 4
    got = mx.array(q) @ turned
    want = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)
    assert got.shape == want.shape
    assert np.abs(np.array(got) - want).max() <= 1e-6 * np.abs(want).max()
    if backend.available() and batch == 1:
        assert mx.array_equal(mx.array(q[:, :, :1]) @ turned, got[:, :, :1])


@pytest.mark.smoke
@NATIVE
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_of_a_matrix_for_every_head(bits: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    w = mx.array(rng.standard_normal((5, 96, 128)).astype(np.float32))
    x = mx.array(rng.standard_normal((2, 5, rows, 128)).astype(np.float32))
    packed = mx.quantize(w, 64, bits)
    got = fast.quantized_matmul(x, *packed, transpose=True, group_size=64, bits=bits)
    want = np.array(x, np.float64) @ np.array(
        mx.dequantize(*packed, group_size=64, bits=bits), np.float64
    ).swapaxes(-1, -2)
    assert np.abs(np.array(got) - want).max() <= 1e-5 * np.abs(want).max()
    one = fast.quantized_matmul(x[:, :, :1], *packed, transpose=True, group_size=64, bits=bits)
    assert mx.array_equal(one, got[:, :, :1])
