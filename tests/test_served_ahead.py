"""Served passes that look ahead give the bits of passes that do not, and leave no slot behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache
from test_chain import PROMPT, ROWS, ask, passes, same

from cache.make import make_cache
from kernels import backend
from streamer.disk import Disk
from streamer.errors import StreamerError
from streamer.foresee import NEXT, REHEARSAL, Foresight
from streamer.loading import load_streamed
from streamer.ways import Effort, Pace

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")

SLOW = Disk.parse("40MB/s@3ms")  # nothing of a read is there for 3 ms, time for all layers


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait is rehearsed in for as long as it lasts, and what is named is read."""
    monkeypatch.setattr(Pace, "each", property(lambda _: 1.0))
    monkeypatch.setattr(Pace, "left", lambda *_: 1.0)
    monkeypatch.setattr(Effort, "worth", lambda *_: True)
    monkeypatch.setattr(Foresight, "_least", lambda _: 0.0)


class Pools:
    """Looks after each pass whether every slot is where it should be.

    Those that guesses about the next pass hold are asked back now and then.
    """

    def __init__(self, model: Any):
        self._runs = model.streamer.executors
        self._passes = self.held = 0

    def passed(self) -> None:
        self._passes += 1
        for run in self._runs:
            pool = run.pool
            run.ahead.drop(wait=True)  # where Python guessed
            if self._passes % 3 == 0:
                run.regain()
            held = np.concatenate([table[table >= 0] for table in pool.slot_of])
            known = [*held.tolist(), *pool.free]
            assert len(set(known)) == len(known)
            self.held += pool.slots - len(known)
            if run.holder is None:
                assert sorted(known) == list(range(pool.slots))
            experts = np.flatnonzero(np.concatenate(pool.slot_of) >= 0)
            assert np.array_equal(pool._held[held], experts)
            assert pool.resident.tolist() == [int((t >= 0).sum()) for t in pool.slot_of]


@pytest.mark.smoke
@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("slots", [12, 24, 40, 60])
def test_bits_are_those_of_the_model_in_memory(tiny_qwen: Path, slots: int, taped: bool) -> None:
    whole = load_streamed(tiny_qwen)
    model = load_streamed(tiny_qwen, slots=slots, executor="lookahead", disk=SLOW)
    rows = ROWS * 2 if taped else [1] * 16
    pools = Pools(model)
    got = passes(model, make_prompt_cache(model), rows, taped, pools)  # type: ignore[arg-type]
    assert same(got, passes(whole, make_prompt_cache(whole), rows, taped))
    counters = model.streamer.counters
    tally, ahead = (counters.sources[kind] for kind in (REHEARSAL, NEXT))
    assert counters.rehearsals and counters.prefetched == tally.read + ahead.read
    assert counters.prefetch_used == tally.used + ahead.used
    for one in (tally, ahead):
        assert one.read <= one.named and one.used <= one.right <= one.misses <= counters.misses
    if slots > 12:  # else what layers need leaves no room
        assert tally.used
    for m in (model, whole):
        m.streamer.close()


