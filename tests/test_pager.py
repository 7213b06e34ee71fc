"""Experts of segments of layers, paged: the bits and the reads of layers one by one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kernels import backend, plans
from mtp.rollback import Tape
from streamer.engine import generate
from streamer.errors import StreamerError
from streamer.loading import load_streamed

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def paged(tiny_qwen: Path) -> Iterator[Any]:
    model = load_streamed(tiny_qwen, slots=16)
    yield model
    model.streamer.close()


def decode(model: Any, count: int = 12) -> tuple[list[int], list[mx.array]]:
    steps = list(generate(model, PROMPT, make_prompt_cache(model), max_tokens=count))
    return [s.token for s in steps], [s.logprobs for s in steps]


def plan_of(model: Any) -> Any:
    return plans._plan(model.language_model, make_prompt_cache(model))


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [4, 16, 50])
def test_bits_and_counters_are_those_of_layers(
    tiny_qwen: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, own, whole = (load_streamed(tiny_qwen, slots=n) for n in (slots, slots, None))
    assert plan_of(ours).paged and len(plan_of(ours).runs) == 1 and not plan_of(whole).paged
    tokens, logprobs = decode(ours)
    assert decode(whole)[0] == tokens
    monkeypatch.setattr(plans, "_plan", lambda *_: None)
    want_tokens, want = decode(own)
    assert tokens == want_tokens
    assert all(mx.array_equal(a, b) for a, b in zip(logprobs, want, strict=True))
    for name in ("hits", "misses", "bytes_wanted"):
        mine, theirs = ours.streamer.counters, own.streamer.counters
        assert getattr(mine, name) == getattr(theirs, name)
    for mine, theirs in zip(ours.streamer.executors, own.streamer.executors, strict=True):
        assert all((a == b).all() for a, b in zip(mine.uses, theirs.uses, strict=True))
        assert all(
            (a == b).all() for a, b in zip(mine.pool.slot_of, theirs.pool.slot_of, strict=True)
        )
    for model in (ours, own, whole):
        model.streamer.close()


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [12, 24, 50])
def test_rows_have_the_bits_and_reads_of_layers(
    tiny_qwen: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = mx.array([[4, 7, 4], [9, 9, 1], [2, 30, 31]])

    def run(model: Any) -> tuple[list[mx.array], list[Any]]:
        cache, out = make_prompt_cache(model), []
        model(mx.array([PROMPT]), cache=cache)
        for i in range(3):
            with Tape(model, cache, tokens[i : i + 1]) as tape:
                out.append(model(tokens[i : i + 1], cache=cache)[:, : i + 1])
            mx.eval(out)
            tape.rollback(i + 1)
        held = tree_flatten([c.state for c in cache])
        return out, [a for _, a in held if isinstance(a, mx.array)]

    ours, own = load_streamed(tiny_qwen, slots=slots), load_streamed(tiny_qwen, slots=slots)
    got, states = run(ours)
    assert plan_of(ours).takes(tokens[:1])
    monkeypatch.setattr(plans, "_plan", lambda *_: None)
    want, own_states = run(own)
    assert all(mx.array_equal(a, b) for a, b in zip(got + states, want + own_states, strict=True))
    for name in ("hits", "misses", "bytes_wanted"):
        assert getattr(ours.streamer.counters, name) == getattr(own.streamer.counters, name)
    ours.streamer.close()
    own.streamer.close()


def test_a_union_larger_than_the_pool_is_left_to_layers(tiny_qwen: Path) -> None:
    model, whole = load_streamed(tiny_qwen, slots=4), load_streamed(tiny_qwen, slots=None)
    tokens = mx.array([[4, 7, 30, 31]])
    got = [m(tokens, cache=make_prompt_cache(m)) for m in (model, whole)]
    assert mx.array_equal(*got)
    model.streamer.close()
    whole.streamer.close()


def test_a_slow_disk_is_waited_for(tiny_qwen: Path, paged: Any) -> None:
    from streamer.disk import Disk

    slow = load_streamed(tiny_qwen, slots=16, disk=Disk.parse("20MB/s@1ms"))
    assert decode(slow)[0] == decode(paged)[0]
    assert slow.streamer.counters.io_wait_seconds > 0
    slow.streamer.close()


def test_a_failed_read_is_an_error_and_no_token(tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny_qwen, path)
    model = load_streamed(path, slots=4)
    want = decode(model)[0]
    file = next(path.glob("*.safetensors"))
    stored = file.read_bytes()
    steps = generate(model, PROMPT, make_prompt_cache(model), max_tokens=12)
    next(steps)
    file.write_bytes(stored[: len(stored) // 8])
    with pytest.raises(StreamerError, match="too short"):
        list(steps)
    assert all((slots < 0).all() for slots in model.streamer.executors[0].pool.slot_of)
    file.write_bytes(stored)
    assert decode(model)[0] == want
    model.streamer.close()


def test_without_the_extensions_reads_layers_run_alone(
    tiny_qwen: Path, paged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMER_READS", "python")
    model = load_streamed(tiny_qwen, slots=16)
    assert plan_of(model) is None
    assert decode(model)[0] == decode(paged)[0]
    model.streamer.close()


def test_rows_of_a_batch_are_left_to_layers(paged: Any) -> None:
    cache = make_prompt_cache(paged)
    tokens = mx.array([[3], [5]])
    both = paged(tokens, cache=cache)
    for i in range(2):
        alone = paged(tokens[i : i + 1], cache=make_prompt_cache(paged))
        assert mx.array_equal(alone[0], both[i])
