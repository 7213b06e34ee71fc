"""Acceptance: sampled tokens are distributed as the trunk's own, and a wrong rule is found out."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from drafting import Rows
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors, make_sampler

from kernels.sampling import NumpySampler, faster
from mtp.head import Trunk
from mtp.verify import Residual, Shared, Sparse, accept, filters_of, likeliest, near_tie, rule_for
from streamer.engine import generate
from streamer.speculate import Speculation

VOCABULARY, DRAWS, DEPTH = 12, 24_000, 3
SETTINGS: list[dict[str, Any]] = [
    {"temp": 1.0},
    {"temp": 0.7, "top_p": 0.9},
    {"temp": 1.3, "top_k": 5},
    {"temp": 0.9, "min_p": 0.1, "top_p": 0.95, "top_k": 8},
]
Accept = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


def chains(rule: Accept, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """DRAWS chains of 3 tokens by verify passes of DEPTH drafts, and the true transitions.

    The trunk and the head are tables: the next token's logits after each token.
    """
    rng = np.random.default_rng(4)
    trunk = rng.normal(size=(VOCABULARY, VOCABULARY)) * 1.5
    head = trunk + rng.normal(size=trunk.shape) * 1.2
    known = filters_of(make_sampler(**options))
    assert known is not None
    residual = Residual(*known)
    logits = mx.array(np.stack([trunk, head]).astype(np.float32))
    table = residual._distribution(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    p_of, q_of = table[0], table[1]
    out = np.zeros((DRAWS, 3 + DEPTH + 1), dtype=np.int64)
    length = np.zeros(DRAWS, dtype=np.int64)
    last = mx.zeros(DRAWS, dtype=mx.int32)
    while length.min() < 3:
        inputs = [last]
        for _ in range(DEPTH):
            inputs.append(mx.random.categorical(mx.log(q_of[inputs[-1]])).astype(mx.int32))
        rows = mx.stack(inputs, axis=1)
        stood, tokens = rule(p_of[rows], q_of[rows[:, :-1]], rows[:, 1:])
        count, chosen = np.array(stood) + 1, np.array(tokens)
        for i in range(DEPTH + 1):
            more = (i < count) & (length < 3)
            out[more, length[more]] = chosen[more, i]
            length[more] += 1
        last = mx.array(out[np.arange(DRAWS), length - 1].astype(np.int32))
    return out[:, :3], np.array(p_of).astype(np.float64)


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of a chi-square test (Wilson and Hilferty's approximation); rare cells are put together."""
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    due = np.append(expected[~rare], expected[rare].sum())
    seen, due = seen[due > 0], due[due > 0]
    freedom = len(due) - 1
    statistic = ((seen - due) ** 2 / due).sum()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return math.erfc(z / math.sqrt(2)) / 2


def p_values(rule: Accept, options: dict[str, Any]) -> list[float]:
    """Of the three positions and of both pairs of neighbours."""
    mx.random.seed(11)
    tokens, p = chains(rule, options)
    at = np.eye(VOCABULARY)[0]
    values = []
    for position in range(3):
        pairs = at[:, None] * p
        if position:
            cells = tokens[:, position - 1] * VOCABULARY + tokens[:, position]
            counts = np.bincount(cells, minlength=VOCABULARY**2)
            values.append(p_value(counts, DRAWS * pairs.reshape(-1)))
        at = at @ p
        counts = np.bincount(tokens[:, position], minlength=VOCABULARY)
        values.append(p_value(counts, DRAWS * at))
    return values


def sample_again(p: mx.array, q: mx.array, drafts: mx.array) -> tuple[mx.array, mx.array]:
    """Wrong: a rejected draft is replaced from p instead of the residual."""
    stood, tokens = accept(p, q, drafts)
    instead = mx.random.categorical(mx.log(p)).astype(drafts.dtype)
    return stood, mx.where(mx.arange(p.shape[-2]) >= stood[..., None], instead, tokens)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_sampled_tokens_are_distributed_as_the_trunks(options: dict[str, Any]) -> None:
    values = p_values(accept, options)
    assert min(values) > 0.01, values


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_wrong_rule_is_found_out(options: dict[str, Any]) -> None:
    assert min(p_values(sample_again, options)) < 1e-6


@pytest.mark.smoke
def test_acceptance_is_the_overlap_of_p_and_q() -> None:
    p = mx.array([[0.5, 0.3, 0.2, 0.0], [0.25] * 4])
    q = mx.array([[0.2, 0.3, 0.1, 0.4]])
    mx.random.seed(0)
    drafts = mx.random.categorical(mx.log(mx.broadcast_to(q, (40_000, 1, 4))))
    stood, tokens = accept(
        mx.broadcast_to(p, (40_000, 2, 4)), mx.broadcast_to(q, (40_000, 1, 4)), drafts
    )
    overlap = float(mx.minimum(p[:1], q).sum().item())
    assert float(stood.mean().item()) == pytest.approx(overlap, abs=0.01)
    assert not mx.any(tokens[:, 0] == 3).item(), "the trunk never says 3"


