"""Gemma 4's assistant drafts from the caches of its target.

python -m pytest tests/test_mtp_assistant.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import ASSISTED, make_assistant, make_tiny
from mlx_lm.models.cache import make_prompt_cache

from mtp.assistant import SLIDING, Assistant, read
from mtp.hidden import take, watch
from mtp.rollback import Tape
from streamer import run
from streamer.engine import Timing, generate
from streamer.loading import load_streamed
from streamer.opened import open_model
from streamer.speculate import Speculation
from tools import extract_mtp

CLOSE = 1e-4
CAP = {"final_logit_softcapping": 30.0}  # as mlx-lm has it where the configuration has none
WINDOW = 16
TOKENS = np.random.default_rng(4).integers(0, 320, (1, 64))
PROMPT = [int(t) for t in TOKENS[0, :40]]


def make_target(path: Path, *, ordered: bool = False, family: str = "gemma4_text") -> Path:
    make_tiny(family, path, layout="hf", changes=CAP)
    return make_assistant(path, beside=True, ordered=ordered)


def drafts_of(
    model: Any, hidden: mx.array, token: int, states: list[Any] | None = None
) -> list[Any]:
    """Three drafts after the last pass: logits [V], states [D].

    states: the reference's, given back instead of ours, as rounding grows from draft to draft.
    """
    head, given, out = model.mtp, mx.array([[token]]), []
    for step in range(3):
        logits, hidden = head(hidden, given, head.make_cache(), step, last=True)
        out.append((np.array(logits[0, 0]), np.array(hidden[0, 0])))
        given = mx.argmax(logits, axis=-1)
        if states:
            hidden = mx.array(states[step][1])[None, None]
    return out


def ran(model: Any, tokens: Any, cache: list[Any]) -> mx.array:
    """The state [1, 1, D] of the last of `tokens`, of the kind that the assistant takes."""
    watch(model.mtp.trunk.norm)
    model(mx.array(np.array(tokens))[None], cache=cache)
    return take(model.mtp.trunk.norm, "post_norm")[:, -1:]


def differ(a: list[Any], b: list[Any]) -> float:
    pairs = zip(a, b, strict=True)
    return max(
        float(np.abs(x - y).max()) for one, two in pairs for x, y in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("ordered", [False, True], ids=["dense", "clusters"])
def test_equals_transformers(tmp_path: Path, ordered: bool) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    if importlib.util.find_spec("transformers.models.gemma4_assistant") is None:
        pytest.skip("this transformers has no Gemma 4 assistant")
    import mtp_reference

    target = make_target(tmp_path / "target", ordered=ordered)
    apart = make_assistant(tmp_path / "assistant", ordered=ordered)
    model = load_streamed(target, slots=32, mtp=True)
    for rows in (1, 5, WINDOW - 1, 40):
        cache = make_prompt_cache(model)
        hidden = ran(model, TOKENS[0, :rows], cache)
        seen = read(model.mtp.trunk.inner)
        assert seen is not None and seen[1] == rows
        last = int(TOKENS[0, rows])
        given = np.array(hidden), _cut(seen[0], rows)
        expected = mtp_reference.assisted(target, apart, TOKENS[:, : rows + 1], given)
        assert np.abs(expected[0][0]).max() > 1
        assert differ(expected, drafts_of(model, hidden, last, expected)) < CLOSE
        if rows < WINDOW:  # transformers keeps one row less than the window between passes
            expected = mtp_reference.assisted(target, apart, TOKENS[:, : rows + 1])
            assert differ(expected, drafts_of(model, hidden, last, expected)) < 10 * CLOSE
        else:
            assert seen[0][SLIDING][0].shape[2] == WINDOW
    model.streamer.close()


def _cut(shared: dict[str, Any], rows: int) -> dict[str, Any]:
    """Without the room that mlx-lm's cache keeps behind its rows."""
    return {
        k: (np.array(a[..., :rows, :]), np.array(b[..., :rows, :])) for k, (a, b) in shared.items()
    }


@pytest.mark.parametrize("family", ASSISTED)
def test_reads_verified_rows_whatever_the_caches_went_through(tmp_path: Path, family: str) -> None:
    """A prompt, single rows into the ring, blocks taken back: as after a prompt of the same."""
    model = load_streamed(make_target(tmp_path, family=family), slots=32, mtp=True)
    cache, at = make_prompt_cache(model), 12
    ran(model, TOKENS[0, :at], cache)
    for rows, kept in [*[(1, 1)] * 7, (4, 2), (5, 1), (3, 3), (1, 1), (5, 4), (1, 1), (4, 1)]:
        block = [*TOKENS[0, at : at + kept], *[7] * (rows - kept)]
        with Tape(model, cache, mx.array(np.array(block))[None]) as tape:
            watch(model.mtp.trunk.norm)
            model(mx.array(np.array(block))[None], cache=cache)
        hidden = take(model.mtp.trunk.norm, "post_norm")[:, kept - 1 : kept]
        tape.rollback(kept)
        at += kept
        got = drafts_of(model, hidden, int(TOKENS[0, at]))
        fresh = make_prompt_cache(model)
        again = ran(model, TOKENS[0, :at], fresh)
        assert differ(got, drafts_of(model, again, int(TOKENS[0, at]), got)) < 10 * CLOSE
    assert at == 2 * WINDOW
    model.streamer.close()


