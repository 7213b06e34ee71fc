"""Sampling in NumPy: the support, the probabilities and, but for rounding, the tokens of mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import greedy_sampler, make_sampler

from kernels import sampling
from kernels.sampling import NumpySampler, draw, faster, kept, nucleus, parts_of

Make = Callable[[np.random.Generator, int], np.ndarray]
ROWS: dict[str, Make] = {
    "random": lambda rng, n: rng.normal(size=n) * 2.5,
    "flat": lambda rng, n: rng.normal(size=n) * 0.01,
    "equal": lambda rng, n: np.zeros(n),
    "peaked": lambda rng, n: rng.normal(size=n) * 2 + 18 * (rng.random(n) < 12 / n),
    "one": lambda rng, n: rng.normal(size=n) + 40 * (np.arange(n) == n // 3),
    "ties": lambda rng, n: rng.integers(0, 9, size=n) * 1.5,
    "few are possible": lambda rng, n: np.where(rng.random(n) < 9 / n, rng.normal(size=n), -np.inf),
}
SETTINGS: list[dict[str, Any]] = [
    {"temp": 0.6},
    {"temp": 0.6, "top_p": 0.95, "top_k": 20},
    {"temp": 0.6, "top_p": 0.95},
    {"temp": 1.0, "top_p": 0.4},
    {"temp": 1.0, "top_p": 1.0, "top_k": 7},
    {"temp": 1.3, "top_p": 1e-9},
    {"temp": 1.3, "top_p": 0.999999},
    {"temp": 0.7, "top_k": 1},
    {"temp": 0.7, "top_k": 40, "min_p": 0.05},
    {"temp": 0.7, "min_p": 0.02},
    {"temp": 0.7, "min_p": 1.0},
    {"temp": 0.9, "top_p": 0.9, "top_k": 5000, "min_p": 0.001},
]


def row_of(kind: str, size: int, seed: int = 0) -> mx.array:
    logits = mx.array(ROWS[kind](np.random.default_rng(seed), size).astype(np.float32))[None]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def fast(options: dict[str, Any]) -> NumpySampler:
    sampler = faster(make_sampler(**options))
    assert isinstance(sampler, NumpySampler)
    return sampler


def expected(logprobs: mx.array, options: dict[str, Any]) -> np.ndarray:
    """Probabilities [V] of what mlx-lm's own filters leave, in double precision."""
    parts = parts_of(make_sampler(**options))
    assert parts is not None
    for keep in parts[0]:
        logprobs = keep(logprobs)
    logits = np.array(logprobs)[0].astype(np.float64) / parts[1]
    chances = np.exp(logits - logits.max())
    return chances / chances.sum()


