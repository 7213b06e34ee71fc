"""Recordings: replayed counts are the live ones, files survive, damage is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache

from streamer import residency
from streamer.engine import generate
from streamer.loading import load_streamed
from streamer.recorder import Recorder, record
from streamer.replay import replay, unions
from streamer.routes import Routes, RoutesError
from streamer.run import DEMO
from tools import trace

TOKENS = np.random.default_rng(5).integers(0, 250, 400).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), layout="hf")


def live(model: Any) -> tuple[int, int]:
    for each in model.streamer.executors:
        each.settle()
    return model.streamer.counters.hits, model.streamer.counters.misses


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [0, 8, 16, 24, 31, None])
def test_replayed_counts_are_the_live_ones(
    tiny: Path, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walked prefills, scratch, homes, eviction and covered layers included."""
    monkeypatch.setattr(residency, "DECODE_PAIRS", 100)
    prompts = [TOKENS[:200], TOKENS[200:203], TOKENS[210:330]]
    unwatched, model = load_streamed(tiny, slots=slots), load_streamed(tiny, slots=slots)
    tokens = []
    for prompt in prompts:
        steps = generate(unwatched, prompt, make_prompt_cache(unwatched), max_tokens=25)
        tokens.append([step.token for step in steps])
    routes = record(model, prompts, 25)
    pool = [group.slots for group in routes.groups]
    found = replay(routes, pool)
    assert (found.hits, found.misses) == (routes.hits, routes.misses) == live(unwatched)
    asked = dict.fromkeys(("prefill", "decode"), 0)
    for call in routes.calls:
        asked[routes.passes[call.step].kind] += len(np.unique(call.experts))
    assert {kind: h + m for kind, (h, m) in found.by_kind.items()} == asked
    assert slots is None or routes.hits + routes.misses == sum(asked.values())
    assert found.bytes_read == unwatched.streamer.counters.bytes_wanted
    assert any(c.experts.size > 100 for c in routes.calls)
    fed = [t for p in routes.passes if p.sequence == 0 for t in p.tokens.tolist()]
    assert fed == prompts[0] + tokens[0][:-1]
    # what was swapped in is gone again
    steps = generate(model, prompts[0], make_prompt_cache(model), max_tokens=25)
    assert [step.token for step in steps] == tokens[0]
    assert sum(p.kind == "prefill" for p in routes.passes) == 4 + 1 + 2


def test_a_replay_at_another_size_is_a_run_at_that_size(tiny: Path) -> None:
    routes = record(load_streamed(tiny, slots=10), [TOKENS[:90]], 30)
    other = load_streamed(tiny, slots=22)
    list(generate(other, TOKENS[:90], make_prompt_cache(other), max_tokens=30))
    found = replay(routes, [22])
    assert (found.hits, found.misses) == live(other)


def test_drafts_are_recorded_with_what_was_kept() -> None:
    model = load_streamed(DEMO, slots=200, dtype="auto", mtp=True)
    tokens = model_tokens(model, "import os\n\ndef main(")
    routes = record(model, [tokens], 40, depth=3)
    plain = record(load_streamed(DEMO, slots=200, dtype="auto"), [tokens], 40)
    verified = [p for p in routes.passes if p.kind == "verify"]
    assert verified and all(1 <= p.kept <= len(p.tokens) == 4 for p in verified[:-1])
    found = replay(routes, [group.slots for group in routes.groups])
    assert (found.hits, found.misses) == (routes.hits, routes.misses)
    kept = [t for p in routes.passes if p.kind != "draft" for t in p.tokens[: p.kept].tolist()]
    expected = [t for p in plain.passes for t in p.tokens.tolist()]
    assert kept[: len(expected)] == expected[: len(kept)] and len(kept) >= len(tokens) + 38
    assert {c.layer for c in routes.calls if routes.passes[c.step].kind == "draft"} == {8}
    assert unions(routes, 4) == pytest.approx(unions(plain, 4), rel=0.03)


def model_tokens(model: Any, text: str) -> list[int]:
    from streamer.loading import open_tokenizer

    return list(open_tokenizer(model.streamer.opened).encode(text))


@pytest.fixture(scope="module")
def recorded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routes") / "a.routes"
    record(load_streamed(tiny, slots=12), [TOKENS[:60]], 20).save(path)
    return path