def test_equal_distributions_always_accept() -> None:
    p = mx.softmax(mx.random.normal((500, 4, 9)), axis=-1)
    drafts = mx.random.categorical(mx.log(p[:, :3]))
    stood, _ = accept(p, p[:, :3], drafts)
    assert mx.all(stood == 3).item()


@pytest.mark.parametrize(
    "options", [*SETTINGS, {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05}], ids=str
)
def test_shared_noise_gives_the_tokens_of_plain_sampling(options: dict[str, Any]) -> None:
    sampler = make_sampler(**options)
    rng = np.random.default_rng(2)
    trunk = mx.array(rng.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) * 2)
    head = trunk + mx.array(rng.normal(size=trunk.shape).astype(np.float32))

    def row(table: mx.array, token: mx.array) -> mx.array:
        logits = table[token]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    mx.random.seed(9)
    token, plain = mx.array([0]), []
    for _ in range(200):
        token = sampler(row(trunk, token))
        plain.append(int(token.item()))  # type: ignore[arg-type]
    mx.random.seed(9)
    token, got, stood_in_all = mx.array([0]), [], 0
    rule = Shared(sampler)
    while len(got) < 200:
        rule.begin()
        inputs = [token]
        for _ in range(3):
            inputs.append(rule.draft(row(head, inputs[-1])))
        drafts = mx.concatenate(inputs[1:])
        stood, tokens = rule.accept(drafts, [row(trunk, t) for t in inputs])
        emitted = int(stood.item()) + 1  # type: ignore[arg-type]
        stood_in_all += emitted - 1
        got += tokens[:emitted].tolist()  # type: ignore[arg-type]
        rule.end(emitted)
        token = tokens[emitted - 1 : emitted]
    assert got[:200] == plain
    assert stood_in_all > 60, "the noise is not shared"


@pytest.mark.smoke
def test_which_rule_and_what_mlx_lms_samplers_hold() -> None:
    # fails when mlx-lm's make_sampler changes inside: then residual acceptance is no longer used
    known = filters_of(make_sampler(0.7, top_p=0.9, min_p=0.02, top_k=5))
    assert known is not None and len(known[0]) == 3 and known[1] == 0.7
    assert filters_of(make_sampler(0.7, xtc_probability=0.1)) is None
    assert filters_of(lambda logprobs: mx.argmax(logprobs, axis=-1)) is None
    assert isinstance(rule_for(make_sampler(0.7), seeded=False), Residual)
    assert isinstance(rule_for(make_sampler(0.7), seeded=True), Shared)
    assert isinstance(rule_for(faster(make_sampler(0.7)), seeded=False), Sparse)
    assert isinstance(rule_for(faster(make_sampler(0.7)), seeded=True), Shared)
    assert isinstance(rule_for(lambda x: x, seeded=False), Shared)
    assert rule_for(make_sampler(0.0), seeded=False).greedy
    assert rule_for(greedy_sampler, seeded=True).greedy
    assert not rule_for(make_sampler(0.7), seeded=True).greedy


def test_residual_filters_as_the_sampler_does() -> None:
    logprobs = mx.log(mx.softmax(mx.random.normal((1, 40)) * 2, axis=-1))
    sampler = make_sampler(0.8, top_p=0.7, top_k=6)
    known = filters_of(sampler)
    assert known is not None
    probable = np.array(Residual(*known)._distribution(logprobs))[0]
    drawn = {int(sampler(logprobs).item()) for _ in range(400)}  # type: ignore[arg-type]
    assert drawn == set(np.flatnonzero(probable).tolist())


def test_near_ties() -> None:
    def near(*logits: float, dtype: mx.Dtype = mx.float32) -> bool:
        row = mx.array([logits]).astype(dtype)
        return bool(near_tie(row, row - mx.logsumexp(row, axis=-1, keepdims=True)).item())

    assert near(3.0, 20.0, 20.0001)
    assert not near(3.0, 20.0, 20.01)
    assert near(3.0, 20.0, 20.125, dtype=mx.bfloat16)


