"""What a model tells its watcher agrees with its counters; watched by nobody it costs nothing."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache
from test_mtp_decode import drafting, tokens_of

from streamer import engine, fetching, native_reads, residency, speculate, store
from streamer.engine import Timing, generate
from streamer.loading import expert_count, load_streamed
from streamer.watch import Watchers

TOKENS = np.random.default_rng(5).integers(0, 250, 400).tolist()


class Notes:
    """Everything that is told, as it comes."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, float]] = []
        self.choices: list[tuple[int, np.ndarray, int]] = []
        self.waits: list[float] = []
        self.ended: list[tuple[int, float, float]] = []

    def step(self, kind: str, rows: int, seconds: float) -> None:
        self.steps.append((kind, rows, seconds))

    def chose(self, layer: int, ids: np.ndarray, misses: int) -> None:
        self.choices.append((layer, ids, misses))

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def reads(self, ended: np.ndarray) -> None:
        self.ended.extend(map(tuple, ended.tolist()))

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
    """Choices, waits and reads against what the model counted itself."""
    streamer = model.streamer
    asked = sum(len(np.unique(ids)) for _, ids, _ in notes.choices)
    misses = sum(n for _, _, n in notes.choices)
    assert misses == streamer.counters.misses > 0
    assert asked - misses == streamer.counters.hits
    assert sum(notes.waits) == pytest.approx(streamer.counters.io_wait_seconds)
    assert len(notes.ended) == streamer.store.counters.reads
    assert sum(n for n, _, _ in notes.ended) == streamer.store.counters.bytes_read
    assert all(queued >= 0 and seconds >= 0 for _, queued, seconds in notes.ended)
    assert {layer for layer, _, _ in notes.choices} == set(range(len(streamer.opened.layers)))


@pytest.mark.smoke
@pytest.mark.parametrize("how", ["layerwise", "rehearse"])
def test_what_is_told_is_what_was_counted(tiny: Path, how: Any) -> None:
    model: Any = load_streamed(tiny, slots=16, executor=how)
    notes, second = Notes(), Notes()
    model.streamer.watch = Watchers([notes, second])
    timing = run(model, 20)
    check(model, notes)
    assert notes.steps == second.steps and notes.ended == second.ended
    assert notes.kinds["decode"] == 20
    prefilled = [rows for kind, rows, _ in notes.steps if kind == "prefill"]
    assert sum(prefilled) == 199
    assert (notes.kinds["rehearse"] > 0) == (how == "rehearse")
    told = sum(s for kind, _, s in notes.steps if kind in ("prefill", "decode"))
    assert told <= timing.prompt_seconds + timing.decode_seconds
    model.streamer.watch = None
    before = len(notes.steps), len(notes.choices), len(notes.ended)
    run(model, 5)
    assert before == (len(notes.steps), len(notes.choices), len(notes.ended))


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
    for module in (engine, fetching, native_reads, residency, speculate, store):
        text = Path(module.__file__).read_text().splitlines()
        lines |= {(module.__file__, i) for i, t in enumerate(text, 1) if "watch." in t}
    assert len(lines) >= 8

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
    model.streamer.watch = notes = Notes()
    assert held() > 0 and notes.steps
