"""Watching: what a profiler keeps, what it costs, and how memory is sampled."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from kernels import backend
from streamer import owners
from streamer.disk import Disk
from streamer.engine import generate
from streamer.loading import load_streamed
from streamer.owners import OWNERS, Ledger, Sampler
from streamer.profiler import PARTS, Profiler, _Choices
from streamer.recorder import Recorder
from streamer.replay import replay
from streamer.run import DEMO
from tools import inflate

pytestmark = pytest.mark.timed

TOKENS = np.random.default_rng(4).integers(5, 900, 40).tolist()
MB = 1 << 20


def run(model: Any, count: int) -> list[int]:
    steps = generate(model, TOKENS, make_prompt_cache(model), max_tokens=count)
    return [step.token for step in steps]


@pytest.mark.smoke
def test_the_routes_are_a_recorders() -> None:
    """And replayed on the run's pool they miss what the run missed."""
    watched: Any = load_streamed(DEMO, slots=120)
    recorded: Any = load_streamed(DEMO, slots=120)
    watched.streamer.watch = profiler = Profiler(watched)
    run(watched, 20)
    recorder = Recorder(recorded)
    with recorder.attached() as wanted:
        recorder.begin(len(TOKENS))
        run(recorded, 20)
    found = profiler.routes()
    assert [p.kind for p in found.passes] == [p.kind for p in wanted.passes]
    assert [p.kept for p in found.passes] == [p.kept for p in wanted.passes]
    assert len(found.calls) == len(wanted.calls)
    for mine, theirs in zip(found.calls, wanted.calls, strict=True):
        assert mine.step == theirs.step and mine.layer == theirs.layer
        assert mine.experts.tolist() == theirs.experts.tolist()
    counters = watched.streamer.counters
    again = replay(found, [120])
    assert (again.hits, again.misses) == (counters.hits, counters.misses)
    missed = sum(n.sum() for n in profiler.missed)
    assert missed == counters.misses == sum(s.misses for s in profiler.steps)


@pytest.mark.smoke
def test_the_extension_keeps_choices_as_python_does() -> None:
    native = backend.native()
    if native is None:
        pytest.skip("the extension is not built")
    mine, plain = native.Choices(), _Choices()
    draw = np.random.default_rng(2)
    for rows in (1, 3, 40):
        ids = draw.integers(0, 60_000, (1, rows, 4)).astype(np.uint32)
        for one in (ids, ids[:, ::2], np.swapaxes(ids, 1, 2), ids.astype(np.int32)):
            missed = one.reshape(-1)[:rows].tolist()
            for keeper in (mine, plain):
                keeper.add(rows, one, missed)
        assert mine.count == plain.count
        assert mine.take() == plain.take() != (b"", b"", b"")
    assert mine.take() == plain.take() == (b"", b"", b"")
    mine.add(0, np.zeros(4), [])
    with pytest.raises(ValueError, match="32 bits"):
        mine.take()


@pytest.mark.smoke
def test_what_the_generating_thread_computes_itself_is_no_host_time() -> None:
    native = backend.native()
    if native is None:
        pytest.skip("the extension is not built")
    model: Any = load_streamed(DEMO, slots=120)
    run(model, 4)
    before = native.computed()
    model.streamer.watch = profiler = Profiler(model)
    run(model, 20)
    spent = native.computed() - before
    assert spent > 0, "the demo's steps are segments"
    parts = np.array([step.parts for step in profiler.steps]).sum(axis=0)
    told = dict(zip(PARTS, parts, strict=True))
    assert 0.95 * spent <= told["compute"] and told["host"] > 0


@pytest.mark.smoke
def test_parts_of_steps_told_by_hand() -> None:
    """A wait inside a draft is a wait, and a rehearsal inside a pass is no compute."""
    model: Any = load_streamed(DEMO, slots=40)
    counters, profiler = model.streamer.counters, Profiler(model)
    began = time.perf_counter()
    time.sleep(0.02)
    counters.io_wait_seconds += 0.005
    profiler.step("draft", 2, 0.02)
    time.sleep(0.03)
    profiler.step("rehearse", 3, 0.01)
    counters.io_wait_seconds += 0.004
    profiler.step("verify", 3, 0.03)
    profiler.accepted(1)
    whole = time.perf_counter() - began
    [step] = profiler.steps
    parts = dict(zip(PARTS, step.parts, strict=True))
    assert parts["waiting"] == pytest.approx(0.009)
    assert parts["drafting"] == pytest.approx(0.015)
    assert parts["rehearsing"] == pytest.approx(0.01)
    assert parts["compute"] == 0 and 0 < parts["verifying"] <= 0.03
    assert sum(step.parts) == pytest.approx(step.seconds)
    assert step.seconds >= 0.05 and whole >= 0.05
    assert [p.kept for p in profiler.routes().passes] == [0, 2]


