"""Compressed caches in every family: what attention gives, and what drafting and rehearsal give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, METAL_ONLY, make_tiny
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from test_mtp_assistant import make_target
from test_mtp_decode import drafting, tokens_of

from cache import make
from cache.attention import View
from cache.compressed import CompressedKVCache
from streamer.kv import CODED as BITS
from streamer.loading import expert_count, load_streamed
from streamer.rehearse import Choice
from streamer.run import DEMO
from streamer.speculate import Speculation

PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, 250, 110)]
CODED = {  # caches that compressed ones stand for, of all; others keep what mlx-lm makes
    "deepseek_v32": 0,
    "deepseek_v41": 0,
    "glm_moe_dsa": 0,
    "longcat_flash": 0,
    "longcat_flash_ngram": 0,
    "minimax_m3_vl": 0,
    "afmoe": 1,
    "gpt_oss": 2,
    "mimo_v2_flash": 1,
    "nemotron_h": 1,
    "phixtral": 2,
    "qwen3_5_moe": 1,
    "kimi_linear": 1,
}
SMOKE = {"qwen3_5_moe", "deepseek_v3"}
# attention only; a rotating window; gated delta nets; latents; sinks and windows
KINDS = ["qwen3_moe", "afmoe", "qwen3_5_moe", "deepseek_v3", "kimi_linear", "gpt_oss"]


class Shadow(CompressedKVCache):
    """Compares with full precision, and hands that on, so that no router is swayed."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.true, self.error = KVCache(), 0.0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.full = self.true.update_and_fetch(keys, values)
        got = super().update_and_fetch(keys, values)
        return tuple(Watched(self, x) if isinstance(x, View) else x for x in got)  # type: ignore[return-value]


class Watched:
    def __init__(self, cache: Shadow, view: View):
        self._cache, self._view = cache, view
        self.dtype = view.dtype

    def attend(self, q: mx.array, scale: float, mask: Any, sinks: Any = None) -> mx.array:
        got = self._view.attend(q, scale, mask, sinks)
        keys, values = self._cache.full
        values = keys if self._cache.latent else values
        want = mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=mask, sinks=sinks
        )
        error = mx.abs(got - want).max() / mx.abs(want).max()
        self._cache.error = max(self._cache.error, error.item())  # type: ignore[type-var,assignment]
        return want


def _families() -> list[Any]:
    here = set(FAMILIES) - (set() if mx.metal.is_available() else METAL_ONLY)
    return [pytest.param(f, marks=[pytest.mark.smoke] if f in SMOKE else []) for f in sorted(here)]


@pytest.mark.parametrize("family", _families())
def test_attention_is_right_in_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "CompressedKVCache", Shadow)
    model = load_streamed(make_tiny(family, tmp_path), kv_bits=8)
    cache, at = make_prompt_cache(model), 0
    tokens = np.random.default_rng(7).integers(0, 250, 300)
    for n in (250, 1, 1, 5, 1, 30, 1):
        logits = model(mx.array(tokens[at : at + n])[None], cache=cache)
        mx.eval(logits, [c.state for c in cache])
        at += n
    coded = [c for c in cache if isinstance(c, Shadow)]
    assert all(c.keys.coded == 192 and c.error < 0.03 for c in coded), [c.error for c in coded]
    assert all(c.error > 0 for c in coded if not c.latent)
    growing = sum(type(c) is KVCache for c in cache)
    assert len(coded) == CODED.get(family, len(coded)) and (growing == 0 or not coded)


@pytest.mark.parametrize("family", KINDS)
def test_drafts_and_rehearsals_change_no_token(family: str, tmp_path: Path) -> None:
    """Over 90 tokens, in which two blocks leave the window, with drafts that are rejected."""
    path, bits = make_tiny(family, tmp_path), 2.5
    plain = load_streamed(path, kv_bits=bits)
    expected, _, cache = tokens_of(plain, 90, PROMPT)
    coded = [c for c in cache if isinstance(c, CompressedKVCache)]
    assert coded and all(c.keys.coded == 128 for c in coded)
    if family == "afmoe":
        assert any(type(c) is RotatingKVCache for c in cache)
    for depths in ((4,), (1, 3, 0, 2)):
        drafts = drafting(plain, expected, *depths, prompt=PROMPT)
        got, _, left = tokens_of(plain, 90, PROMPT, speculation=drafts)
        assert got == expected
        assert drafts.counters.drafted > drafts.counters.accepted > 0
        assert [c.keys.coded for c in left if isinstance(c, CompressedKVCache)] == [128] * len(
            coded
        )
    rehearsed = load_streamed(
        path, slots=expert_count(path) // 2, executor="rehearse", kv_bits=bits
    )
    assert tokens_of(rehearsed, 90, PROMPT)[0] == expected
    assert rehearsed.streamer.counters.rehearsals > 0
    drafts = drafting(rehearsed, expected, 3, prompt=PROMPT)
    assert tokens_of(rehearsed, 90, PROMPT, speculation=drafts)[0] == expected


@pytest.mark.parametrize("bits", BITS)
def test_the_demo_drafts_and_rehearses_the_same_tokens(bits: float) -> None:
    expected = tokens_of(load_streamed(DEMO, dtype="auto", kv_bits=bits), 150)[0]
    runs: list[tuple[int | None, Choice]] = [
        (None, "layerwise"),
        (128, "layerwise"),
        (128, "rehearse"),
    ]
    for slots, executor in runs:
        model = load_streamed(
            DEMO, slots=slots, dtype="auto", mtp=True, kv_bits=bits, executor=executor
        )
        assert tokens_of(model, 150)[0] == expected
        speculation = Speculation(model, model.streamer.opened.head, 3)
        assert tokens_of(model, 150, speculation=speculation)[0] == expected
        assert speculation.counters.accepted > 10


def test_an_assistant_reads_the_codes(tmp_path: Path) -> None:
    """Gemma 4's drafter attends over the trunk's own caches."""
    model = load_streamed(make_target(tmp_path), mtp=True, kv_bits=2.5)
    expected, _, cache = tokens_of(model, 90, PROMPT)
    assert sum(isinstance(c, CompressedKVCache) for c in cache) == 1
    speculation = Speculation(model, model.streamer.opened.head, 3)
    assert tokens_of(model, 90, PROMPT, speculation=speculation)[0] == expected
    assert speculation.counters.drafted > 90
