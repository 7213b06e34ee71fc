"""Policies, unions and guessers against naive ones."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.policies import POLICIES, Belady, Lfu, S3Fifo
from streamer.replay import rate, replay, slots_of, unions
from streamer.routes import Call, Group, Pass, Routes
from tools.guessers import GUESSERS, score

pytestmark = pytest.mark.smoke
EXPERTS = 6


def made(choices: list[list[int]], layers: int = 1, **more: Any) -> Routes:
    """One row a pass; choices[i]: of layer i % layers."""
    k = len(choices[0])
    calls = [
        Call(i // layers, i % layers, np.array([c], dtype=np.uint16)) for i, c in enumerate(choices)
    ]
    passes = [
        Pass("decode", 0, np.array([more.get("token", lambda i: i)(i)], np.int32), 1)
        for i in range(-(-len(choices) // layers))
    ]
    groups = (Group(tuple(range(layers)), 0, 100),)
    return Routes("made", "0", (EXPERTS,) * layers, layers, k, groups, 0, 0, calls, passes)


chosen = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True),
    min_size=1,
    max_size=40,
)


@given(choices=chosen, slots=st.integers(2, 2 * EXPERTS + 1), layers=st.integers(1, 2))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_accounts_for_every_choice(
    policy: str, choices: list[list[int]], slots: int, layers: int
) -> None:
    routes = made(choices, layers)
    resident: list[set[int]] = [set() for _ in range(layers)]
    misses = 0

    def on_call(call: Call, absent: np.ndarray, missed: np.ndarray) -> None:
        nonlocal misses
        assert sum(map(len, resident)) <= slots
        resident[call.layer] = set(range(EXPERTS)) - set(absent.tolist())
        assert set(missed.tolist()) == set(call.experts[0].tolist()) - resident[call.layer]
        misses += len(missed)

    found = replay(routes, [slots], policy, on_call=on_call)
    whole = slots >= EXPERTS * layers
    assert found.hits + found.misses == (0 if whole else 2 * len(choices))
    assert misses * 100 == found.bytes_read and (whole or misses == found.misses)


@given(choices=st.lists(st.integers(0, 4), min_size=1, max_size=9), slots=st.integers(1, 3))
def test_belady_is_the_least_that_any_policy_misses(choices: list[int], slots: int) -> None:
    @cache
    def least(at: int, held: frozenset[int]) -> int:
        if at == len(choices):
            return 0
        key = choices[at]
        if key in held:
            return least(at + 1, held)
        if len(held) < slots:
            return 1 + least(at + 1, held | {key})
        return 1 + min(least(at + 1, held - {v} | {key}) for v in held)

    routes = made([[c] for c in choices])
    found = replay(routes, [slots], "belady")
    assert found.misses == least(0, frozenset())
    for policy in POLICIES:
        assert replay(routes, [slots], policy).misses >= found.misses


def test_lfu_keeps_what_was_used_often() -> None:
    pool = Lfu(2, [4])
    for expert in (0, 1):
        pool.place(0, expert, *pool.take(1))
    for used in (0, 0, 1):
        pool.touch(0, [used])
    pool.place(0, 2, *pool.take(1))
    assert [e for e in range(4) if pool.slot_of[0][e] >= 0] == [0, 2]


def test_s3_fifo_sends_a_scan_through_the_small_queue() -> None:
    pool = S3Fifo(10, [40])
    for expert in range(10):
        pool.place(0, expert, *pool.take(1))
    pool.touch(0, [0, 1, 2])
    for expert in range(10, 30):  # used once each
        pool.place(0, expert, *pool.take(1))
    assert all(pool.slot_of[0][:3] >= 0)
    (slot,) = pool.take(1)
    lost = max(e for e in range(30) if pool.slot_of[0][e] < 0)
    pool.place(0, lost, slot)
    assert (0, lost) in pool._main and (0, 29) in pool._small, "a ghost comes back to stay"


def test_s3_fifo_spares_what_is_kept() -> None:
    pool = S3Fifo(3, [6])
    for expert in range(3):
        pool.place(0, expert, *pool.take(1))
    pool.take(1, keep=(0, frozenset({0, 1})))
    assert pool.slot_of[0].tolist()[:3].count(-1) == 1 and pool.slot_of[0][2] == -1
    with pytest.raises(ValueError, match="slots asked"):
        pool.take(2, keep=(0, frozenset({0, 1})))


def test_belady_needs_to_be_advanced() -> None:
    future = [(0, np.array([0])), (0, np.array([1])), (0, np.array([0]))]
    pool = Belady(1, [2], future)
    pool.advance()
    assert pool._next[0].tolist() == [2, 1]
    pool.advance()
    assert pool._next[0].tolist() == [2, 4]


def test_unions_against_sets() -> None:
    rng = np.random.default_rng(1)
    choices = [rng.permutation(EXPERTS)[:2].tolist() for _ in range(30)]
    found = unions(made(choices, layers=2), 4)
    for depth in range(1, 5):
        sizes = [
            len(set(itertools.chain(*rows[i : i + depth]))) / 2
            for rows in (choices[0::2], choices[1::2])
            for i in range(len(rows) - depth + 1)
        ]
        assert found[depth - 1] == pytest.approx(np.mean(sizes))


def test_a_rate_of_nothing_is_one() -> None:
    assert (rate(0, 0), rate(1, 3)) == (1.0, 0.25)
    assert slots_of(made([[0, 1]], 2), 0.0) == (2,)
    assert slots_of(made([[0, 1]], 2), 1.0) == (12,)


def test_guessers_name_what_they_have_seen() -> None:
    # tokens alternate, and each has its experts: only a memory by token knows what comes
    choices = [[0, 1] if i % 2 else [2, 3] for i in range(40)]
    found = {s.guesser: s for s in score(made(choices, token=lambda i: i % 2), [2])}
    assert set(found) == set(GUESSERS)
    assert found["token"].precision == 1.0
    assert found["token"].recall == 0.9  # each came twice before
    assert found["previous"].recall == 0.0
    assert found["frequency"].recall > 0.9
    assert all(s.misses == 80 for s in found.values())
