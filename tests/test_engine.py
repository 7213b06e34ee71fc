"""Generation: the tokens of mlx-lm, and a cache whose content is known at any end."""

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from families import make_tiny
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_model

from kernels import sampling
from streamer import load
from streamer.engine import Timing, generate
from streamer.loading import load_streamed
from streamer.run import DEMO

PROMPT = [7, 3, 200, 5, 9, 11, 250, 31, 8] * 9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_5_moe", tmp_path_factory.mktemp("engine"))


def tokens_of(model: Any, **options: Any) -> tuple[list[int], Timing, list[Any]]:
    timing, cache = Timing(), make_prompt_cache(model)
    steps = generate(model, PROMPT, cache, timing=timing, **options)
    return [step.token for step in steps], timing, cache


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [None, 20, 0])
def test_greedy_tokens_are_mlx_lms(tiny: Path, slots: int | None) -> None:
    expected = [t for t, _ in generate_step(mx.array(PROMPT), load_model(tiny)[0], max_tokens=40)]
    got, timing, _ = tokens_of(load_streamed(tiny, slots=slots), max_tokens=40)
    assert got == expected
    assert (timing.prompt_tokens, timing.generated_tokens) == (len(PROMPT), 40)


@pytest.mark.parametrize("slots", [None, 20])
@pytest.mark.parametrize("few", [sampling.FEW, 0])
def test_sampled_tokens_are_mlx_lms(
    tiny: Path, few: int, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "FEW", few)
    options = {"temp": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01}
    mx.random.seed(5)
    reference = generate_step(
        mx.array(PROMPT),
        load_model(tiny)[0],
        max_tokens=30,
        sampler=make_sampler(**options),
        logits_processors=make_logits_processors(repetition_penalty=1.3),
    )
    expected = [t for t, _ in reference]
    mx.random.seed(5)
    got, _, _ = tokens_of(
        load_streamed(tiny, slots=slots),
        max_tokens=30,
        sampler=make_sampler(**options),
        processors=make_logits_processors(repetition_penalty=1.3),
    )
    assert got == expected


@pytest.mark.parametrize("slots", [None, 0])
@pytest.mark.parametrize("end", ["length", "stop", "dropped"])
def test_the_cache_can_be_continued_from(tiny: Path, slots: int | None, end: str) -> None:
    model = load_streamed(tiny, slots=slots)
    full, _, _ = tokens_of(model, max_tokens=30)
    timing, cache = Timing(), make_prompt_cache(model)
    stop = frozenset(full[9:10]) if end == "stop" else frozenset()
    got: list[int] = []
    for step in generate(model, PROMPT, cache, max_tokens=10, stop=stop, timing=timing):
        got.append(step.token)
        if end == "dropped" and len(got) == 6:
            break
    assert got == full[: len(got)]
    known = PROMPT + got
    assert timing.cached <= len(known)
    rest = known[timing.cached :] or None
    if rest is None:  # the cache holds the last token too: its successor is the next
        return
    more = [s.token for s in generate(model, rest, cache, max_tokens=5)]
    assert more == full[len(got) : len(got) + 5]


def test_prompts_go_in_chunks(tiny: Path) -> None:
    model = load_streamed(tiny, slots=0)
    seen: list[tuple[int, int]] = []
    chunk = model.streamer.budget.chunk
    prompt = PROMPT * 4
    steps = generate(
        model,
        prompt,
        make_prompt_cache(model),
        max_tokens=1,
        on_prompt=lambda done, total: seen.append((done, total)),
    )
    assert len(list(steps)) == 1
    done = [d for d, _ in seen]
    assert done[0] == 0 and done[-1] == len(prompt)
    assert max(b - a for a, b in itertools.pairwise(done)) <= chunk < len(prompt)


def test_a_prompts_layers_are_told_of_and_may_be_the_last(tiny: Path) -> None:
    """What on_prompt raises within a pass leaves a model that gives the same tokens."""
    model = load_streamed(tiny, slots=20)
    want = tokens_of(model, max_tokens=5)[0]
    layers, seen = sum(len(run.layers) for run in model.streamer.executors), list[int]()

    class Enough(Exception):
        pass

    def on_prompt(done: int, total: int) -> None:
        assert total == len(PROMPT)
        seen.append(done)
        if len(seen) == 1 + layers // 2:
            raise Enough

    with pytest.raises(Enough):
        tokens_of(model, max_tokens=5, on_prompt=on_prompt)
    assert seen == sorted(seen) and seen[0] == 0 < seen[-1] < len(PROMPT)
    held = sum(run.pool.resident.sum() for run in model.streamer.executors)
    assert held > 0 and all(run.after is None for run in model.streamer.executors)
    assert tokens_of(model, max_tokens=5)[0] == want


@pytest.mark.parametrize("slots", [None, 80])
@pytest.mark.parametrize("executor", ["layerwise", "lookahead", "rehearse"])
def test_caches_grow_one_by_one(slots: int | None, executor: Any) -> None:
    model = load_streamed(DEMO, slots=slots, executor=executor, dtype="float32")
    cache = make_prompt_cache(model)
    took: list[int] = []  # bytes of each step
    before = 0
    for _ in generate(model, [7, 3, 200, 5, 9, 11] * 341, cache, max_tokens=14):
        took.append(mx.get_peak_memory() - before)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
    grown = [c.keys for c in cache if isinstance(c, KVCache)]
    assert len(grown) == 2 and {keys.shape[2] for keys in grown} == {9 * 256}
    assert max(took[1:]) < took[2] + 2.5 * grown[0].nbytes  # 4 arrays grow


def test_mlx_lm_generates_with_a_loaded_model(tiny: Path) -> None:
    model, tokenizer = load(tiny, memory="30%", context=128)
    reference, _ = mlx_lm.load(str(tiny))
    options = {"prompt": "abc def", "max_tokens": 12}
    assert mlx_lm.generate(model, tokenizer, **options) == mlx_lm.generate(
        reference, tokenizer, **options
    )
    assert model.streamer.counters.misses > 0
