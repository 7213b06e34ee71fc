"""The runtime's eviction order, against sums over the whole history."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.lrfu import DECAY, Lrfu
from streamer.policies import Lru

pytestmark = pytest.mark.smoke

LAYERS, EXPERTS, TOP_K = 3, 6, 2
rows = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True),
    min_size=1,
    max_size=2,
)


@given(slots=st.integers(4, 9), calls=st.lists(st.tuples(st.integers(0, LAYERS - 1), rows)))
def test_against_the_history(slots: int, calls: list[tuple[int, list[list[int]]]]) -> None:
    pool = Lrfu(slots, [EXPERTS] * LAYERS)
    held: set[tuple[int, int]] = set()  # naive
    history: list[list[list[int]]] = [[] for _ in range(LAYERS)]

    def wait(at: int, key: tuple[int, int]) -> float:
        """Rows until the expert's next use, as expected."""
        layer, expert = key
        share = sum(
            (1 - DECAY) * DECAY**age
            for age, chosen in enumerate(reversed(history[layer]))
            if expert in chosen
        )
        turn = (layer - at) % LAYERS or LAYERS
        return 1 / max(share, 1e-9) + turn / LAYERS

    for layer, chosen in calls:
        need = sorted({e for row in chosen for e in row})
        history[layer] += chosen
        pool.chose(layer, np.array(chosen))
        hits = [e for e in need if (layer, e) in held]
        misses = [e for e in need if e not in hits]
        pool.touch(layer, hits)
        free = slots - len(held)
        others = sorted(held - {(layer, e) for e in hits}, key=lambda k: -wait(layer, k))
        given_up = others[: max(0, len(misses) - free)]
        taken = pool.take(len(misses), (layer, frozenset(hits)))
        for slot, expert in zip(taken, misses, strict=True):
            pool.place(layer, expert, slot)
        now = {(x, e) for x in range(LAYERS) for e in range(EXPERTS) if pool.slot_of[x][e] >= 0}
        assert len(now) == len(held) - len(given_up) + len(misses)
        # waits that round alike may change places
        gone = held - now
        assert np.allclose(
            sorted(wait(layer, k) for k in gone), sorted(wait(layer, k) for k in given_up)
        )
        held = now
        few, every = ([wait(layer, k) for k in pool.victims(n)] for n in (2, None))
        assert np.allclose(few, every)


def filled(slots: int = 4) -> Lrfu:
    pool = Lrfu(slots, [slots, slots])
    for expert, slot in enumerate(pool.take(slots)):
        pool.place(0, expert, slot)
    pool.chose(0, np.array([[0, 1], [0, 2], [0, 1]]))
    return pool


def test_what_is_chosen_most_stays_longest() -> None:
    assert [e for _, e in filled().victims()] == [3, 2, 1, 0]


def test_what_came_unasked_goes_first_and_what_is_expected_last() -> None:
    pool = filled()
    pool.unused(0, 1)
    pool.expect(0, [3])
    assert [e for _, e in pool.victims()] == [1, 2, 0, 3]
    pool.touch(0, [1])
    pool.expect_nothing()
    assert [e for _, e in pool.victims()] == [3, 2, 1, 0]


def test_the_layers_just_run_go_before_those_ahead() -> None:
    pool = Lrfu(4, [1] * 4)
    for layer, slot in enumerate(pool.take(4)):
        pool.chose(layer, np.array([[0]]))
        pool.place(layer, 0, slot)
    pool.chose(1, np.array([[0]]))
    for layer in (0, 2, 3):
        pool.heat(layer)[:] = pool.heat(1)
    assert [layer for layer, _ in pool.victims()] == [1, 0, 3, 2]


def test_a_cycle_larger_than_the_pool() -> None:
    """Least recently used hits nothing in it."""
    hits = {}
    for kind in (Lru, Lrfu):
        pool, count = kind(24, [8] * 4), 0
        for _ in range(20):
            for layer in range(4):
                ids = np.arange(8)[None]
                pool.chose(layer, ids)
                there = np.flatnonzero(pool.slot_of[layer] >= 0)
                count += len(there)
                pool.touch(layer, there)
                absent = np.flatnonzero(pool.slot_of[layer] < 0).tolist()
                slots = pool.take(len(absent), (layer, frozenset(there.tolist())))
                for expert, slot in zip(absent, slots, strict=True):
                    pool.place(layer, expert, slot)
        hits[kind] = count / (20 * 32)
    assert hits[Lru] == 0 and hits[Lrfu] > 0.5
