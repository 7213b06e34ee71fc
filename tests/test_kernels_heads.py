"""A head's step as one operation: the bits of its layers one by one, in memory and paged."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import backend, fast, heads
from streamer.loading import load_streamed
from streamer.run import DEMO

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")


def drafts(model: Any, rows: list[int], trimmed: bool = True) -> list[mx.array]:
    """What calls over so many rows give, and the cache after them."""
    head, rng = model.streamer.opened.head, np.random.default_rng(3)
    width = head.units[0].join.weight.shape[0]
    cache, out = head.make_cache(), []
    for count in rows:
        hidden = mx.array(rng.standard_normal((1, count, width)).astype(np.float32))
        tokens = mx.array(rng.integers(0, 300, (1, count)))
        out += head(hidden, tokens, cache, last=True, leave="last")
        if trimmed and count == 3:
            cache[0].trim(1)
    return [*out, *cache[0].keys_and_values()]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    done: list[bool] = []
    step = heads.step

    def call(*args: Any) -> Any:
        found = step(*args)
        done.append(found is not None)
        return found

    monkeypatch.setattr(heads, "step", call)
    return done


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [None, 90])
@pytest.mark.parametrize("kind", ["post_norm", "pre_norm"])
def test_steps_have_the_bits_of_layers(
    slots: int | None, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_streamed(DEMO, slots=slots, mtp=True)
    model.streamer.opened.head.__dict__["hidden"] = kind
    calls, rows = counted(monkeypatch), [1, 2, 1, 3, 1, 16, 1]
    ours = drafts(model, rows)
    assert calls == [True] * len(rows)
    monkeypatch.setattr(heads, "step", lambda *_: None)
    theirs = drafts(model, rows)
    assert all(mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    model.streamer.close()


def test_what_does_not_fit_is_left_to_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_streamed(DEMO, slots=None, mtp=True)
    calls = counted(monkeypatch)
    drafts(model, [17, 40])
    head = model.streamer.opened.head
    cache = head.make_cache()
    states = mx.zeros((1, 2, head.units[0].join.weight.shape[0]))
    head(states, mx.array([[1, 2]]), cache)  # all rows are wanted: not asked for
    head(states.astype(mx.float16), mx.array([[1, 2]]), cache, leave="last")
    head.train()
    head(states, mx.array([[1, 2]]), cache, leave="last")
    head.eval()
    fast.uninstall()
    try:
        head(states, mx.array([[1, 2]]), cache, leave="last")
    finally:
        fast.install()
    assert calls == [False] * 5
    model.streamer.close()


def test_it_is_made_again_when_a_part_changes() -> None:
    model = load_streamed(DEMO, slots=None, mtp=True)
    before = drafts(model, [2])
    unit = model.streamer.opened.head.units[0]
    unit.norm.weight = unit.norm.weight * 2
    mx.eval(unit.norm.weight)
    after = drafts(model, [2])
    assert not mx.array_equal(before[0], after[0])
    assert mx.array_equal(before[2], after[2])
    model.streamer.close()