def greedy(model: Any, count: int, pools: Pools | None = None) -> list[int]:
    cache, out = make_prompt_cache(model), []
    prompt = PROMPT * (240 // len(PROMPT))  # so that the caches' first step, of 256, ends within
    token = int(mx.argmax(model(mx.array([prompt]), cache=cache)[0, -1]).item())
    for _ in range(count):
        out.append(token)
        token = int(mx.argmax(model(mx.array([[token]]), cache=cache)[0, -1]).item())
        if pools is not None:
            pools.passed()
    return out


@pytest.mark.parametrize("slots", [16, 24, 40])
def test_reads_for_the_next_pass_are_used(tiny_qwen: Path, slots: int) -> None:
    whole = load_streamed(tiny_qwen)
    model = load_streamed(tiny_qwen, slots=slots, executor="lookahead", disk=SLOW)
    pools = Pools(model)
    assert greedy(model, 40, pools) == greedy(whole, 40)
    tally = model.streamer.counters.sources[NEXT]
    assert pools.held and 0 < tally.used <= tally.right <= tally.named
    for m in (model, whole):
        m.streamer.close()


@pytest.mark.parametrize("seed", range(4))
def test_all_ways_of_a_pass_take_turns(
    tiny_qwen: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served looking ahead or not, asked for, a prompt's, by a session of two; slots come back."""
    chance = np.random.default_rng(seed)
    monkeypatch.setattr(Effort, "worth", lambda *_: bool(chance.random() < 0.7))
    disk = Disk.parse(["40MB/s@3ms", "60MB/s", "400MB/s", "20MB/s@1ms"][seed])
    whole = load_streamed(tiny_qwen)
    model = load_streamed(tiny_qwen, slots=[16, 24, 32, 48][seed], executor="lookahead", disk=disk)
    pools, runs = Pools(model), model.streamer.executors
    begin = [run.serving.begin for run in runs]
    caches = [(make_prompt_cache(model), make_prompt_cache(whole)) for _ in range(2)]
    for _ in range(60):
        ours, theirs = caches[int(chance.random() < 0.2)]
        rows = int(chance.choice([1, 1, 1, 1, 1, 2, 3, 30]))
        tokens = mx.array(chance.integers(0, 12, rows)[None])
        asked = chance.random() < 0.2
        for run, own in zip(runs, begin, strict=True):
            run.serving.begin = (lambda: None) if asked else own  # type: ignore[method-assign]
        got, want = model(tokens, cache=ours), whole(tokens, cache=theirs)
        assert mx.array_equal(got, want)
        for run in runs:
            run.settle()
        pools.passed()
    assert model.streamer.counters.prefetch_used
    for m in (model, whole):
        m.streamer.close()


@pytest.mark.parametrize("served", [True, False])
def test_two_pools(tmp_path: Path, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of two formats, each other's waits being rehearsed in."""
    wide = {"bits": 8, "group_size": 32}
    layers = {f"*.layers.{i}.mlp.switch_mlp.*": wide for i in (1, 3)}
    formats = {"bits": 4, "group_size": 32, "layers": layers}
    path = make_tiny("qwen3_5_moe", tmp_path / "model", quantization=formats)
    if not served:
        monkeypatch.setenv("STREAMER_SERVING", "python")
    whole = load_streamed(path)
    model = load_streamed(path, slots=40, executor="lookahead", disk=SLOW)
    pools, (first, second) = Pools(model), model.streamer.executors
    begin = second.serving.begin
    cache, other = make_prompt_cache(model), make_prompt_cache(whole)
    for i in range(30):
        tokens = mx.array([[(7 * i) % 12] * (9 if i % 10 == 9 else 1)])
        refuses = i % 4 == 3
        second.serving.begin = (lambda: None) if refuses else begin  # type: ignore[method-assign]
        assert mx.array_equal(model(tokens, cache=cache), whole(tokens, cache=other))
        for run in (first, second):
            run.settle()
        pools.passed()
    assert model.streamer.counters.rehearsals
    for m in (model, whole):
        m.streamer.close()


def test_what_came_between_passes_is_not_read_again(tiny_qwen: Path) -> None:
    model = load_streamed(tiny_qwen, slots=24, executor="lookahead", disk=SLOW)
    (run,) = model.streamer.executors

    def came() -> None:
        run.pool.place(0, 5, next(iter(run.pool.take(1))))

    run.holder = SimpleNamespace(wait=came)
    run.prefetch(0, [4, 5, 6], 1, room=8)  # absent when they were named
    assert run.ahead.held == 2
    for reading in run._readings:
        reading.wait()
    run.arrived()
    Pools(model).passed()
    model.streamer.close()


def test_compressed_caches_keep_their_bits(tiny_qwen: Path) -> None:
    whole = load_streamed(tiny_qwen)
    model = load_streamed(tiny_qwen, slots=24, executor="lookahead", disk=SLOW)
    got, want = (passes(m, make_cache(m, 4, 4), ROWS, False) for m in (model, whole))
    assert same(got, want)
    for one in (model, whole):
        one.streamer.close()


def test_it_names_what_the_reference_names(tiny_qwen: Path) -> None:
    """One pass over the same pool; the waits are long enough for all layers in both."""
    tallies = []
    for served in (True, False):
        model = load_streamed(tiny_qwen, slots=24, executor="lookahead", disk=SLOW)
        cache, counters = make_prompt_cache(model), model.streamer.counters
        model(mx.array([PROMPT]), cache=cache)
        mx.eval(model(mx.array([[3]]), cache=cache))  # the first is not looked ahead in
        for run in model.streamer.executors:
            run.ahead.drop(wait=True)
        before = counters.misses, counters.syncs
        if not served:
            ask(model, at_each=False)
        mx.eval(model(mx.array([[9]]), cache=cache))
        tally = counters.sources[REHEARSAL]
        assert (counters.syncs == before[1]) == served
        tallies.append((counters.misses - before[0], tally.named, tally.right))
        assert 0 < tally.read <= tally.named  # the reference reads all at once
        model.streamer.close()
    assert tallies[0] == tallies[1] and tallies[0][2]


def test_what_is_not_trusted_is_named_and_not_read(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Foresight, "_least", lambda _: 1.1)
    model = load_streamed(tiny_qwen, slots=24, executor="lookahead", disk=SLOW)
    passes(model, make_prompt_cache(model), [1] * 6, False)
    tally = model.streamer.counters.sources[REHEARSAL]
    assert tally.right and not tally.read and not model.streamer.counters.prefetched
    model.streamer.close()


def test_a_pass_ends_where_a_read_fails(tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny_qwen, path)
    model = load_streamed(path, slots=24, executor="lookahead", disk=SLOW)
    whole = load_streamed(tiny_qwen)
    cache, other = make_prompt_cache(model), make_prompt_cache(whole)
    for one, held in ((model, cache), (whole, other)):
        for block in (PROMPT, [3]):
            one(mx.array([block]), cache=held)
            mx.eval([c.state for c in held])
    file = next(path.glob("*.safetensors"))
    stored = file.read_bytes()
    file.write_bytes(stored[: len(stored) // 8])
    with pytest.raises(StreamerError, match="too short"):
        for token in (7, 8, 9):
            mx.eval(model(mx.array([[token]]), cache=cache))
    (run,) = model.streamer.executors
    assert not run.pool.resident.any() and len(run.pool.free) == run.pool.slots
    file.write_bytes(stored)
    cache, other = make_prompt_cache(model), make_prompt_cache(whole)
    want = passes(whole, other, ROWS, False)
    assert same(passes(model, cache, ROWS, False, Pools(model)), want)  # type: ignore[arg-type]
    for one in (model, whole):
        one.streamer.close()


def test_a_pass_that_breaks_off_leaves_nothing_being_read(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_streamed(tiny_qwen, slots=24, executor="lookahead", disk=SLOW)
    cache = make_prompt_cache(model)
    for block in (PROMPT, [3]):
        mx.eval(model(mx.array([block]), cache=cache))
    (run,) = model.streamer.executors
    native: Any = backend.native()
    go_on = native.go_on

    def breaks(*args: Any) -> Any:
        *rest, caches = args
        return go_on(*rest, [*caches[:-1], (caches[-1][0], 10**6)])

    monkeypatch.setattr(native, "go_on", breaks)
    with pytest.raises(ValueError, match="no such layer"):
        mx.eval(model(mx.array([[7]]), cache=cache))
    assert not run.pool.resident.any() and len(run.pool.free) == run.pool.slots
    monkeypatch.undo()
    mx.eval(model(mx.array([[7]]), cache=cache))
    Pools(model).passed()
    model.streamer.close()