@pytest.mark.smoke
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("size", [5003, 40_000])
def test_support_and_probabilities_are_mlx_lms(
    kind: str, options: dict[str, Any], size: int
) -> None:
    for seed in range(3):
        logprobs = row_of(kind, size, seed)
        tokens, chances = fast(options).distribution(logprobs)
        due = expected(logprobs, options)
        assert (np.diff(tokens) > 0).all()
        assert np.array_equal(tokens[due[tokens] > 0], np.flatnonzero(due))
        assert chances == pytest.approx(due[tokens], rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("kind", ["random", "peaked", "flat"])
def test_a_real_vocabulary(kind: str) -> None:
    for options in SETTINGS[:4]:
        logprobs = row_of(kind, 248_320)
        tokens, _ = fast(options).distribution(logprobs)
        assert np.array_equal(tokens, np.flatnonzero(expected(logprobs, options)))


@pytest.mark.parametrize("top_k", [1, 20, 700])
@pytest.mark.parametrize("kind", ROWS)
def test_a_nucleus_within_top_k_is_found_without_order(
    kind: str, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = np.array(row_of(kind, 20_000))[0]
    for top_p in (0.05, 0.3, 0.5, 0.8, 0.95, 0.999):
        monkeypatch.setattr(sampling, "MANY", 1 << 30)
        whole = kept(row, top_p, 0, top_k)
        monkeypatch.setattr(sampling, "MANY", 0)
        assert np.array_equal(kept(row, top_p, 0, top_k), whole)


@pytest.mark.smoke
@pytest.mark.parametrize("options", [o for o in SETTINGS if len(o) > 1], ids=str)
@pytest.mark.parametrize("kind", ["random", "peaked", "ties", "few are possible"])
def test_a_seed_gives_mlx_lms_tokens(kind: str, options: dict[str, Any]) -> None:
    logprobs = row_of(kind, 9001)
    drawn = []
    for sampler in (fast(options), make_sampler(**options)):
        mx.random.seed(3)
        drawn.append([sampler(logprobs).tolist() for _ in range(150)])
        drawn.append(mx.random.uniform().item())
    assert drawn[1] == drawn[3], "the generator is where mlx-lm leaves it"
    differ = sum(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert differ <= (6 if "top_k" not in options else 0), "but for rounding"


@pytest.mark.parametrize("size", [1, 3, 511, 512, 513, 1300])
def test_draws_are_distributed_as_chances(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(size)
    chances = (rng.random(size) * (rng.random(size) < 0.7)).astype(np.float32)
    chances[0] += 0.1
    drawn = np.empty(50_000, np.int64)
    numbers = iter((np.arange(len(drawn)) + 0.5) / len(drawn))  # each as often as it is due
    monkeypatch.setattr(mx.random, "uniform", lambda: mx.array(next(numbers)))
    for i in range(len(drawn)):
        drawn[i] = draw(chances)
    counts = np.bincount(drawn, minlength=size)
    assert abs(counts - len(drawn) * chances / chances.sum()).max() < 2
    assert not counts[chances == 0].any()


@pytest.mark.parametrize("number", [0.0, 2.0**-32, 1 - 2.0**-24])
def test_what_cannot_be_is_not_drawn(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.random, "uniform", lambda: mx.array(number))
    for size in (700, 1024):
        for seed in range(200):
            chances = np.random.default_rng(seed).random(size).astype(np.float32)
            chances[[*range(300), *range(650, size)]] = 0
            assert 300 <= draw(chances) < 650


@pytest.mark.smoke
def test_what_is_no_number() -> None:
    sampler = fast({"temp": 0.6, "top_p": 0.9, "top_k": 3})
    for wrong in (np.nan, np.inf):
        row = np.zeros((1, 10_000), np.float32)
        row[0, 77] = wrong
        assert sampler(mx.array(row)).tolist() == [77]
    assert sampler(mx.full((1, 10_000), -np.inf)).tolist() == [0]


@pytest.mark.smoke
def test_who_samples() -> None:
    assert faster(greedy_sampler) is greedy_sampler
    for temp in (1e-31, 1e-39, 5e-324):
        assert faster(make_sampler(temp, top_p=0.9)) is greedy_sampler
    for options in ({"xtc_probability": 0.5}, {"min_p": 0.1, "min_tokens_to_keep": 3}):
        theirs = make_sampler(0.7, **options)
        assert faster(theirs) is theirs
    own = lambda logprobs: mx.argmax(logprobs, axis=-1)  # noqa: E731
    assert faster(own) is own
    sampler = fast({"temp": 0.7})
    assert faster(sampler) is sampler
    assert sampler.at_once(mx.zeros((1, 10_000))) and not sampler.at_once(mx.zeros((1, 100)))
    assert not sampler.at_once(mx.zeros((2, 10_000)))
    assert sampler(mx.zeros((2, 10_000))).shape == (2,)
    assert sampler(mx.zeros((1, 10_000))).dtype == make_sampler(0.7)(mx.zeros((1, 10_000))).dtype


def test_more_than_there_are() -> None:
    logprobs = row_of("random", 9000)
    for top_k in (9000, 1 << 30):  # mlx-lm refuses these
        assert fast({"temp": 1.0, "top_k": top_k}).distribution(logprobs)[0].size == 9000
    few = fast({"temp": 1.0, "top_k": 50})
    assert few(row_of("random", 50)).item() < 50 and not few.at_once(mx.zeros((1, 51)))


def test_log_probabilities_that_do_not_sum_to_one() -> None:
    for shift in (-30.0, -2.0, 3.0):
        logprobs = row_of("peaked", 9000) + shift
        row = np.array(logprobs)[0]
        least = np.array(expected(logprobs, {"temp": 1.0, "top_p": 0.9})).nonzero()[0]
        assert nucleus(row, 0.9) == row[least].min()