def test_without_the_caches_it_drafts_all_the_same(tmp_path: Path) -> None:
    """Of a conversation that ended and gave its caches back, on the same model."""
    model = load_streamed(make_target(tmp_path), slots=32, mtp=True)
    hidden = ran(model, TOKENS[0, :9], make_prompt_cache(model))
    assert read(model.mtp.trunk.inner) is None
    assert all(np.isfinite(a).all() for pair in drafts_of(model, hidden, 1) for a in pair)
    model.streamer.close()


@pytest.mark.parametrize("family", ASSISTED)
@pytest.mark.parametrize("share", [100, 25])
def test_greedy_tokens_stay_the_same(tmp_path: Path, family: str, share: int) -> None:
    path = make_target(tmp_path, family=family)
    model = load_streamed(path, slots=max(2, 32 * share // 100), mtp=True)
    head = model.streamer.opened.head
    assert isinstance(head, Assistant)

    def tokens(speculation: Speculation | None) -> list[int]:
        timing, cache = Timing(), make_prompt_cache(model)
        options: Any = {"max_tokens": 48, "timing": timing, "speculation": speculation}
        got = [step.token for step in generate(model, PROMPT, cache, **options)]
        assert timing.cached == len(PROMPT) + len(got) - 1
        return got

    expected = tokens(None)
    for depth in (1, 2, 3, 4):
        speculation = Speculation(model, head, depth)
        assert tokens(speculation) == expected
        assert speculation.counters.drafted > 40
    model.streamer.close()


def test_from_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assistant = make_assistant(tmp_path / "assistant", ordered=True)
    target = make_tiny("gemma4", tmp_path / "target", quantization={"bits": 4, "group_size": 32})
    assert extract_mtp.main([str(assistant), "--beside", str(target)]) == 0
    assert "wrote" in capsys.readouterr().err
    head: Any = open_model(target, mtp=True).head
    assert isinstance(head, Assistant)
    packed = {n for n, m in head.named_modules() if hasattr(m, "scales")}
    assert "units.0.words" in packed and "units.0.blocks.2.self_attn.q_proj" in packed
    assert not {"units.0.join", "units.0.centroids"} & packed
    whole = make_assistant(tmp_path / "whole", beside=True, ordered=True)
    make_tiny("gemma4", whole, quantization={"bits": 4, "group_size": 32})
    got = [_first(p) for p in (target, whole)]
    assert 0 < np.abs(got[0] - got[1]).max() < 0.1 * np.abs(got[1]).max()


def _first(path: Path) -> np.ndarray:
    model = load_streamed(path, slots=32, mtp=True)
    cache = make_prompt_cache(model)
    hidden = ran(model, TOKENS[0, :9], cache)
    inner = model.mtp.units[0]
    model.streamer.close()
    seen = read(model.mtp.trunk.inner)
    assert seen is not None
    embedded = model.mtp.trunk.embed(mx.array(TOKENS[:, 9:10]))
    return np.array(inner.back(inner(embedded, hidden, *seen))[0, 0])


def test_of_another_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assistant = make_assistant(tmp_path / "assistant")
    for family, changes in (("qwen3_moe", {}), ("gemma4", {"hidden_size": 128})):
        target = make_tiny(family, tmp_path / family, changes=changes)
        assert extract_mtp.main([str(assistant), "--beside", str(target)]) == 2
        assert "assists a Gemma 4 of hidden size 64" in capsys.readouterr().err
        assert not (target / "mtp.safetensors").exists()


def test_of_another_width_is_left_out(tmp_path: Path) -> None:
    make_tiny("gemma4_text", tmp_path, changes={"global_head_dim": 64})
    opened = open_model(make_assistant(tmp_path, beside=True), mtp=True)
    assert opened.head is None
    assert "attention is [16, 16, 32] wide" in opened.head_notes[0]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, stats = make_target(tmp_path / "m", family="gemma4"), tmp_path / "s.json"
    argv = ["--model", str(path), "--prompt", "abc", "--max-tokens", "12", "--memory", "1GB"]
    assert run.main([*argv, "--raw", "--mtp", "off"]) == 0
    plain = capsys.readouterr().out
    assert run.main([*argv, "--raw", "--mtp", "2", "--stats", str(stats)]) == 0
    assert capsys.readouterr().out == plain
    assert json.loads(stats.read_text())["mtp"]["drafted"] > 10