@pytest.mark.smoke
@pytest.mark.parametrize("size", [1, 7, 16, 2048, 50_001])
def test_the_likeliest_are_those_of_log_probabilities(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = mx.array(rng.normal(size=(1, 5, size), scale=6).astype(np.float32))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    found = likeliest(logits, confident=True)
    assert [one.token for one in found] == mx.argmax(logprobs, axis=-1)[0].tolist()
    assert [one.near for one in found] == near_tie(logits[0], logprobs[0]).tolist()
    shares = mx.exp(logprobs.max(axis=-1))[0].tolist()
    assert [one.confidence for one in found] == pytest.approx(shares, rel=1e-4)


@pytest.mark.parametrize("apart", [0.0, 1e-7, 2e-6, 1e-5, 1e-3])
def test_rounding_of_log_probabilities_decides_between_likely_tokens(apart: float) -> None:
    values = np.full((64, 300), -4.0, np.float32)
    most = np.linspace(0.5, 9.0, 64, dtype=np.float32)
    values[:, 20] = most
    values[:, 10] = most * np.float32(1 - apart)  # less, but alike once it is rounded
    logits = mx.array(values)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    found = likeliest(logits)
    assert [one.token for one in found] == mx.argmax(logprobs, axis=-1).tolist()
    assert [one.near for one in found] == near_tie(logits, logprobs).tolist()


class Table(nn.Module):
    """A language model that looks at the last token only, and its MTP head, another table."""

    depth, hidden = 1, "post_norm"

    def __init__(self, trunk: np.ndarray, head: np.ndarray):
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.tables = mx.array(np.stack([trunk, head]).astype(np.float32))
        self.trunk = Trunk(self, self.norm, lambda tokens: tokens, lambda hidden: hidden)
        self.streamer = SimpleNamespace(
            budget=SimpleNamespace(chunk=8),
            executors=[],
            resident=True,
            watch=None,
            check=lambda: None,
        )

    def __call__(self, tokens: mx.array, *rest: Any, cache: Any = None, **options: Any) -> Any:
        if cache is None:  # as the head: hidden states, tokens, cache
            logits = self.tables[1][rest[0]]
            return logits[:, -1:] if options.get("last") else logits, tokens
        rows = mx.zeros((1, 1, tokens.shape[1], 1))
        cache[0].update_and_fetch(rows, rows)
        self.norm(mx.ones((*tokens.shape, 4)))
        return self.tables[0][tokens]

    def make_cache(self) -> list[Any]:
        return [Rows()]

    def cache_of(self, cache: list[Any], step: int) -> list[Any]:
        return cache


class Sure:
    """Verifies drafts that the head was sure of before it drew them."""

    deepest = 3

    def choose(self, limit: int) -> int:
        return min(3, limit)

    def goes_on(self, confidence: float, limit: int) -> tuple[bool, bool]:
        return confidence > 0.4, confidence > 0.4

    def record(self, *step: Any) -> None:
        pass


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_few_candidates_are_accepted_as_all_are(options: dict[str, Any]) -> None:
    sampler = faster(make_sampler(**options))
    assert isinstance(sampler, NumpySampler)
    known = filters_of(make_sampler(**options))
    assert known is not None
    whole, few = Residual(*known), rule_for(sampler, seeded=False)
    assert isinstance(few, Sparse)
    rng = np.random.default_rng(8)
    for seed in range(200):
        logits = mx.array(rng.normal(size=(2 * DEPTH + 1, VOCABULARY)).astype(np.float32) * 3)
        rows = [*mx.split(logits - mx.logsumexp(logits, axis=-1, keepdims=True), len(logits))]
        got = []
        for rule in (few, whole):
            mx.random.seed(seed)
            rule.begin()
            drafts = mx.concatenate([rule.draft(row) for row in rows[:DEPTH]]).astype(mx.int32)
            stood, tokens = rule.accept(drafts, rows[DEPTH:])
            got.append((drafts.tolist(), stood.item(), tokens.tolist()[: int(stood.item())]))  # type: ignore[arg-type]
            possible = np.array(whole._distribution(rows[DEPTH + int(stood.item())]))[0]  # type: ignore[arg-type]
            assert possible[int(tokens[stood].item())] > 0  # type: ignore[arg-type]
        assert got[0] == got[1]


@pytest.mark.parametrize(
    ("gated", "filters"),
    [(False, {"top_k": 6}), (True, {"top_k": 6}), (False, {"top_p": 0.97, "min_p": 0.02})],
    ids=str,
)
def test_the_engines_tokens_are_distributed_as_the_trunks(
    gated: bool, filters: dict[str, Any]
) -> None:
    rng = np.random.default_rng(3)
    trunk = rng.normal(size=(8, 8))
    model: Any = Table(trunk, trunk + rng.normal(size=trunk.shape))
    sampler, bias = make_sampler(0.8, **filters), {2: 1.0}
    known = filters_of(sampler)
    assert known is not None
    logits = model.tables[0] + mx.array([1.0 if i == 2 else 0.0 for i in range(8)])
    true = np.array(
        Residual(*known)._distribution(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    )
    mx.random.seed(1)
    speculation = Speculation(model, model, 3)
    if gated:
        speculation.depth = Sure()  # type: ignore[assignment]
    steps = generate(
        model,
        [0, 1],
        [KVCache()],
        max_tokens=6000,
        sampler=sampler,
        processors=make_logits_processors(logit_bias=bias),
        speculation=speculation,
        seeded=False,
    )
    tokens = np.array([step.token for step in steps])
    assert 0.3 < speculation.counters.accepted / speculation.counters.drafted < 0.9
    assert not gated or min(speculation.counters.depths[:4]) > 100
    pairs = np.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64).reshape(8, 8)
    expected = pairs.sum(axis=1, keepdims=True) * true.astype(np.float64)
    assert p_value(pairs.reshape(-1), expected.reshape(-1)) > 0.01
