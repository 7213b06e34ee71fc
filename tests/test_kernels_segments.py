"""Layers in a row as one operation: the bits of layers one by one, and no array written twice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache
from mlx_lm.utils import load_model

from kernels import backend, fast, plans, segments
from mtp.hidden import take, watch
from mtp.rollback import Tape

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")

PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    fast.install()
    path = make_tiny("qwen3_5_moe", tmp_path / "tiny", quantization={"bits": 4, "group_size": 32})
    made = load_model(path)[0]
    made.eval()
    yield made


def text(model: Any) -> Any:
    return model.language_model


def decoded(model: Any, cache: list[Any], first: int, count: int) -> list[mx.array]:
    """Logits of `count` greedy steps, the next queued before the last is looked at."""
    out, token = [], mx.array([[first]])
    for _ in range(count):
        logits = model(token, cache=cache)
        token = logits[:, -1].argmax(axis=-1)[None]
        mx.async_eval(token)
        out.append(logits)
    return out


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_plan", lambda *_: None)


def prompted(model: Any) -> list[Any]:
    cache = make_prompt_cache(model)
    model(PROMPT, cache=cache)
    mx.eval([c.state for c in cache])
    return cache


def arrays_of(cache: list[Any]) -> list[mx.array]:
    held = []
    for one in cache:
        held += one.cache if isinstance(one, ArraysCache) else one.keys_and_values()
    return held


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(bool(mx.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.smoke
def test_a_step_is_one_operation(model: Any) -> None:
    cache = prompted(model)
    plan = plans._plan(text(model), cache)
    assert plan is not None and plan.embed is None and plan.last is None
    assert len(plan.runs) == 1 and isinstance(plan.runs[0], segments.Row)
    assert plans._plan(text(model), cache) is plan


@pytest.mark.smoke
def test_steps_have_the_bits_of_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, own = prompted(model), prompted(model)
    ours = decoded(model, cache, 7, 12)
    apart(monkeypatch)
    assert same(ours, decoded(model, own, 7, 12))
    assert same(arrays_of(cache), arrays_of(own))
    assert [c.offset for c in cache if isinstance(c, KVCache)] == [20] * sum(
        isinstance(c, KVCache) for c in cache
    )


def test_from_nothing_and_past_a_growth(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "step", 8)
    cache, own = make_prompt_cache(model), make_prompt_cache(model)
    ours = decoded(model, cache, 7, 21)
    apart(monkeypatch)
    assert same(ours, decoded(model, own, 7, 21))
    assert same(arrays_of(cache), arrays_of(own))


TEXT = [int(t) for t in np.random.default_rng(5).integers(0, 300, 64)]
PASSES = [(2, 1), (2, 2), (1, 1), (5, 3), (8, 8), (8, 1), (3, 2), (4, 4)]  # rows, of them kept


def stepped(model: Any, cache: list[Any], tokens: list[int]) -> list[mx.array]:
    return [model(mx.array([[t]]), cache=cache)[0, 0] for t in tokens]


def verified(
    model: Any, cache: list[Any], taped: Callable[..., Any], lazy: bool
) -> tuple[list[mx.array], int]:
    """Logits of the rows kept of each pass, other tokens after them, and how many there were."""
    out, at = [], 0
    for rows, kept in PASSES:
        block = TEXT[at : at + kept] + [9] * (rows - kept)
        tokens = mx.array([block])
        tokens = tokens + 0 if lazy else tokens  # what is not there is left to MLX's graph
        with taped(model, cache, tokens) as tape:
            logits = model(tokens, cache=cache)
        tape.rollback(kept)
        out += [logits[0, i] for i in range(kept)]
        at += kept
    return out, at


@pytest.mark.smoke
@pytest.mark.parametrize("lazy", [False, True])
def test_rows_have_the_bits_of_steps_and_can_be_taken_back(
    model: Any, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "step", 16)
    cache, own, layers = prompted(model), prompted(model), prompted(model)
    ran = ran_in_segments(monkeypatch)
    ours, count = verified(model, cache, Tape, lazy)
    assert ran == [rows for rows, _ in PASSES]
    steps = stepped(model, own, TEXT[:count])
    assert same(ours, steps) and same(arrays_of(cache), arrays_of(own))
    assert same(stepped(model, cache, [5, 6]), stepped(model, own, [5, 6]))
    apart(monkeypatch)
    assert same(ours, verified(model, layers, Tape, lazy)[0])


def ran_in_segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each taped pass of a segment from now on."""
    ran: list[int] = []
    note = segments.Tape.note

    def noted(self: Any, row: Any, cache: Any, states: Any, tape: Any, rows: int) -> None:
        ran.append(rows)
        note(self, row, cache, states, tape, rows)

    monkeypatch.setattr(segments.Tape, "note", noted)
    return ran


