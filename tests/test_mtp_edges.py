"""Where drafting meets the ends of things: stops, limits, caches kept for later, long prompts.

Through `load` and `stream_generate`, on dense models that fit and on streamed ones. The
head knows four of five tokens, so that blocks are accepted, cut and rejected.

    python -m pytest tests/test_mtp_edges.py
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drafting import Oracle
from families import CONFIGS, HEADS, make_head, make_tiny
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache, trim_prompt_cache

from mtp.draft import WAITING, Drafter
from mtp.hidden import take, watch
from streamer import load
from streamer.engine import generate
from streamer.generate import stream_generate
from streamer.loading import load_streamed
from streamer.speculate import Speculation

FAMILIES = ("qwen3_5", "qwen3_5_moe", "glm4_moe")  # dense with states, streamed with, without
PROMPT = [7, 3, 200, 5, 9, 11, 250, 31, 8] * 4
COUNT = 40


class Case:
    """A model, its tokenizer, and what it says after `PROMPT` without drafts."""

    def __init__(self, family: str, path: Path):
        make_head(family, path)
        memory = "100%" if family == "qwen3_5" else "40%"
        self.model, self.tokenizer = load(path, memory=memory, context=256, mtp=True)
        self.tokenizer.eos_token_ids = set()
        responses = list(self.stream(0))
        self.plain = [r.token for r in responses]
        self.text = "".join(r.text for r in responses)
        self.head = self.model.streamer.opened.head
        assert self.head
        self.model.streamer.opened.head = Oracle(self.model, [*PROMPT, *self.plain], 0.8)

    def stream(self, mtp: int, prompt: Any = PROMPT, count: int = COUNT, **options: Any) -> Any:
        return stream_generate(self.model, self.tokenizer, prompt, count, mtp=mtp, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Case(request.param, tmp_path_factory.mktemp("case"))
    yield made
    made.model.streamer.close()


def test_the_cases_accept_and_reject(case: Case) -> None:
    responses = list(case.stream(4))
    assert [r.token for r in responses] == case.plain
    drafted = [r.from_draft for r in responses]
    assert 10 < sum(drafted) < COUNT - 4


ROWS = mx.array(np.random.default_rng(2).integers(0, 320, (1, 12)))


@pytest.mark.parametrize("at", range(1, 14, 2))
def test_an_end_token_inside_a_block(case: Case, at: int) -> None:
    case.tokenizer.eos_token_ids = {case.plain[at]}
    try:
        want, got = list(case.stream(0)), list(case.stream(4))
    finally:
        case.tokenizer.eos_token_ids = set()
    assert [r.token for r in got] == case.plain[: case.plain.index(case.plain[at]) + 1]
    assert "".join(r.text for r in got) == "".join(r.text for r in want)
    assert [r.finish_reason for r in got] == [r.finish_reason for r in want]
    assert got[-1].finish_reason == "stop"


@pytest.mark.parametrize("count", range(1, 12))
def test_a_limit_inside_a_block(case: Case, count: int) -> None:
    cache = make_prompt_cache(case.model)
    got = list(case.stream(4, count=count, prompt_cache=cache))
    assert [r.token for r in got] == case.plain[:count]
    assert got[-1].finish_reason == "length"
    assert _continued(case, cache, count) == case.plain[count : count + 6]


@pytest.mark.parametrize("at", range(1, 14, 2))
def test_a_stop_string_inside_a_block(case: Case, at: int) -> None:
    """The caller stops asking when the text has it, and goes on with the same cache."""
    stop, said, given = case.text[at : at + 2], "", 0
    cache = make_prompt_cache(case.model)
    with contextlib.closing(case.stream(4, prompt_cache=cache)) as responses:
        for response in responses:
            said, given = said + response.text, given + 1
            if stop in said:
                break
    assert stop in said and given < COUNT
    assert _continued(case, cache, given) == case.plain[given : given + 6]


def _continued(case: Case, cache: list[Any], given: int) -> list[int]:
    """Six tokens more, from the tokens that the cache does not hold yet."""
    known = [*PROMPT, *case.plain[:given]]
    (rows,) = {c.offset for c in cache if hasattr(c, "offset")}
    assert rows == len(known) - 1
    return [r.token for r in case.stream(0, known[rows:], 6, prompt_cache=cache)]


def test_a_cache_is_used_again_after_rejections(case: Case) -> None:
    cache = make_prompt_cache(case.model)
    responses = list(case.stream(4, prompt_cache=cache))
    assert not all(r.from_draft for r in responses)
    known, added = [*PROMPT, *case.plain], [40, 41, 42, 43]
    (rows,) = {c.offset for c in cache if hasattr(c, "offset")}
    expected = [r.token for r in case.stream(0, [*known, *added], 12)]
    again = case.stream(3, [*known[rows:], *added], 12, prompt_cache=cache)
    assert [r.token for r in again] == expected


def test_a_cache_is_cut_after_rejections(case: Case) -> None:
    cache = make_prompt_cache(case.model)
    list(case.stream(4, prompt_cache=cache))
    (rows,) = {c.offset for c in cache if hasattr(c, "offset")}
    cut = trim_prompt_cache(cache, 12)
    if not cut:
        assert any(not c.is_trimmable() for c in cache)
        return
    rest = [*PROMPT, *case.plain][rows - 12 : rows - 6]
    got = [r.token for r in case.stream(4, rest, 6, prompt_cache=cache)]
    assert got == case.plain[rows - 6 - len(PROMPT) :][:6]


def test_mlx_lm_hides_kept_tokens_from_several_rows() -> None:
    # fails when it doesn't any more: then drafts need not stop where such a window is full
    cache = RotatingKVCache(max_size=8, keep=4)
    for _ in range(12):
        cache.update_and_fetch(mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)))
    assert not cache.make_mask(2)[-1, :4].all().item()
    assert cache.make_mask(1) is None  # a row sees them


@pytest.mark.parametrize("size", [30, 48])
def test_a_window_that_keeps_the_first_tokens(case: Case, size: int) -> None:
    """mlx-lm's max_kv_size, for models without caches of their own."""

    def said(mtp: int) -> list[Any]:
        cache = make_prompt_cache(case.model, max_kv_size=size)
        return list(case.stream(mtp, prompt_cache=cache))

    plain = [r.token for r in said(0)]
    opened = case.model.streamer.opened
    oracle, opened.head = opened.head, Oracle(case.model, [*PROMPT, *plain], 0.8)
    try:
        got = said(4)
    finally:
        opened.head = oracle
    assert [r.token for r in got] == plain
    # drafts are verified until it is full
    kept = getattr(make_prompt_cache(case.model, max_kv_size=size)[0], "keep", 0)
    assert any(r.from_draft for r in got) == (not kept or size > len(PROMPT))