def test_watching_costs_less_than_a_fiftieth(tmp_path: Path) -> None:
    """All that was told in a run told once more, and the share that sampling may take.

    With experts of 200 kB from a disk of 0.5 GB/s. The telling is counted in processor time, the
    least of several, which other work on the machine hardly changes; the run by the clock, which
    other work can only make longer, and the share less: it cannot make the test fail.
    `tools.watch_cost` compares whole runs by the clock.
    """
    inflate.main([str(DEMO), str(tmp_path / "model"), "--expert-bytes", "200KB"])
    model: Any = load_streamed(tmp_path / "model", slots=160, disk=Disk(0.5e9))
    told: list[tuple[str, tuple[Any, ...]]] = []

    class Keeping:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: told.append((name, args))

    def spent(count: int) -> float:
        began = time.perf_counter()
        run(model, count)
        return time.perf_counter() - began

    spent(20)
    model.streamer.watch = Keeping()  # type: ignore[assignment]
    spent(80)
    log = model.streamer.store.take_log()
    model.streamer.watch = None
    assert {name for name, _ in told} == {"step", "chose"} and len(log) > 1000
    takes = len(told) // 100

    def tell() -> float:
        profiler = Profiler(model)
        logs = iter(np.array_split(log, takes))
        profiler._store = SimpleNamespace(take_log=lambda: next(logs, log[:0]))
        again = [(getattr(profiler, name), args) for name, args in told]
        began = time.thread_time()
        for call, args in again:
            call(*args)
        return time.thread_time() - began

    telling, running = min(tell() for _ in range(7)), min(spent(80) for _ in range(3))
    share = telling / running + owners.SHARE
    assert share < 0.02, share


@pytest.mark.smoke
def test_sampling_takes_its_share_at_most() -> None:
    class Slow:
        count = 0

        def sample(self, seconds: float) -> Any:
            self.count += 1
            end = time.thread_time() + 0.002
            while time.thread_time() < end:
                pass

    ledger: Any = Slow()
    began = time.perf_counter()
    with Sampler(ledger, period=0.001, share=0.05):
        time.sleep(0.6)
    lasted = time.perf_counter() - began
    # the first and the last come anyway
    assert 3 <= ledger.count <= 2 + lasted * 0.05 / 0.002


# Memory


@pytest.mark.smoke
def test_owners_hold_what_was_given_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_streamed(DEMO, slots=160)
    caches: list[Any] = []
    monkeypatch.setattr(owners, "HEAP_EVERY", 1)
    ledger = Ledger(model, lambda: caches, model.streamer.opened.files)
    before = ledger.sample(0.0)
    assert before.owners["pool"] == model.streamer.executors[0].arrays.nbytes
    assert before.owners["trunk"] == model.streamer.opened.trunk_bytes
    held = mx.zeros((40 * MB,), dtype=mx.uint8)
    mx.eval(held)
    worked = ledger.sample(0.0)
    assert worked.owners["workspace"] - before.owners["workspace"] == pytest.approx(40 * MB, abs=MB)
    assert worked.footprint - before.footprint == pytest.approx(40 * MB, abs=4 * MB)

    class Cache:
        nbytes = held.nbytes

    caches.append(Cache())
    kept = ledger.sample(0.0)
    assert kept.owners["kv"] == 40 * MB
    assert kept.owners["workspace"] == pytest.approx(before.owners["workspace"], abs=MB)
    own = bytearray(b"x") * (30 * MB)
    grown = ledger.sample(0.0)
    assert grown.owners["runtime"] - kept.owners["runtime"] == pytest.approx(30 * MB, abs=MB)
    del own
    for sample in (before, worked, kept, grown):
        assert sum(sample.owners.values()) == pytest.approx(sample.footprint, rel=0.05)
        assert set(sample.owners) == set(OWNERS)


@pytest.mark.smoke
def test_the_page_cache_of_files_is_seen(tmp_path: Path) -> None:
    model: Any = load_streamed(DEMO, slots=40)
    file = tmp_path / "data"
    file.write_bytes(b"x" * (8 * MB))
    ledger = Ledger(model, list, [file])
    found = ledger.sample(0.0).page_cache
    if found is None:
        pytest.skip("this system does not say what it caches (Linux 6.5 does)")
    assert found == 8 * MB


@pytest.mark.smoke
def test_long_runs_keep_few_samples_and_their_peaks() -> None:
    class Counting:
        count = 0

        def sample(self, seconds: float) -> Any:
            self.count += 1

            class Sample:
                footprint = self.count if self.count != 23 else 1000

            return Sample()

    ledger: Any = Counting()
    end = time.monotonic() + 30  # long before, where the machine has a core for it
    with Sampler(ledger, period=0.001, most=16, share=1.0) as sampler:
        while ledger.count <= 24 and time.monotonic() < end:
            time.sleep(0.01)
    assert ledger.count > 24 and len(sampler.samples) <= 16
    assert max(s.footprint for s in sampler.samples) == 1000