def test_a_cut_cache_goes_on_where_it_lies(model: Any) -> None:
    cache = prompted(model)
    stepped(model, cache, [1])
    tokens = mx.array([[2, 3, 4]])
    with Tape(model, cache, tokens) as tape:
        model(tokens, cache=cache)
    tape.rollback(1)
    one = next(c for c in cache if isinstance(c, KVCache))
    assert segments._appended(one).goes_on(one.keys, one.values, one.offset)
    with Tape(model, cache, tokens) as tape:
        model(tokens, cache=cache)
    one.trim(1)  # by somebody else: who may have looked at what is written over
    assert not segments._appended(one).goes_on(one.keys, one.values, one.offset)


def test_other_caches_between_segments_are_taken_back_too(model: Any) -> None:
    class Other(KVCache):
        pass

    def mixed() -> list[Any]:
        made = [Other() if isinstance(c, KVCache) else c for c in make_prompt_cache(model)]
        model(PROMPT, cache=made)
        return made

    cache, own = mixed(), mixed()
    ours, count = verified(model, cache, Tape, False)
    assert same(ours, stepped(model, own, TEXT[:count]))
    assert same(arrays_of(cache), arrays_of(own))


def test_a_tape_of_another_thread_is_left_alone(model: Any) -> None:
    cache, own, mine = prompted(model), prompted(model), prompted(model)
    want = stepped(model, own, [7])
    tokens, got = mx.array([[7, 8]]), []

    def other() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            got.extend(stepped(model, mine, [7]))
            mx.eval(got)

    with Tape(model, cache, tokens) as tape:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        model(tokens, cache=cache)
    tape.rollback(1)
    assert same(got, want) and same(arrays_of(cache), arrays_of(own))


def test_tapes_that_do_not_fit_are_refused(model: Any) -> None:
    cache = prompted(model)
    plan = plans._plan(text(model), cache)
    assert plan is not None
    row: Any = plan.runs[0]
    states, offset, fresh = row.states((1, 2), cache)
    out = row.op(inputs := [mx.array([[3, 4]])], states, offset, fresh, True)
    tape, before = out[1], [s for i, s in enumerate(states) if s.ndim == 3 or not fresh[i]]
    linear = [s for j, (_, is_linear) in enumerate(row._layers) if is_linear
              for s in states[2 * j : 2 * j + 2]]  # fmt: skip
    assert len(before) and row.op.rewind(linear, tape, 2, 1)
    with pytest.raises(ValueError, match="cannot be kept"):
        row.op.rewind(linear, tape, 2, 3)
    with pytest.raises(ValueError, match="not this tape"):
        row.op.rewind(linear, tape, 3, 1)
    with pytest.raises(ValueError, match="states are missing"):
        row.op.rewind(linear[1:], tape, 2, 1)
    with pytest.raises(ValueError, match="one sequence"):
        row.op([mx.array([[3], [4]])], states, offset, fresh, True)
    assert inputs


def test_rows_of_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = mx.array([[3], [5]])
    cache, own = make_prompt_cache(model), make_prompt_cache(model)
    ours = [model(tokens, cache=cache), model(tokens + 1, cache=cache)]
    apart(monkeypatch)
    assert same(ours, [model(tokens, cache=own), model(tokens + 1, cache=own)])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("evaluated", [False, True])
