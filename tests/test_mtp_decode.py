"""Drafting changes how fast tokens come, not which: every family, every pool, every ending."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from drafting import Oracle
from families import FAMILIES, HEADS, METAL_ONLY, make_head, make_tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import kernels.sampling
from streamer import load, run, stream_generate
from streamer.engine import Timing, generate
from streamer.errors import UsageError
from streamer.loading import expert_count, load_streamed
from streamer.run import DEMO
from streamer.speculate import Speculation, why_not

PROMPT = [7, 3, 200, 5, 9, 11, 250, 31, 8] * 5
NO_ROLLBACK = {"deepseek_v41"}
SMOKE = {"qwen3_5_moe", "deepseek_v3"}


class Turns:
    """A depth that changes at every step."""

    deepest = 4

    def __init__(self, *depths: int):
        self._depths = depths or (1, 2, 3, 4, 0)
        self._at = 0

    def choose(self, limit: int) -> int:
        self._at += 1
        return min(self._depths[self._at % len(self._depths)], limit)

    def goes_on(self, confidence: float, limit: int) -> tuple[bool, bool]:
        return True, True

    def record(self, *step: Any) -> None:
        pass


class Gate(Turns):
    """Drafts of which the head is more sure than by guessing; steps of both kinds come."""

    def __init__(self) -> None:
        super().__init__(4)
        self.confidences: list[float] = []

    def goes_on(self, confidence: float, limit: int) -> tuple[bool, bool]:
        self.confidences.append(confidence)
        sure = confidence >= float(np.median(self.confidences))
        return sure, sure


def tokens_of(model: Any, count: int = 40, prompt: Sequence[int] = PROMPT, **options: Any) -> Any:
    timing, cache = Timing(), make_prompt_cache(model)
    steps = generate(model, prompt, cache, max_tokens=count, timing=timing, **options)
    return [step.token for step in steps], timing, cache


def drafting(
    model: Any,
    plain: list[int],
    *depths: int,
    share: float = 0.7,
    prompt: Sequence[int] = PROMPT,
) -> Speculation:
    head: Any = Oracle(model, [*prompt, *plain], share)
    speculation = Speculation(model, head, 4)
    speculation.depth = Turns(*depths)  # type: ignore[assignment]
    return speculation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_streamed(make_tiny("qwen3_5_moe", tmp_path_factory.mktemp("tiny")), slots=32)


@pytest.fixture(scope="module")
def plain(tiny: Any) -> list[int]:
    return tokens_of(tiny)[0]


def _families() -> list[Any]:
    cases = []
    for family in FAMILIES:
        marks = [pytest.mark.smoke] if family in SMOKE else []
        if family in METAL_ONLY and not mx.metal.is_available():
            marks.append(pytest.mark.skip(reason="mlx-lm runs this family on Metal only"))
        if family not in NO_ROLLBACK:
            cases.append(pytest.param(family, marks=marks))
    return cases


@pytest.mark.parametrize("family", _families())
def test_greedy_tokens_stay_the_same(family: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path)
    model = load_streamed(path, slots=expert_count(path) // 2)
    expected, _, _ = tokens_of(model)
    speculation = drafting(model, expected)
    got, timing, _ = tokens_of(model, speculation=speculation)
    assert got == expected
    assert timing.cached == len(PROMPT) + len(got) - 1
    counters = speculation.counters
    assert 0.4 < counters.accepted / counters.drafted < 0.9, "both must happen"


@pytest.mark.parametrize("family", sorted(HEADS))
def test_published_heads_draft(family: str, tmp_path: Path) -> None:
    model = load_streamed(make_head(family, tmp_path), slots=0, mtp=True)
    head = model.streamer.opened.head
    assert head, model.streamer.opened.head_notes
    expected, _, _ = tokens_of(model, 16)
    if why_not(model):
        pytest.skip(str(why_not(model)))
    for depth in (1, 3):
        speculation = Speculation(model, head, depth)
        got, _, _ = tokens_of(model, 16, speculation=speculation)
        assert got == expected
        assert speculation.counters.drafted > depth


@pytest.mark.parametrize("share", [100, 50, 25])
def test_the_demo_at_every_depth(share: int) -> None:
    model = load_streamed(DEMO, slots=expert_count(DEMO) * share // 100, mtp=True)
    head = model.streamer.opened.head
    prompt = list(range(40, 60))
    expected, _, _ = tokens_of(model, 256, prompt)
    for depth in (1, 2, 3, 4):
        speculation = Speculation(model, head, depth)
        got, timing, _ = tokens_of(model, 256, prompt, speculation=speculation)
        assert got == expected
        counters = speculation.counters
        assert counters.accepted > counters.drafted * 0.3
        assert counters.verify_passes + counters.accepted + counters.depths[0] == 255
        assert timing.generated_tokens == 256


SAMPLED = [
    ({"temp": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01}, {"repetition_penalty": 1.3}),
    ({"temp": 1.0}, {"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {5: 3.0}}),
    ({"temp": 1.2, "xtc_probability": 0.5, "xtc_threshold": 0.01}, {}),
    ({"temp": 0.0}, {"repetition_penalty": 1.5}),
]


@pytest.mark.parametrize("few", [kernels.sampling.FEW, 0])
@pytest.mark.parametrize(("sampling", "penalties"), SAMPLED, ids=str)
def test_a_seed_gives_the_tokens_of_plain_decoding(
    tiny: Any,
    sampling: dict[str, Any],
    penalties: dict[str, Any],
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels.sampling, "FEW", few)

    def sample(speculation: Speculation | None) -> list[int]:
        mx.random.seed(5)
        processors = make_logits_processors(**penalties)
        options = {"sampler": make_sampler(**sampling), "processors": processors}
        return tokens_of(tiny, speculation=speculation, **options)[0]

    expected = sample(None)
    for depths in ((1,), (3,), (2, 0, 4), ()):
        speculation = drafting(tiny, expected, *depths)
        if not depths:
            speculation.depth = Gate()  # type: ignore[assignment]
        assert sample(speculation) == expected
        assert speculation.counters.accepted > 5
    assert min(speculation.counters.depths[:2]) > 0, "with and without a draft worth verifying"


@pytest.mark.parametrize("few", [kernels.sampling.FEW, 0])
def test_residual_sampling_decodes(
    tiny: Any, plain: list[int], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.sampling, "FEW", few)

    def sample(seed: int) -> tuple[list[int], Speculation]:
        mx.random.seed(seed)
        speculation = drafting(tiny, plain, 3)
        options = {"sampler": make_sampler(0.5, top_k=20), "seeded": False}
        return tokens_of(tiny, speculation=speculation, **options)[0], speculation

    (first, speculation), (again, _), (other, _) = sample(1), sample(1), sample(2)
    assert first == again != other
    assert len(first) == 40
    assert speculation.counters.drafted > 30


def test_processors_are_given_what_is_before_their_row(tiny: Any, plain: list[int]) -> None:
    seen: list[list[int]] = []

    def note(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())  # type: ignore[arg-type]
        return logits

    tokens_of(tiny, speculation=drafting(tiny, plain, 3, share=1.0), processors=[note])
    whole = PROMPT + plain
    assert len(seen) > 40
    assert all(tokens == whole[: len(tokens)] for tokens in seen)


@pytest.mark.parametrize("count", range(1, 13))
def test_no_more_tokens_than_asked_for(tiny: Any, plain: list[int], count: int) -> None:
    got, timing, cache = tokens_of(tiny, count, speculation=drafting(tiny, plain, 4, share=1.0))
    assert got == plain[:count]
    assert_continues(tiny, cache, timing, got, plain)


@pytest.mark.parametrize("at", range(12))
def test_an_end_inside_a_block(tiny: Any, plain: list[int], at: int) -> None:
    stop = frozenset(plain[at : at + 1])
    end = plain.index(plain[at])
    timing, cache = Timing(), make_prompt_cache(tiny)
    speculation = drafting(tiny, plain, 4, share=0.9)
    options: Any = {"max_tokens": 40, "stop": stop, "timing": timing, "speculation": speculation}
    steps = generate(tiny, PROMPT, cache, **options)
    got = [next(steps).token for _ in range(end + 1)]
    assert got == plain[: end + 1]
    assert_continues(tiny, cache, timing, got, plain)  # though nobody asked for more
    assert not list(steps)


@pytest.mark.parametrize("at", range(1, 12))
def test_dropped_inside_a_block(tiny: Any, plain: list[int], at: int) -> None:
    timing, cache = Timing(), make_prompt_cache(tiny)
    speculation = drafting(tiny, plain, 4, share=0.9)
    steps = generate(tiny, PROMPT, cache, max_tokens=40, timing=timing, speculation=speculation)
    got = [next(steps).token for _ in range(at)]
    steps.close()
    assert got == plain[:at]
    assert_continues(tiny, cache, timing, got, plain)


def assert_continues(
    model: Any, cache: list[Any], timing: Timing, got: list[int], plain: list[int]
) -> None:
    """The cache holds exactly `timing.cached` of the tokens that are known."""
    known = PROMPT + got
    assert len(known) - 1 <= timing.cached <= len(known)
    assert {c.offset for c in cache if hasattr(c, "offset")} == {timing.cached}
    rest = known[timing.cached :]
    if rest:
        more = [s.token for s in generate(model, rest, cache, max_tokens=5)]
        assert more == plain[len(got) : len(got) + 5]


def test_logprobs_are_the_trunks(tiny: Any, plain: list[int]) -> None:
    cache, other = make_prompt_cache(tiny), make_prompt_cache(tiny)
    speculation = drafting(tiny, plain, 3)
    drafted = list(generate(tiny, PROMPT, cache, max_tokens=20, speculation=speculation))
    for a, b in zip(drafted, generate(tiny, PROMPT, other, max_tokens=20), strict=True):
        assert mx.array_equal(a.logprobs, b.logprobs)
        assert not b.drafted
    assert sum(step.drafted for step in drafted) == speculation.counters.accepted


def test_near_ties_are_counted(tiny: Any, plain: list[int]) -> None:
    def tie(tokens: mx.array, logits: mx.array) -> mx.array:
        best = logits.max(axis=-1, keepdims=True)
        return mx.where(mx.arange(320) == 319, best - 1e-6, logits)

    for processors, count in (([], 0), ([tie], 30)):
        speculation = drafting(tiny, plain, 2)
        tokens_of(tiny, speculation=speculation, processors=processors)
        assert (speculation.counters.near_ties >= 30) == (count == 30)


@pytest.mark.smoke
def test_streaming_as_mlx_lm_does(tmp_path: Path) -> None:
    path = make_head("qwen3_5_moe", tmp_path)
    model, tokenizer = load(path, memory="40%", context=128, dtype="float32", mtp=True)
    reference, _ = mlx_lm.load(str(path))
    for sampling in ({}, {"temp": 0.8, "top_p": 0.9}):
        mx.random.seed(2)
        expected = list(
            mlx_lm.stream_generate(
                reference, tokenizer, "abc def", 24, sampler=make_sampler(**sampling)
            )
        )
        for mtp in (None, 0, 3):
            mx.random.seed(2)
            sampler = make_sampler(**sampling)
            got = list(stream_generate(model, tokenizer, "abc def", 24, sampler=sampler, mtp=mtp))
            assert [r.token for r in got] == [r.token for r in expected]
            assert "".join(r.text for r in got) == "".join(r.text for r in expected)
            assert got[-1].finish_reason == expected[-1].finish_reason
            assert got[-1].generation_tokens == expected[-1].generation_tokens


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"mtp": 9}, {"mtp": -1}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    model, tokenizer = load(DEMO, memory="50%", context=128, mtp=True)
    with pytest.raises(UsageError, match=f"is {next(iter(wrong.values()))}"):
        next(stream_generate(model, tokenizer, "def ", **wrong))
    assert model.streamer.counters.misses == 0, "nothing was read"


def test_mlx_lms_own_generation_still_works(tmp_path: Path) -> None:
    path = make_head("qwen3_5_moe", tmp_path)
    model, tokenizer = load(path, memory="40%", context=128, mtp=True)
    list(stream_generate(model, tokenizer, "abc", 8, mtp=2))
    reference, _ = mlx_lm.load(str(path))
    options = {"prompt": "abc def", "max_tokens": 12}
    expected = mlx_lm.generate(reference, tokenizer, **options)
    assert mlx_lm.generate(model, tokenizer, **options) == expected


def test_without_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    argv = ["--model", str(path), "--prompt", "abc", "--max-tokens", "4", "--memory", "1GB"]
    assert run.main([*argv, "--raw", "--mtp", "auto"]) == 0
    said = capsys.readouterr()
    assert said.err.count("has no MTP head; decoding without drafts") == 1
    assert run.main([*argv, "--raw", "--mtp", "off"]) == 0
    quiet = capsys.readouterr()
    assert "MTP" not in quiet.err and quiet.out == said.out
    assert run.main([*argv, "--mtp", "2"]) == 2
    assert "--mtp 2 needs an MTP head" in capsys.readouterr().err
    for wrong in ("0", "9", "always"):
        assert run.main([*argv, "--mtp", wrong]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_what_happened_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = tmp_path / "s.json"
    argv = ["--prompt", "import os\n", "--max-tokens", "30", "--memory", "50%"]
    assert run.main([*argv, "--mtp", "2", "--stats", str(stats)]) == 0
    assert "of drafts accepted" in capsys.readouterr().err
    mtp = json.loads(stats.read_text())["mtp"]
    assert mtp["drafted"] >= mtp["accepted"] > 0
    assert mtp["verify_passes"] == sum(mtp["depth_histogram"][1:])
    assert len(mtp["depth_histogram"]) == 9
