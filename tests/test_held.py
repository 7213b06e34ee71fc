"""Scales and biases are held as they are stored, and give the bits of widened ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import FAMILIES, METAL_ONLY, make_tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kernels import backend
from streamer import held
from streamer.budget import divide
from streamer.experts import held_bytes
from streamer.held import Held, WideEmbedding
from streamer.loading import expert_count, load_streamed
from streamer.opened import open_model, trunk_parameters

FOUR = {"bits": 4, "group_size": 32}
PASSES = [21, 1, 1, 3, 70]
SMOKE = ["qwen3_moe", "qwen3_5_moe"]
extension = pytest.mark.skipif(not backend.available(), reason="the extension is not in use")


def tiny(path: Path, family: str = "qwen3_5_moe", dtype: str = "bfloat16", **options: Any) -> Path:
    return make_tiny(family, path / "m", dtype=dtype, quantization=FOUR, **options)


def logits(model: nn.Module) -> list[mx.array]:
    cache, out = make_prompt_cache(model), []
    for i, rows in enumerate(PASSES):
        tokens = mx.random.randint(0, 300, (1, rows), key=mx.random.key(i))
        out.append(model(tokens, cache=cache))
        mx.eval(out[-1])
    return out


def streamed(path: Path, share: float) -> list[mx.array]:
    model = load_streamed(path, slots=int(expert_count(path) * share), dtype="float32")
    try:
        return logits(model)
    finally:
        model.streamer.close()


def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels don't run: everything is widened when it is loaded."""
    monkeypatch.setattr(held, "_for_kernels", lambda _: False)


def _cases() -> list[Any]:
    marks = {name: [pytest.mark.smoke] for name in SMOKE}
    skipped = [] if mx.metal.is_available() else list(METAL_ONLY)
    marks |= {name: [pytest.mark.skip(reason="Metal only")] for name in skipped}
    return [pytest.param(name, marks=marks.get(name, [])) for name in FAMILIES]


@pytest.mark.parametrize("family", _cases())
def test_every_family_gives_the_bits_of_widened_scales(tmp_path: Path, family: str) -> None:
    path = tiny(tmp_path, family)
    whole, _ = load_model(path)
    whole.set_dtype(mx.float32)
    wanted = logits(whole)
    for share in (1.0, 0.5) if family in SMOKE else (0.5,):
        for got, want in zip(streamed(path, share), wanted, strict=True):
            assert got.dtype == mx.float32 and mx.array_equal(got, want)


@extension
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_held_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    path = tiny(tmp_path, dtype=dtype)
    stored = getattr(mx, dtype)
    model = load_streamed(path, dtype="float32")
    opened = model.streamer.opened
    try:
        assert isinstance(model["language_model"]["model"]["embed_tokens"], WideEmbedding)
        for name, array in trunk_parameters(model):
            kinds = (stored,) if name.endswith(("scales", "biases")) else (mx.float32, mx.uint32)
            assert array.dtype in kinds, name
        assert opened.trunk_bytes == sum(a.nbytes for _, a in trunk_parameters(model))
        for fmt, run in zip(opened.groups, model.streamer.executors, strict=True):
            assert run.arrays.nbytes == run.pool.slots * held_bytes(fmt)
            assert {t.held for t in fmt} == {mx.uint32, stored}
            assert not any(t.stored != t.held for t in fmt), "nothing to widen when it is read"
    finally:
        model.streamer.close()
    narrow = open_model(path)
    wide(monkeypatch)
    widened = open_model(path)
    # 4 bits and two scales for each group of 32: 5 bits a weight, not 6
    sizes = [held_bytes(next(iter(o.groups))) for o in (narrow, widened)]
    assert sizes[0] * 6 == sizes[1] * 5
    assert narrow.trunk_bytes < widened.trunk_bytes


@extension
def test_a_budget_holds_more_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(tmp_path, "qwen3_moe", changes={"num_experts": 64, "moe_intermediate_size": 2048})
    opened = open_model(path)
    limit = divide(opened, "50%", 256).limit
    slots = [sum(divide(opened, limit, 256).slots)]
    wide(monkeypatch)
    slots.append(sum(divide(open_model(path), limit, 256).slots))
    assert slots[0] >= 1.15 * slots[1]


def test_without_kernels_everything_is_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "available", lambda: False)
    opened = open_model(tiny(tmp_path))
    assert not opened.held.narrow
    kinds = {t.held for fmt in opened.groups for t in fmt}
    assert kinds == {mx.uint32, mx.float32}


def test_a_stored_model_and_a_gpu_widen_nothing(tmp_path: Path) -> None:
    model, _ = load_model(tiny(tmp_path), lazy=True)
    as_stored = Held.of(model, None)
    for name, array in dict(tree_flatten(model.parameters())).items():
        assert as_stored(name, array.dtype) == array.dtype


@extension
def test_other_layers_are_held_wide() -> None:
    class Own(nn.QuantizedLinear):
        pass

    model = nn.Module()
    model.known, model.own = nn.QuantizedLinear(64, 32), Own(64, 32)
    model.strange = nn.QuantizedLinear(64, 32, group_size=32, mode="mxfp4")
    found = Held.of(model, mx.float32)
    assert found.narrow == {"known.scales", "known.biases"}
    assert found("known.scales", mx.bfloat16) == mx.bfloat16
    assert found("known.bias", mx.bfloat16) == found("own.scales", mx.bfloat16) == mx.float32
    assert found("strange.scales", mx.uint8) == mx.uint8
