"""What a model tells its watcher agrees with its counters; watched by nobody it costs nothing."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache
from test_mtp_decode import drafting, tokens_of

from streamer import engine, fetching, profiler, residency, speculate
from streamer.engine import Timing, generate
from streamer.loading import expert_count, load_streamed

TOKENS = np.random.default_rng(5).integers(0, 250, 400).tolist()


class Notes:
    """Everything that is told, as it comes."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, float]] = []
        self.choices: list[tuple[int, np.ndarray, Sequence[int]]] = []

    def step(self, kind: str, rows: int, seconds: float) -> None:
        self.steps.append((kind, rows, seconds))

    def chose(self, layer: int, ids: np.ndarray, missed: Sequence[int]) -> None:
        self.choices.append((layer, ids, missed))

    @property
    def kinds(self) -> Counter[str]:
        return Counter(kind for kind, _, _ in self.steps)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_5_moe", tmp_path_factory.mktemp("tiny"))


def run(model: Any, count: int, prompt: int = 200) -> Timing:
    timing = Timing()
    cache = make_prompt_cache(model)
    list(generate(model, TOKENS[:prompt], cache, max_tokens=count, timing=timing))
    for each in model.streamer.executors:
        each.settle()
    return timing


def check(model: Any, notes: Notes) -> None:
    """Choices and reads against what the model counted itself."""
    streamer = model.streamer
    asked = sum(len(np.unique(ids)) for _, ids, _ in notes.choices)
    misses = sum(len(missed) for _, _, missed in notes.choices)
    assert all(set(missed) <= set(ids.reshape(-1).tolist()) for _, ids, missed in notes.choices)
    assert misses == streamer.counters.misses > 0
    assert asked - misses == streamer.counters.hits
    ended = streamer.store.take_log()
    assert len(ended) == streamer.store.counters.reads
    assert ended[:, 0].sum() == streamer.store.counters.bytes_read and (ended >= 0).all()
    assert not len(streamer.store.take_log())
    assert {layer for layer, _, _ in notes.choices} == set(range(len(streamer.opened.layers)))


@pytest.mark.smoke
@pytest.mark.parametrize("reads", ["native", "python"])
@pytest.mark.parametrize("how", ["layerwise", "rehearse"])
def test_what_is_told_is_what_was_counted(
    tiny: Path, how: Any, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMER_READS", reads)
    model: Any = load_streamed(tiny, slots=16, executor=how)
    model.streamer.watch = notes = Notes()
    timing = run(model, 20)
    check(model, notes)
    assert notes.kinds["decode"] == 20
    prefilled = [rows for kind, rows, _ in notes.steps if kind == "prefill"]
    assert sum(prefilled) == 199
    assert (notes.kinds["rehearse"] > 0) == (how == "rehearse")
    told = sum(s for kind, _, s in notes.steps if kind in ("prefill", "decode"))
    assert told <= timing.prompt_seconds + timing.decode_seconds
    model.streamer.watch = None
    before = len(notes.steps), len(notes.choices)
    run(model, 5)
    assert before == (len(notes.steps), len(notes.choices))
    assert not len(model.streamer.store.take_log())


def test_drafts_and_verify_passes_are_told(tiny: Path) -> None:
    expected, _, _ = tokens_of(load_streamed(tiny))
    model: Any = load_streamed(tiny, slots=16)
    speculation = drafting(model, expected)
    model.streamer.watch = notes = Notes()
    tokens_of(model, speculation=speculation)
    for each in model.streamer.executors:
        each.settle()
    check(model, notes)
    counters = speculation.counters
    assert notes.kinds["verify"] == counters.verify_passes > 0
    assert sum(rows for kind, rows, _ in notes.steps if kind == "draft") == counters.drafted
    verified = sum(rows for kind, rows, _ in notes.steps if kind == "verify")
    assert verified == counters.drafted + counters.verify_passes


def test_a_layer_that_is_wholly_resident_is_told_late(tiny: Path) -> None:
    model: Any = load_streamed(tiny, slots=expert_count(tiny) - 1)
    model.streamer.watch = notes = Notes()
    run(model, 12)
    assert model.streamer.counters.syncs < len(notes.choices), "no layer was covered"
    check(model, notes)


def test_nothing_is_allocated_where_nobody_watches(tiny: Path) -> None:
    """By the lines that tell something: none of them holds memory, or ever did, while decoding."""
    model: Any = load_streamed(tiny, slots=16)
    lines = set()
    for module in (engine, fetching, residency, speculate, profiler):
        text = Path(module.__file__).read_text().splitlines()
        told = [module is profiler or "watch." in line for line in text]
        lines |= {(module.__file__, i) for i, here in enumerate(told, 1) if here}
        assert any(told)

    def held() -> int:
        steps = generate(model, TOKENS[:20], make_prompt_cache(model), max_tokens=40)
        for _ in range(8):
            next(steps)
        tracemalloc.start()
        try:
            for _ in range(24):
                next(steps)
            found = tracemalloc.take_snapshot().statistics("lineno")
        finally:
            tracemalloc.stop()
        steps.close()
        return sum(
            s.size for s in found if (s.traceback[0].filename, s.traceback[0].lineno) in lines
        )

    assert held() == 0
    assert not len(model.streamer.store.take_log())
    model.streamer.watch = profiler.Profiler(model)
    assert held() > 0 and len(model.streamer.store.take_log())