def test_a_prompt_that_the_head_has_not_seen(case: Case) -> None:
    """Its cache starts in the middle of the sequence, whose first tokens only the trunk has run."""
    opened = case.model.streamer.opened
    oracle, opened.head = opened.head, case.head
    try:
        cache = make_prompt_cache(case.model)
        first = [r.token for r in case.stream(0, count=10, prompt_cache=cache)]
        (rows,) = {c.offset for c in cache if hasattr(c, "offset")}
        rest = [*PROMPT, *first][rows:]
        assert len(rest) == 1
        got = list(case.stream(3, rest, 20, prompt_cache=cache))
    finally:
        opened.head = oracle
    assert [r.token for r in got] == case.plain[10:30]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_many_chunks(family: str, tmp_path: Path) -> None:
    """The head has run all of it, whatever the chunks; without a prompt, the last rows only."""
    model = load_streamed(make_head(family, tmp_path), slots=32, mtp=True)
    head = model.streamer.opened.head
    assert head
    tokens = mx.array(np.random.default_rng(1).integers(0, 320, 150))
    watch(head.trunk.norm)
    model(tokens[None, :-1], cache=make_prompt_cache(model))
    states = take(head.trunk.norm, head.hidden)

    def after(step: int, *, prompt: bool) -> tuple[np.ndarray, int]:
        drafter, seen = Drafter(head, 2), []
        for at in range(0, 148, step):
            end = min(at + step, 148)
            drafter.note(states[:, at:end], tokens[at + 1 : end + 1])
            if prompt:
                drafter.catch_up(prompt=True)
        drafter.note(states[:, 148:], tokens[149:])
        drafter.draft(1, lambda row, _: seen.append(row[:, -1]) or mx.argmax(row[:, -1], -1))
        assert drafter.rows == 149
        return np.array(seen[0]), drafter.cache[0].offset

    whole, rows = after(149, prompt=True)
    assert rows == 149
    for step in (1, 37, 64):
        logits, rows = after(step, prompt=True)
        assert rows == 149 and np.abs(logits - whole).max() < 1e-4
    logits, rows = after(1, prompt=False)
    assert rows == WAITING and np.isfinite(logits).all()
    model.streamer.close()


def test_a_prompt_asks_for_no_expert_of_the_head(tmp_path: Path) -> None:
    model = load_streamed(make_head("qwen3_next", tmp_path), slots=16, mtp=True)
    head, counters = model.streamer.opened.head, model.streamer.counters
    assert head
    drafter = Drafter(head, 2)
    states = mx.array(np.random.default_rng(1).standard_normal(head.trunk.embed(ROWS).shape))

    def asked() -> int:
        return counters.hits + counters.misses

    drafter.note(states.astype(mx.float32), ROWS[0])
    drafter.catch_up(prompt=True)
    mx.eval([c.state for c in drafter.cache])
    assert asked() == 0 and drafter.cache[0].offset == 12
    drafter.note(states[:, :4].astype(mx.float32), ROWS[0, :4])
    drafter.catch_up()
    assert 0 < asked() <= model.args.num_experts_per_tok  # one row's
    model.streamer.close()


def test_a_dense_qwen3_next(tmp_path: Path) -> None:
    """No published one; its head is told from a mixture's by its tensors, as Qwen3.5's is."""
    dense = {"num_experts": 0}
    make_tiny("qwen3_next", tmp_path, changes=dense)
    rng = np.random.default_rng(6)
    shapes = HEADS["qwen3_next"](CONFIGS["qwen3_next"] | dense)
    head = {n: mx.array(rng.standard_normal(s).astype(np.float32) / 8) for n, s in shapes.items()}
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), head)
    model, _ = load(tmp_path, memory="100%", context=256, mtp=True)
    found = model.streamer.opened.head
    assert found and not model.streamer.opened.layers
    assert "up_proj" in found.units[0].blocks[0].mlp

    def tokens(speculation: Speculation | None) -> list[int]:
        cache = make_prompt_cache(model)
        steps = generate(model, PROMPT, cache, max_tokens=24, speculation=speculation)
        return [step.token for step in steps]

    speculation = Speculation(model, found, 2)
    assert tokens(speculation) == tokens(None)
    assert speculation.counters.drafted > 20
    model.streamer.close()
