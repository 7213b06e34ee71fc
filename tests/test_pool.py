"""The slot pool's bookkeeping, against a naive model of LRU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.policies import Lru

pytestmark = pytest.mark.smoke


@given(
    slots=st.integers(2, 8),
    asks=st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 5), min_size=1, max_size=2))),
)
def test_lru_against_a_list(slots: int, asks: list[tuple[int, set[int]]]) -> None:
    pool = Lru(slots, [6, 6, 6])
    recent: list[tuple[int, int]] = []  # naive: oldest first
    for layer, experts in asks:
        need = sorted(experts)
        hits = [e for e in need if pool.slot_of[layer][e] >= 0]
        assert hits == [e for e in need if (layer, e) in recent]
        misses = [e for e in need if e not in hits]
        pool.touch(layer, hits)
        for slot, expert in zip(
            pool.take(len(misses), (layer, frozenset(hits))), misses, strict=True
        ):
            pool.place(layer, expert, slot)
        recent = [k for k in recent if k not in {(layer, e) for e in need}]
        recent = (recent + [(layer, e) for e in hits + misses])[-slots:]
        held = {(x, e) for x in range(3) for e in range(6) if pool.slot_of[x][e] >= 0}
        assert held == set(recent)
        used = [int(pool.slot_of[x][e]) for x, e in held]
        assert sorted([*used, *pool.free]) == list(range(slots))
        assert pool.resident.tolist() == [sum(x == y for y, _ in held) for x in range(3)]


def test_what_is_kept_is_not_evicted() -> None:
    pool = Lru(2, [4])
    for expert, slot in enumerate(pool.take(2)):
        pool.place(0, expert, slot)
    pool.take(1, keep=(0, frozenset({0})))
    assert pool.slot_of[0].tolist()[:2] == [0, -1]
    with pytest.raises(ValueError, match="slots asked"):
        pool.take(1, keep=(0, frozenset({0})))


def test_a_full_layer_is_covered() -> None:
    pool = Lru(3, [2, 2])
    for expert, slot in enumerate(pool.take(2)):
        pool.place(1, expert, slot)
    assert pool.covers(1) and not pool.covers(0)
    pool.evict(1, 0)
    assert not pool.covers(1)
