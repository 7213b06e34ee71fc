"""A pass that is served, or goes on until a layer misses, gives and does what one asked at each
layer does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer

from cache.make import make_cache
from kernels import backend, plans
from mtp.rollback import Tape
from streamer.disk import Disk
from streamer.engine import generate
from streamer.errors import StreamerError
from streamer.fetching import Fetching
from streamer.loading import expert_count, load_streamed
from streamer.residency import Residency
from streamer.run import DEMO

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ROWS = [1, 3, 2, 1, 4, 1, 1, 2]  # of passes, of which the first half is kept


class Notes:
    """What a model was told, if it is watched, and where its experts lay after each pass."""

    def __init__(self, model: Any, watched: bool):
        self.choices: list[tuple[int, list[int], list[int]]] = []
        self.pools: list[list[int]] = []
        self._runs = model.streamer.executors
        model.streamer.watch = self if watched else None

    def passed(self) -> None:
        for run in self._runs:
            pool = run.pool
            self.pools += [table.tolist() for table in pool.slot_of]
            self.pools += [pool.resident.tolist(), list(pool.free), pool._held.tolist()]

    def step(self, kind: str, rows: int, seconds: float) -> None:
        pass

    def chose(self, layer: int, ids: np.ndarray, missed: Any) -> None:
        self.choices.append((layer, ids.reshape(-1).tolist(), list(missed)))


def ask(model: Any, at_each: bool) -> None:
    """No pass is served; at_each: the reference, where none goes on by itself either."""
    for run in model.streamer.executors:
        run.serving.begin = lambda: None
        if at_each:
            run.fetching.slots = lambda layer: None


def passes(
    model: Any, cache: Any, rows: list[int], taped: bool, notes: Notes | None = None
) -> list[mx.array]:
    """Logits of the rows kept; with a tape half of them are taken back."""
    out, at = [model(mx.array([PROMPT]), cache=cache)], 0
    tokens = np.random.default_rng(5).integers(0, 12, sum(rows))  # some come again
    for n in rows:
        block = mx.array(tokens[at : at + n][None])
        kept = (n + 1) // 2 if taped else n
        if taped:
            with Tape(model, cache, block) as tape:
                out.append(model(block, cache=cache)[:, :kept])
            mx.eval(out)
            tape.rollback(kept)
        else:
            out.append(model(block, cache=cache))
            mx.eval(out)
        if notes is not None:
            notes.passed()
        at += n
    return out


def same(ours: list[mx.array], theirs: list[mx.array]) -> bool:
    return all(bool(mx.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("slots", [12, 24, 40, 60])
def test_bits_reads_and_evictions_are_those_of_asking_at_each_layer(
    tiny_qwen: Path, slots: int, taped: bool, watched: bool, served: bool
) -> None:
    ours, own = load_streamed(tiny_qwen, slots=slots), load_streamed(tiny_qwen, slots=slots)
    ask(own, at_each=True)
    if not served:
        ask(ours, at_each=False)
    notes, own_notes = Notes(ours, watched), Notes(own, watched)
    rows = ROWS * 3 if taped else [1] * 24
    got = passes(ours, make_prompt_cache(ours), rows, taped, notes)
    assert same(got, passes(own, make_prompt_cache(own), rows, taped, own_notes))
    assert notes.choices == own_notes.choices and notes.pools == own_notes.pools
    mine, theirs = ours.streamer.counters, own.streamer.counters
    for name in ("hits", "misses", "bytes_wanted", "waits"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert mine.alone.nbytes == theirs.alone.nbytes and mine.alone.calls == theirs.alone.calls
    assert mine.misses and (mine.syncs < theirs.syncs or (slots < 40 and not served))
    for run, other in zip(ours.streamer.executors, own.streamer.executors, strict=True):
        assert np.array_equal(run.pool._heat, other.pool._heat)  # type: ignore[attr-defined]
        assert same([mx.array(u) for u in run.uses], [mx.array(u) for u in other.uses])
        assert run.fetching.rows == other.fetching.rows
    ours.streamer.close()
    own.streamer.close()


def test_what_serves_and_what_is_asked_take_turns(tiny_qwen: Path) -> None:
    ours, own = load_streamed(tiny_qwen, slots=24), load_streamed(tiny_qwen, slots=24)
    ask(own, at_each=True)
    caches = make_prompt_cache(ours), make_prompt_cache(own)
    begin = ours.streamer.executors[0].serving.begin
    for i in range(24):
        for run in ours.streamer.executors:
            run.serving.begin = begin if i % 3 else lambda: None  # type: ignore[method-assign]
        token = mx.array([[i * 7 % 40]])
        got, want = (m(token, cache=c) for m, c in zip((ours, own), caches, strict=True))
        assert mx.array_equal(got, want)
    assert ours.streamer.counters.misses == own.streamer.counters.misses
    ours.streamer.close()
    own.streamer.close()


def test_a_served_pass_never_stops(tiny_qwen: Path) -> None:
    model = load_streamed(tiny_qwen, slots=24)
    cache, counters = make_prompt_cache(model), model.streamer.counters
    model(mx.array([PROMPT]), cache=cache)
    before = counters.syncs
    for token in range(5, 25):
        mx.eval(model(mx.array([[token]]), cache=cache))
    assert counters.syncs == before and counters.waits
    model.streamer.close()


def test_a_pass_stops_only_where_a_layer_misses(tiny_qwen: Path) -> None:
    model = load_streamed(tiny_qwen, slots=24)
    ask(model, at_each=False)
    cache, counters = make_prompt_cache(model), model.streamer.counters
    model(mx.array([PROMPT]), cache=cache)
    for token in range(5, 25):
        before = counters.syncs - counters.waits
        mx.eval(model(mx.array([[token]]), cache=cache))
        assert counters.syncs - counters.waits == before
    assert counters.waits
    model.streamer.close()


def test_layers_between_chains_have_the_same_bits(tiny_qwen: Path) -> None:
    ours, own = load_streamed(tiny_qwen, slots=24), load_streamed(tiny_qwen, slots=24)
    ask(own, at_each=True)
    got = [passes(m, make_cache(m, 4, 4), ROWS, False) for m in (ours, own)]
    assert same(*got)
    assert ours.streamer.counters.misses == own.streamer.counters.misses
    ours.streamer.close()
    own.streamer.close()


@pytest.mark.parametrize("slots", [12, 24, 50])
@pytest.mark.parametrize(
    ("executor", "served"),
    [("layerwise", False), ("layerwise", True), ("lookahead", False), ("auto", False)],
)
def test_no_slot_is_used_that_is_being_refilled(
    tiny_qwen: Path, slots: int, executor: Any, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Residency.load

    def spoil(self: Residency, layer: int, experts: Any, slots: Any, guess: Any = None) -> Any:
        for slot in slots:  # no number, until the read has come
            for view in self.arrays.rows:
                view[slot] = 0xFF
        return load(self, layer, experts, slots, guess)

    whole = load_streamed(tiny_qwen)
    want = passes(whole, make_prompt_cache(whole), ROWS * 2, False)
    if not served:
        monkeypatch.setattr(Residency, "load", spoil)
    disk = Disk.parse("40MB/s@1ms")
    model = load_streamed(tiny_qwen, slots=slots, executor=executor, disk=disk)
    if not served:  # else what lies in a slot before its read are the bytes of another expert
        ask(model, at_each=False)
    assert same(passes(model, make_prompt_cache(model), ROWS * 2, False), want)
    assert model.streamer.counters.misses
    model.streamer.close()
    whole.streamer.close()


def test_guesses_are_told_of_every_choice(tiny_qwen: Path) -> None:
    model = load_streamed(tiny_qwen, slots=24, executor="lookahead")
    run = model.streamer.executors[0]
    mx.eval(model(mx.array([[7]]), cache=make_prompt_cache(model)))
    assert run.fetching.slots(1) is run.pool.slot_of[1]

    def absent() -> list[int]:
        return [int(np.flatnonzero(run.pool.slot_of[1] < 0)[0])]

    run.prefetch(1, absent(), deadline=1, room=1)
    assert run.fetching.slots(1) is None
    run.ahead.drop(wait=True)
    assert run.fetching.slots(1) is run.pool.slot_of[1]
    assert run.foresight is not None
    run.foresight.begin(np.array([7]), guess=False, rehearse=True)
    run.foresight.rehearse(1, ([], absent()), 2, None)
    assert run.fetching.slots(0) is None
    run.foresight.end()
    run.ahead.drop(wait=True)
    assert run.fetching.slots(0) is run.pool.slot_of[0]
    model.streamer.close()


def test_a_failed_read_ends_the_pass_where_it_was_asked_for(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, own = load_streamed(tiny_qwen, slots=24), load_streamed(tiny_qwen, slots=24)
    cache, other = make_prompt_cache(ours), make_prompt_cache(own)
    for model, held in ((ours, cache), (own, other)):
        ask(model, at_each=False)
        model(mx.array([PROMPT]), cache=held)
        mx.eval([c.state for c in held])
    native: Any = backend.native()
    ran: list[int] = []
    go_on = native.go_on

    def counted(*args: Any) -> Any:
        gave = go_on(*args)
        ran.append(len(gave[0]))
        return gave

    fetch = Fetching.fetch

    def cancelled(self: Fetching, *args: Any) -> Any:
        slots, waiting = fetch(self, *args)
        if waiting:
            failed.append(len(ran))
            self._run.store._engine.stop()  # type: ignore[attr-defined]
        return slots, waiting

    failed: list[int] = []
    monkeypatch.setattr(native, "go_on", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Fetching, "fetch", cancelled)
        with pytest.raises(StreamerError, match="closed"):
            for token in range(5, 25):
                mx.eval(ours(mx.array([[token]]), cache=cache))
                mx.eval(own(mx.array([[token]]), cache=other))
    assert failed and len(ran) > failed[0] and ran[-1] == 1
    # the caches are those of before the pass
    assert [c.offset for c in cache if hasattr(c, "offset")] == [
        c.offset for c in other if hasattr(c, "offset")
    ]
    own.streamer.close()


def test_a_served_pass_ends_where_a_read_fails(tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny_qwen, path)
    model, whole = load_streamed(path, slots=24), load_streamed(tiny_qwen)
    cache, other = make_prompt_cache(model), make_prompt_cache(whole)
    for one, held in ((model, cache), (whole, other)):
        one(mx.array([PROMPT]), cache=held)
        mx.eval([c.state for c in held])
    file = next(path.glob("*.safetensors"))
    stored = file.read_bytes()
    file.write_bytes(stored[: len(stored) // 8])
    with pytest.raises(StreamerError, match="too short"):
        mx.eval(model(mx.array([[7]]), cache=cache))
    (run,) = model.streamer.executors
    assert not run.pool.resident.any() and len(run.pool.free) == run.pool.slots
    file.write_bytes(stored)
    for token in range(7, 20):  # the caches are those of before the pass
        got, want = (m(mx.array([[token]]), cache=c) for m, c in ((model, cache), (whole, other)))
        assert mx.array_equal(got, want)
    model.streamer.close()
    whole.streamer.close()


def test_an_interrupted_pass_leaves_no_expert_that_has_not_come(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_streamed(tiny_qwen)
    model = load_streamed(tiny_qwen, slots=24, disk=Disk.parse("20MB/s@200ms"))
    ask(model, at_each=False)
    native: Any = backend.native()
    go_on = native.go_on

    def interrupted(*args: Any) -> Any:
        if args[5]:  # experts have been asked for
            raise KeyboardInterrupt
        return go_on(*args)

    cache, other = make_prompt_cache(model), make_prompt_cache(whole)
    monkeypatch.setattr(native, "go_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(mx.array([[7]]), cache=cache)
    monkeypatch.undo()
    # made again, it asks for the experts that were on their way
    got, want = model(mx.array([[7]]), cache=cache), whole(mx.array([[7]]), cache=other)
    assert mx.array_equal(got, want)
    model.streamer.close()
    whole.streamer.close()


def test_a_layer_that_is_not_there_ends_a_served_pass(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_streamed(tiny_qwen, slots=24)
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=cache)
    (run,) = model.streamer.executors
    native: Any = backend.native()
    go_on = native.go_on

    def elsewhere(*args: Any) -> Any:
        *rest, caches = args
        return go_on(*rest, [(one, 10**6) for one, _ in caches])

    monkeypatch.setattr(native, "go_on", elsewhere)
    with pytest.raises(ValueError, match="no such layer"):
        mx.eval(model(mx.array([[7]]), cache=cache))
    assert not run.pool.resident.any()
    monkeypatch.undo()
    mx.eval(model(mx.array([[7]]), cache=cache))
    model.streamer.close()


def test_what_does_not_fit_a_chain_is_refused(tiny_qwen: Path) -> None:
    model = load_streamed(tiny_qwen, slots=24)
    native: Any = backend.native()
    plan: Any = plans._plan(model.language_model, make_prompt_cache(model))
    row = plan.runs[0]._rows[0]
    states = row.states((1, 1), make_prompt_cache(model))
    tokens = [mx.array([[7]])]
    with pytest.raises(ValueError, match="must be a segment"):
        native.go_on([], [], tokens, [])
    with pytest.raises(ValueError, match="don't fit the segments"):
        native.go_on([row.op], [], tokens, [])
    with pytest.raises(ValueError, match="don't fit the segments"):
        native.go_on([row.op, row.op], [states, states], tokens, [])
    gave, choices, waited = native.go_on([row.op], [states], tokens, [])
    assert len(gave) == 1 and not choices.size and not waited
    model.streamer.close()


@pytest.mark.parametrize("wrong", ["heat", "held", "turns"])
def test_a_cache_takes_no_copies_for_the_pools_own_arrays(tiny_qwen: Path, wrong: str) -> None:
    model = load_streamed(tiny_qwen, slots=24)
    (run,) = model.streamer.executors
    pool: Any = run.pool
    assert run.serving._make(pool) is not None
    kept = pool.arrays()
    pool.arrays = lambda: {**kept, wrong: kept[wrong].astype(np.float32)}
    with pytest.raises(TypeError):
        run.serving._make(pool)
    model.streamer.close()


def test_at_three_quarters_a_pass_stops_less_than_three_times() -> None:
    """DESIGN section 4's bar, of 8 layers, by the embedded demo, where passes are not served."""
    model: Any = load_streamed(DEMO, slots=expert_count(DEMO) * 3 // 4, dtype="auto")
    ask(model, at_each=False)
    prompt = load_tokenizer(DEMO).encode("import os\nimport sys\n\n\ndef main(argv=None):\n    ")
    counters = model.streamer.counters
    for _ in range(2):  # the first fills the pool
        cache, before = make_prompt_cache(model), counters.syncs
        assert len(list(generate(model, prompt, cache, max_tokens=64))) == 64
    assert 0 < counters.syncs - before < 3 * 64
    model.streamer.close()