def test_copies_of_a_cache_go_their_own_ways(
    model: Any, copied: Any, evaluated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = prompted(model)
    decoded(model, cache, 7, 3)
    other = [copied(c) for c in cache]
    for mine, its in zip(cache, other, strict=True):
        if isinstance(mine, ArraysCache):
            its.cache = list(mine.cache)
    if evaluated:
        mx.eval([c.state for c in cache])
    before = [mx.array(a) + 0 for a in arrays_of(other)]
    if evaluated:
        mx.eval(before)
    ours = [decoded(model, cache, 1, 2), decoded(model, other, 2, 2)]
    ours[0] += decoded(model, cache, 3, 2)
    ours[1] += decoded(model, other, 4, 2)
    apart(monkeypatch)
    for logits, first, second in zip(ours, (1, 2), (3, 4), strict=True):
        own = prompted(model)
        decoded(model, own, 7, 3)
        assert same(logits, decoded(model, own, first, 2) + decoded(model, own, second, 2))


def test_what_was_taken_back_is_not_written_over(model: Any) -> None:
    cache = prompted(model)
    decoded(model, cache, 7, 3)
    attention = [c for c in cache if isinstance(c, KVCache)]
    held = [(c.keys, c.values) for c in attention]  # lazy readers of the rows to be dropped
    lazy = [keys + 0 for keys, _ in held]
    want = [mx.array(keys.tolist()) for keys, _ in held]
    for c in attention:
        c.trim(2)
    decoded(model, cache, 30, 2)
    assert same(lazy, want)
    assert same([keys for keys, _ in held], want)


def test_layers_and_rows_in_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, own = prompted(model), prompted(model)
    ours = []
    for token in (5, 6, 7):
        ours += decoded(model, cache, token, 2)
        ours.append(model(mx.array([[token, 8, 9]]), cache=cache))
    apart(monkeypatch)
    theirs = []
    for token in (5, 6, 7):
        theirs += decoded(model, own, token, 2)
        theirs.append(model(mx.array([[token, 8, 9]]), cache=own))
    assert same(ours, theirs)


def test_a_watched_norm_sees_the_hidden_state(model: Any) -> None:
    cache, own = prompted(model), prompted(model)
    want = decoded(model, own, 7, 2)
    inner = text(model).model
    watch(inner.norm)
    assert same(decoded(model, cache, 7, 2), want)
    hidden = take(inner.norm, "post_norm")
    assert mx.array_equal(text(model).lm_head(hidden), want[-1])


def test_a_plan_is_made_again_when_a_part_changes(model: Any) -> None:
    cache = prompted(model)
    before = decoded(model, cache, 7, 1)[0]
    plan = plans._plan(text(model), cache)
    gate = text(model).model.layers[1].mlp.shared_expert_gate
    gate.weight = mx.array(gate.weight) + 0
    mx.eval(gate.weight)
    assert plans._plan(text(model), cache) is not plan
    layer = text(model).model.layers[0]
    layer.input_layernorm.weight = layer.input_layernorm.weight * 2.0
    assert plans._plan(text(model), cache) is None  # not yet evaluated: layer by layer
    changed = prompted(model)
    after = decoded(model, changed, 7, 1)[0]
    assert not mx.array_equal(before, after)
    assert plans._plan(text(model), changed) is not None
    layer.input_layernorm.weight = layer.input_layernorm.weight / 2.0
    again = decoded(model, prompted(model), 7, 1)[0]
    assert mx.array_equal(again, before)


def test_other_caches_run_between_segments(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(KVCache):
        pass

    def mixed() -> list[Any]:
        return [Other() if isinstance(c, KVCache) else c for c in make_prompt_cache(model)]

    cache, own = mixed(), mixed()
    ours = decoded(model, cache, 7, 4)
    plan = plans._plan(text(model), cache)
    assert plan is not None and any(not isinstance(run, segments.Row) for run in plan.runs)
    apart(monkeypatch)
    assert same(ours, decoded(model, own, 7, 4))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_of_an_embedding(model: Any, dtype: mx.Dtype) -> None:
    native = backend.native()
    assert native is not None
    w, scales, biases = mx.quantize(mx.random.normal((50, 64)), 32, 5)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    mx.eval(w, scales, biases)
    op = native.Segment(64, [], embedding=([(w, scales, biases)], 32, 5, "affine"))
    want = mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), 32, 5)
    tokens = mx.array([[7, 0, 49]], dtype=mx.uint32)
    assert mx.array_equal(op([tokens], [], 0, [])[0], want[tokens])
    assert mx.array_equal(op.now([tokens], [], 0, [])[0], want[tokens])


def test_what_does_not_fit_is_refused(model: Any) -> None:
    cache = prompted(model)
    plan = plans._plan(text(model), cache)
    assert plan is not None
    row: Any = plan.runs[0]
    with pytest.raises(ValueError, match="tokens"):
        row.op([mx.zeros((1, 1))], [], 0, [])
    with pytest.raises(ValueError, match="states are missing"):
        row.op([mx.zeros((1, 1), dtype=mx.int32)], [], 0, [])
    native = backend.native()
    assert native is not None
    parts = plans.parts_of_layer(text(model).model.layers[0], ArraysCache)
    with pytest.raises(TypeError):
        native.Segment(64, [None])
    with pytest.raises(ValueError, match="differ in width"):
        native.Segment(7, list(parts or ())[:2])


def test_unchanged_sees_every_change() -> None:
    native = backend.native()
    assert native is not None
    inner, outer = nn.Linear(4, 4), {"a": [1, 2]}
    seen = native.Unchanged([inner, outer, outer["a"]])
    assert seen.holds()
    outer["a"][1] = 3
    assert not seen.holds()
    outer["a"][1] = 2
    assert seen.holds()
    weight = inner["weight"]
    inner["weight"] = weight + 0
    assert not seen.holds()
    inner["weight"] = weight
    assert seen.holds()
    inner["more"] = weight
    assert not seen.holds()
    del inner["more"]
    inner.__class__ = type("Other", (nn.Linear,), {})
    assert not seen.holds()
