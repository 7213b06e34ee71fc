"""Warm starts: what is remembered, that it is only ever a hint, and what damage does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache

from streamer import run as command
from streamer.errors import StreamerError, UsageError
from streamer.filling import warm
from streamer.heat import MAX_BYTES, MEMORY, Heat
from streamer.loading import expert_count, load_streamed
from streamer.opened import open_model
from streamer.store import Store

ROWS = [30, 1, 1, 3, 1, 1, 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"))


def passes(model: Any) -> list[mx.array]:
    tokens = np.random.default_rng(5).integers(0, 250, sum(ROWS))
    cache, out, at = make_prompt_cache(model), [], 0
    for n in ROWS:
        out.append(model(mx.array(tokens[at : at + n])[None], cache=cache))
        mx.eval(out[-1])
        at += n
    return out


def opened(path: Path, heat: Path | str, share: float = 0.5) -> Any:
    return load_streamed(path, slots=int(expert_count(path) * share), heat=str(heat))


def uses(heat: Path) -> dict[str, list[int]]:
    return json.loads(heat.read_text())["uses"]


@pytest.mark.smoke
def test_a_second_session_starts_with_what_the_first_used(tiny: Path, tmp_path: Path) -> None:
    heat = tmp_path / "heat.json"
    cold = opened(tiny, heat)
    expected = passes(cold)
    cold.streamer.close()
    warm = opened(tiny, heat)
    run = warm.streamer.executors[0]
    assert warm.streamer.stats()["warm_filled"] == run.pool.slots
    best = sorted((n for u in uses(heat).values() for n in u), reverse=True)[: run.pool.slots]
    kept = [uses(heat)[run.layers[i].path][e] for i, e in run.pool.victims()]
    assert sorted(kept) == best[::-1]
    assert sum(kept[: len(kept) // 2]) < sum(kept[len(kept) // 2 :]), "the most used go last"
    for want, got in zip(expected, passes(warm), strict=True):
        assert mx.array_equal(want, got)
    assert warm.streamer.counters.misses < cold.streamer.counters.misses


def test_experts_are_read_in_the_order_of_the_disk(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heat = tmp_path / "heat.json"
    cold = opened(tiny, heat)
    passes(cold)
    cold.streamer.close()
    places: list[tuple[int, int]] = []
    read = Store.read

    def note(self: Store, pieces: Any, *rest: Any) -> Any:
        places.append((pieces[0].file, pieces[0].offset))
        return read(self, pieces, *rest)

    monkeypatch.setattr(Store, "read", note)
    opened(tiny, heat)
    assert len(places) > 1 and places == sorted(places)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": "moe-heat"',
        '{"format": "moe-heat", "uses": ' + "[" * 5000,
        '{"format": "moe-heat", "version": 1}',
        '{"format": "moe-heat"}\x00\xff',
        "other checkpoint",
        "other version",
        "negative",
        "huge number",
        "text",
        "short",
        "too long",
    ],
)
def test_a_damaged_or_stale_file_is_as_good_as_none(tiny: Path, tmp_path: Path, text: str) -> None:
    heat = tmp_path / "heat.json"
    document = {
        "format": "moe-heat",
        "version": 1,
        "fingerprint": open_model(tiny).checkpoint.fingerprint,
        "uses": {layer.path: [3] * layer.count for layer in open_model(tiny).layers},
    }
    heat.write_text(json.dumps(document))
    assert len(Heat(open_model(tiny), heat).load()) == len(document["uses"])
    first = next(iter(document["uses"]))
    changes = {
        "other checkpoint": {"fingerprint": "0" * 16},
        "other version": {"version": 2},
        "negative": {"uses": {first: [-1] * 16}},
        "huge number": {"uses": {first: [10**30] * 16}},
        "text": {"uses": {first: ["a"] * 16}},
        "short": {"uses": {first: [1, 2]}},
        "too long": {"note": "x" * MAX_BYTES},
    }
    change = changes.get(text)
    heat.write_bytes(json.dumps(document | change).encode() if change else text.encode("latin-1"))
    assert Heat(open_model(tiny), heat).load() == {}
    model = opened(tiny, heat)
    assert model.streamer.stats()["warm_filled"] == 0
    passes(model)
    model.streamer.close()
    assert uses(heat), "and it is replaced"


@pytest.mark.smoke
@pytest.mark.parametrize("text", ["my precious", "{", "[" * 5000, "null", '{"a": 1}', "\x00\xff"])
def test_what_is_no_heat_is_left_alone(tiny: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(text.encode("latin-1"))
    assert Heat(open_model(tiny), file).load() == {}
    with pytest.raises(UsageError, match="is no heat file"):
        opened(tiny, file)
    assert file.read_bytes() == text.encode("latin-1")


def test_sessions_side_by_side_both_count(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    heat = tmp_path / "sub" / "heat.json"
    models = [opened(tiny, heat), opened(tiny, heat, 0.25)]
    for model in models:
        passes(model)
        model.streamer.close()
        model.streamer.close()  # once is once
    expected = sum(np.concatenate(model.streamer.executors[0].uses) for model in models)
    assert np.array_equal(np.concatenate(list(uses(heat).values())), expected)
    assert [p.name for p in heat.parent.iterdir()] == ["heat.json"], "nothing is left aside"


def test_a_file_stays_small_and_forgets(tmp_path: Path) -> None:
    layers = [
        SimpleNamespace(path=f"model.layers.{i}.mlp.switch_mlp", count=384) for i in range(90)
    ]
    model: Any = SimpleNamespace(
        layers=layers, checkpoint=SimpleNamespace(fingerprint="f" * 16), top_k=8
    )
    heat, rng = Heat(model, tmp_path / "heat.json"), np.random.default_rng(0)
    for _ in range(3):
        counts = [rng.integers(0, 1 << 20, 384) for _ in layers]
        heat.save([SimpleNamespace(layers=layers, uses=counts)])  # type: ignore[list-item]
        assert heat.path.stat().st_size <= MAX_BYTES
    loaded = heat.load()
    assert len(loaded) == 90
    assert sum(int(u.sum()) for u in loaded.values()) <= 1.01 * MEMORY


def test_a_failed_read_leaves_an_empty_usable_pool(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tiny, "off")
    run = model.streamer.executors[0]

    def broken(*_: Any) -> Any:
        raise StreamerError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", broken)
        with pytest.raises(StreamerError, match="disk is gone"):
            list(warm(run, [(0, 1), (1, 2)], 1))
    assert len(run.pool.free) == run.pool.slots
    passes(model)


def test_the_command_line_keeps_a_file_per_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--prompt", "def ", "--memory", "50%", "--max-tokens", "8"]

    def told(*more: str) -> tuple[str, dict[str, Any]]:
        assert command.main([*options, "--stats", str(tmp_path / "stats"), *more]) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "stats").read_text())

    text, cold = told("--heat", "off")
    assert not (tmp_path / "streamer").exists()
    for filled in (False, True):
        again, stats = told("--heat", "auto")
        assert again == text and (stats["experts"]["warm_filled"] > 0) == filled
    assert stats["experts"]["misses"] < cold["experts"]["misses"]
    assert len(list((tmp_path / "streamer" / "heat").iterdir())) == 1


def test_a_named_file_that_cannot_be_written_is_told(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    model = opened(tiny, tmp_path / "sub" / "heat.json")
    passes(model)
    (tmp_path / "sub").rmdir()
    with pytest.raises(UsageError, match="cannot write"):
        model.streamer.close()


def test_a_folder_that_cannot_be_entered(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, or, for root too, one of too long a name: told where the user named it."""
    folder = tmp_path / ("a" * 300)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    model = opened(tiny, "auto")
    passes(model)
    model.streamer.close()
    with pytest.raises(UsageError, match="cannot write"):
        opened(tiny, folder / "heat.json")


@pytest.mark.parametrize("name", ["", "no/heat.json", "file/heat.json"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_or_before_anything_is_loaded(tiny: Path, tmp_path: Path, name: str, share: float) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        opened(tiny, tmp_path / name, share)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_pipe_is_not_waited_for(tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert Heat(open_model(tiny), tmp_path / "pipe").load() == {}
