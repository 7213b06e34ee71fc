"""Rehearsing changes when experts are read, not what is computed: families, drafts, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, METAL_ONLY, make_tiny
from mlx_lm.models.cache import make_prompt_cache
from test_mtp_decode import NO_ROLLBACK, drafting, tokens_of

from cache.make import make_cache
from streamer.errors import StreamerError
from streamer.guess import SOURCES
from streamer.loading import expert_count, load_streamed
from streamer.run import DEMO
from streamer.store import Store
from streamer.ways import Effort

TOKENS = np.random.default_rng(7).integers(0, 250, 200)
ROWS = [30, 1, 1, 3, 1, 1, 5, 1, 2, 1, 1, 1, 40, 1, 1]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait is rehearsed in, to the last layer, however short it is."""
    monkeypatch.setattr(Effort, "pays", lambda *_: True)
    monkeypatch.setattr(Effort, "goes_on", lambda *_: True)
    monkeypatch.setattr(Effort, "worth", lambda *_: True)


def passes(model: Any, cache: Any = None) -> list[mx.array]:
    cache, out, at = cache or make_prompt_cache(model), [], 0
    for n in ROWS:
        out.append(model(mx.array(TOKENS[at : at + n])[None], cache=cache))
        mx.eval(out[-1])
        at += n
    return out


def same(want: list[mx.array], got: list[mx.array]) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(want, got, strict=True))


def _families() -> list[Any]:
    here = set(FAMILIES) - (set() if mx.metal.is_available() else METAL_ONLY)
    smoke = {"qwen3_5_moe", "deepseek_v3"}
    return [pytest.param(f, marks=[pytest.mark.smoke] if f in smoke else []) for f in sorted(here)]


@pytest.mark.parametrize("family", _families())
def test_every_family_keeps_its_bits(family: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path)
    count = expert_count(path)
    expected = passes(load_streamed(path))
    resumed = 0
    ways = (0.25, "lookahead"), (0.5, "rehearse"), (0.5, "lookahead"), (0.75, "auto")
    for share, way in ways:
        guess = ",".join(SOURCES) if share == 0.5 else "auto"
        model = load_streamed(path, slots=int(count * share), executor=way, guess=guess)  # type: ignore[arg-type]
        assert same(expected, passes(model))
        counters = model.streamer.counters
        resumed += counters.rehearsed_misses
        assert counters.prefetch_used <= counters.prefetched
        for run in model.streamer.executors:
            run.ahead.drop(wait=True)
            assert not run.ahead.held
            resident = sum(int((table >= 0).sum()) for table in run.pool.slot_of)
            assert resident + len(run.pool.free) == run.pool.slots
    assert resumed, "no pass was resumed"


@pytest.mark.parametrize("family", [f for f in _families() if f.values[0] not in NO_ROLLBACK])
def test_drafts_are_taken_back_after_a_resumed_pass(family: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path)
    expected, _, _ = tokens_of(load_streamed(path))
    model = load_streamed(path, slots=expert_count(path) // 3, executor="lookahead")
    got, _, _ = tokens_of(model, speculation=drafting(model, expected))
    assert got == expected
    assert model.streamer.counters.rehearsals > 0


@pytest.mark.parametrize("share", [0.12, 0.25, 0.5, 0.75])
def test_the_demo_keeps_its_tokens(share: float) -> None:
    expected, _, _ = tokens_of(load_streamed(DEMO, dtype="auto"))
    slots = int(256 * share)
    for choice in ("rehearse", "lookahead", "auto"):
        model = load_streamed(DEMO, slots=slots, dtype="auto", executor=choice)  # type: ignore[arg-type]
        assert tokens_of(model)[0] == expected


def test_a_pass_without_misses_takes_one_read_back_and_counts_alike(tmp_path: Path) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    ends = []
    for choice in ("layerwise", "rehearse"):
        model = load_streamed(path, slots=expert_count(path) - 1, executor=choice)  # type: ignore[arg-type]
        run, counters = model.streamer.executors[0], model.streamer.counters
        for _ in range(4):  # the same token after nothing: from the second on all is there
            run.settle()
            before = counters.hits, counters.misses, counters.syncs
            mx.eval(model(mx.array([[7]]), cache=make_prompt_cache(model)))
        run.settle()
        used = model.streamer.opened.top_k * len(run.layers)
        assert counters.misses == before[1] and counters.hits - before[0] == used
        heat = np.concatenate([run.pool.heat(layer) for layer in range(len(run.layers))])
        ends.append((counters.syncs - before[2], heat))
    assert np.array_equal(ends[0][1], ends[1][1])
    assert ends[0][0] == len(run.layers) and ends[1][0] == 1


def test_compressed_caches_are_put_back(tmp_path: Path) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    results = []
    for choice in ("layerwise", "rehearse", "lookahead"):
        model = load_streamed(path, slots=expert_count(path) // 3, executor=choice)  # type: ignore[arg-type]
        results.append(passes(model, make_cache(model, 4, 4)))
    assert same(*results[:2]) and same(*results[1:])


def test_a_failed_read_leaves_a_usable_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    expected = passes(load_streamed(path))
    model = load_streamed(path, slots=expert_count(path) // 3, executor="rehearse")

    def broken(*_: Any) -> Any:
        raise StreamerError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", broken)
        with pytest.raises(StreamerError, match="disk is gone"):
            passes(model)
    assert same(expected, passes(model))
