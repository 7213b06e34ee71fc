"""Taking rows back leaves every cache of mlx-lm's as if they had never run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import DENSE, FAMILIES, METAL_ONLY, make_tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.models.gated_delta import gated_delta_update
from mlx_lm.models.ssm import ssm_update
from mlx_lm.utils import load_model

from mtp import rollback
from mtp.rollback import RollbackError, Tape, leaves, obstacle

TOKENS = np.random.default_rng(0).integers(0, 320, 90).tolist()
PASSES = [(4, 2), (5, 1), (3, 3), (4, 1), (5, 4), (9, 6)]  # rows, kept
# one row goes another way through these (MLA, a rotated window, sparse attention): other rounding
ROUNDED = {
    *("afmoe", "bailing_hybrid", "bailing_moe_v3", "deepseek_v3", "deepseek_v32", "exaone_moe"),
    *("gemma4", "gemma4_text", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "kimi_k25", "kimi_k3"),
    *("kimi_linear", "kimi_vl", "laguna", "longcat_flash", "longcat_flash_ngram", "mellum"),
    *("mimo_v2_flash", "minimax_m3_vl", "mistral3", "mistral4", "step3p5"),
}
NO_ROLLBACK = {"deepseek_v41"}
SMOKE = {"qwen3_5_moe", "gpt_oss"}


def arrays(cache: Any) -> Iterator[mx.array]:
    """What a cache holds, without the spare rows at its end."""
    if isinstance(cache, CacheList):
        for one in cache.caches:
            yield from arrays(one)
    elif hasattr(cache, "keys_and_values"):
        if cache.keys is not None:
            flat: Any = tree_flatten(list(cache.keys_and_values()))
            yield from (array for _, array in flat)
    else:
        yield from (a for a in cache.cache if a is not None)


def families() -> list[Any]:
    metal = pytest.mark.skipif(not mx.metal.is_available(), reason="runs on Metal only")
    marks = {f: [metal] if f in METAL_ONLY else [] for f in [*FAMILIES, *sorted(DENSE)]}
    return [
        pytest.param(f, marks=[*m, *([pytest.mark.smoke] if f in SMOKE else [])])
        for f, m in marks.items()
        if f not in NO_ROLLBACK
    ]


@pytest.mark.parametrize("family", families())
def test_as_if_the_rows_had_never_run(family: str, tmp_path: Path) -> None:
    model = load_model(make_tiny(family, tmp_path))[0]
    assert obstacle(model) is None
    for prompt in (5, 40):  # 40 rows fill the sliding windows
        single, several = make_prompt_cache(model), make_prompt_cache(model)
        for cache in (single, several):
            model(mx.array([TOKENS[:prompt]]), cache=cache)
        at = prompt
        for rows, kept in PASSES:
            true = TOKENS[at : at + kept]
            tokens = mx.array([true + [7] * (rows - kept)])
            with Tape(model, several, tokens) as tape:
                verified = model(tokens, cache=several)[:, :kept]
            tape.rollback(kept)
            decoded = [model(mx.array([[t]]), cache=single) for t in true]
            assert_same(verified, mx.concatenate(decoded, axis=1), exact=family not in ROUNDED)
            at += kept
        after = [model(mx.array([TOKENS[at : at + 1]]), cache=c) for c in (several, single)]
        assert_same(*after, exact=family not in ROUNDED)
        held = [list(itertools.chain.from_iterable(map(arrays, c))) for c in (several, single)]
        for a, b in zip(*held, strict=True):
            if family not in ROUNDED:  # in time order on one side, rotated on the other
                assert mx.array_equal(a, b)


def assert_same(a: mx.array, b: mx.array, *, exact: bool) -> None:
    if exact:
        assert mx.array_equal(a, b), f"off by {mx.abs(a - b).max().item()}"
    else:
        assert mx.allclose(a, b, atol=2e-5, rtol=1e-4), f"off by {mx.abs(a - b).max().item()}"


class Mixer(nn.Module):
    """One recurrent layer whose inputs are the tokens themselves."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv1d(24, 24, 4, groups=24)
        self.table = mx.random.normal((50, 24))

    def make_cache(self) -> list[Any]:
        return [ArraysCache(size=2)]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        x, state = self.table[tokens], cache[0]
        before = mx.zeros((1, 3, 24)) if state[0] is None else state[0]
        full = mx.concatenate([before, x], axis=1)
        state[0] = full[:, -3:]
        rows = self.conv(full)
        if self.kind == "delta":
            q, k = rows[..., None, :8], rows[..., None, 8:16]
            v = rows[..., None, 16:]
            a, b = rows[..., :1], rows[..., 1:2]
            y, state[1] = gated_delta_update(q, k, v, a, b, mx.ones(1), mx.ones(1), state[1])
        else:
            h = rows[..., :16].reshape(1, -1, 2, 8)
            b, c = rows[..., None, 16:20], rows[..., None, 20:]
            a_log, d, dt = mx.zeros(2), mx.ones(2), rows[..., :2]
            y, state[1] = ssm_update(h, a_log, b, c, d, dt, mx.ones(2), state[1])
        return y


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["delta", "mamba"])
@pytest.mark.parametrize("kept", [1, 2, 5, 8, 9])
def test_replayed_states_are_those_of_decoding_bit_for_bit(kind: str, kept: int) -> None:
    mx.random.seed(3)
    model = Mixer(kind)
    one, many = model.make_cache(), model.make_cache()
    outputs = [model(mx.array([[t]]), one) for t in [4, 5, 6, *range(10, 10 + kept)]]
    for t in (4, 5, 6):
        model(mx.array([[t]]), many)
    tokens = mx.array([list(range(10, 19))])
    with Tape(model, many, tokens) as tape:
        got = model(tokens, many)
    tape.rollback(kept)
    assert mx.array_equal(got[:, :kept], mx.concatenate(outputs[3:], axis=1))
    for a, b in zip(one[0].cache, many[0].cache, strict=True):
        assert mx.array_equal(a, b)