def test_a_file_gives_back_what_was_saved(recorded: Path, tmp_path: Path) -> None:
    routes = Routes.load(recorded)
    routes.save(tmp_path / "b.routes")
    again = Routes.load(tmp_path / "b.routes")
    assert len(again.calls) == len(routes.calls) > 0
    for a, b in zip(routes.calls, again.calls, strict=True):
        assert a[:2] == b[:2] and np.array_equal(a.experts, b.experts)
    for p, q in zip(routes.passes, again.passes, strict=True):
        assert (p.kind, p.sequence, p.kept) == (q.kind, q.sequence, q.kept)
        assert np.array_equal(p.tokens, q.tokens)
    assert (routes.groups, routes.counts, routes.hits) == (again.groups, again.counts, again.hits)
    assert [p.name for p in tmp_path.iterdir()] == ["b.routes"]


def test_an_empty_recording_is_a_file_too(tmp_path: Path) -> None:
    Routes("none", "0", (), 0, 0, ()).save(tmp_path / "e.routes")
    assert Routes.load(tmp_path / "e.routes").tokens == 0


@pytest.mark.smoke
@pytest.mark.parametrize("cut", [0, 1, 30, 400, -40])
def test_a_damaged_file_is_named(
    recorded: Path, tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.routes"
    broken.write_bytes(recorded.read_bytes()[:cut])
    with pytest.raises(RoutesError, match=r"broken\.routes"):
        Routes.load(broken)
    assert trace.main(["replay", str(broken)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {broken} is no recording")


def test_other_versions_and_other_arrays_are_refused(recorded: Path, tmp_path: Path) -> None:
    def altered(**changed: Any) -> Path:
        with np.load(recorded) as file:
            arrays = dict(file)
        head = json.loads(arrays["header"].tobytes()) | changed.pop("head", {})
        arrays["header"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        arrays |= changed
        path = tmp_path / "altered"
        with open(path, "wb") as file:
            np.savez(file, **arrays)
        return path

    Routes.load(altered())
    with pytest.raises(RoutesError, match="of version 9"):
        Routes.load(altered(head={"version": 9}))
    for wrong in ({"experts": np.zeros(3, np.uint16)}, {"tokens": np.zeros(1, np.int32)}):
        with pytest.raises(RoutesError, match="damaged"):
            Routes.load(altered(**wrong))
    with np.load(recorded) as file:
        wild = np.full_like(file["experts"], 999)
    with pytest.raises(RoutesError, match="damaged"):
        Routes.load(altered(experts=wild))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d.routes")
    record_demo = ["record", "--prompt", "def ", "--max-tokens", "12", "--out", out]
    assert trace.main(record_demo) == 0
    assert trace.main(["replay", out, "--policy", "lrfu"]) == 0
    assert "as recorded" in capsys.readouterr().out
    assert trace.main(["replay", out, "--pool", "25%,75%", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["replays"]
    rates = {(r["slots"], r["policy"]): r["hit_rate"] for r in rows}
    assert rates[64 + 16, "belady"] > rates[64 + 16, "lru"] and len(rates) == 10
    assert trace.main(["guess", out, "--slots", "100", "--json"]) == 0
    names = {g["guesser"] for g in json.loads(capsys.readouterr().out)["guessers"]}
    assert names == {"previous", "frequency", "token"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "argv",
    [
        ["replay", "nowhere.routes"],
        ["replay", "x", "--pool", "half"],
        ["record", "--out", "x", "--prompt", ""],
        ["record", "--out", "nowhere/x", "--prompt", "a", "--max-tokens", "1"],
        ["record", "--out", "x", "--slots", "5", "--pool", "3%"],
    ],
)
def test_wrong_use_is_one_line(
    argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trace.main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and len(err) == 1


def test_what_is_not_recorded_is_refused(recorded: Path) -> None:
    routes = Routes.load(recorded)
    for slots, policy in (([12], "fifo"), ([1], "lru"), ([12, 12], "lru")):
        with pytest.raises(RoutesError.__mro__[1]):
            replay(routes, slots, policy)
    assert isinstance(Recorder(load_streamed(DEMO, slots=8, dtype="auto")).routes, Routes)