def filled(cache: Any, rows: int) -> Any:
    mx.random.seed(1)
    for _ in range(rows):
        cache.update_and_fetch(*mx.random.normal((2, 1, 2, 1, 64)))
    return cache


@pytest.mark.parametrize(
    "make",
    [
        KVCache,
        ConcatenateKVCache,
        QuantizedKVCache,
        lambda: ChunkedKVCache(16),
        lambda: RotatingKVCache(max_size=16),
        lambda: RotatingKVCache(max_size=16, keep=4),
        lambda: CacheList(KVCache(), RotatingKVCache(max_size=16)),
    ],
)
@pytest.mark.parametrize("rows", [0, 3, 14, 15, 16, 17, 40, 255, 256])
@pytest.mark.parametrize("kept", [1, 3])
def test_every_cache_of_keys_and_values(make: Callable[[], Any], rows: int, kept: int) -> None:
    new = mx.random.normal((2, 1, 2, 6, 64), key=mx.random.key(5))
    one, many = make(), make()
    for a, b in zip(leaves([one]), leaves([many]), strict=True):
        filled(a, rows)
        filled(b, rows)
        if isinstance(b, ChunkedKVCache):
            a.maybe_trim_front()
            b.maybe_trim_front()
    tape = Tape(nn.Module(), [many], mx.zeros((1, 6), dtype=mx.int32))
    with tape:
        for b in leaves([many]):
            b.update_and_fetch(*new)
    tape.rollback(kept)
    for a, b in zip(leaves([one]), leaves([many]), strict=True):
        for i in range(kept):
            a.update_and_fetch(*new[..., i : i + 1, :])
        # and one more, which turns a window in place
        for cache in (a, b):
            cache.update_and_fetch(*mx.ones((2, 1, 2, 1, 64)))
        assert a.offset == b.offset
        assert held(a) == held(b)


def held(cache: Any) -> set[bytes]:
    """The rows that attention sees, in any order."""
    flat: Any = tree_flatten(list(cache.keys_and_values()))
    out = set()
    for name, array in flat:
        for row in np.array(array)[0, 0]:
            out.add(name.encode() + row.tobytes())
    return out


def test_a_state_of_another_kind_is_found_up_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_tiny("deepseek_v41", tmp_path / "a"))[0]
    assert obstacle(model) == "mlx-lm's LayerCache cannot be cut back"
    # as if mlx-lm renamed its update
    monkeypatch.setattr(rollback, "FUNCTIONS", {})
    rollback._updates_of.cache_clear()
    model = load_model(make_tiny("qwen3_5_moe", tmp_path / "b"))[0]
    assert obstacle(model) == "the model keeps a state that is updated in an unknown way"
    rollback._updates_of.cache_clear()


@pytest.mark.smoke
def test_mlx_lm_is_left_as_it_was() -> None:
    model = Mixer("delta")
    before = nn.Conv1d.__call__, gated_delta_update
    cache = model.make_cache()
    with pytest.raises(RuntimeError), Tape(model, cache, mx.zeros((1, 2), dtype=mx.int32)):
        assert nn.Conv1d.__call__ is not before[0]
        raise RuntimeError
    assert (nn.Conv1d.__call__, gated_delta_update) == before
    assert type(cache[0]) is ArraysCache
    with Tape(model, cache, mx.array([[1, 2]])) as tape:  # not left locked
        model(mx.array([[1, 2]]), cache)
    tape.check()


def test_a_tape_without_its_update_says_so() -> None:
    cache = [ArraysCache(size=1)]
    with Tape(nn.Module(), cache, mx.array([[1, 2]])) as tape:
        cache[0][0] = mx.zeros((1, 4, 4))
    with pytest.raises(RollbackError):
        tape.rollback(1)
