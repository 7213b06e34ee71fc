"""The cost model on invented costs."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from streamer.ways import DELAY, FIRST, GUESSES, Effort, Pace, Seen, Way, Ways

pytestmark = pytest.mark.smoke
WAYS: tuple[Way, ...] = ("layerwise", "lookahead", "guess", "rehearse")


def run(ways: Ways, passes: int, cost: Callable[[Way], Seen]) -> list[Way]:
    chosen = []
    for _ in range(passes):
        way = ways.choose()
        ways.record(way, cost(way))
        chosen.append(way)
    return chosen


def lost(chosen: list[Way], seconds: dict[Way, float]) -> float:
    """Over the best way from the start."""
    return sum(seconds[way] for way in chosen) / (min(seconds.values()) * len(chosen)) - 1


@pytest.mark.parametrize("best", WAYS)
def test_it_finds_the_fastest_way_and_trials_cost_little(best: Way) -> None:
    seconds = dict.fromkeys(WAYS, 1.2) | {best: 1.0}
    chosen = run(Ways(), 600, lambda way: Seen(seconds[way], 0.3, 0.2))
    assert chosen[0] == "layerwise"
    assert chosen[200:].count(best) >= 0.97 * 400
    assert lost(chosen[200:], seconds) < 0.01
    assert lost(chosen, seconds) < (0.01 if best == "layerwise" else 0.05)


def test_nothing_is_tried_where_nothing_can_be_gained() -> None:
    slow = {"lookahead": 1.2}
    ways = Ways()
    run(ways, 100, lambda way: Seen(slow.get(way, 1.0), waited=0.05, missing=6))
    chosen = run(ways, 500, lambda way: Seen(slow.get(way, 1.0), waited=0.05, missing=6))
    assert set(chosen) == {"layerwise"}
    assert "rehearse" not in run(Ways(), 500, lambda _: Seen(1.0, waited=0.4, missing=6))


def test_served_passes_begin_by_looking_ahead_and_leave_it_where_it_loses() -> None:
    def took(ahead: float) -> list[Way]:
        seconds = {"lookahead": ahead}
        return run(Ways(), 500, lambda way: Seen(seconds.get(way, 1e-2), 4e-3, 6, served=True))

    for ahead in (0.8e-2, 1e-2, 1.2e-2):
        chosen = took(ahead)
        assert chosen[1] == "lookahead" and set(chosen) == {"layerwise", "lookahead"}
        better = "layerwise" if ahead > 1e-2 else "lookahead"
        assert chosen[50:].count(better) > 0.9 * 450


def test_what_becomes_faster_is_found_and_what_becomes_slower_left() -> None:
    ways = Ways()
    run(ways, 300, lambda way: Seen(1.0 if way == "layerwise" else 1.3, 0.3, 6))
    chosen = run(ways, 2500, lambda way: Seen(1.0 if way == "lookahead" else 1.3, 0.3, 6))
    assert chosen[-100:].count("lookahead") >= 95
    chosen = run(ways, 2500, lambda way: Seen(1.0 if way == "layerwise" else 1.3, 0.3, 6))
    assert chosen[-100:].count("layerwise") >= 95


def test_pauses_between_generations_are_no_reason_for_trials() -> None:
    calm, paused = Ways(), Ways()
    run(calm, 300, lambda _: Seen(1.0, 0.3, 6))
    for _ in range(10):
        run(paused, 30, lambda _: Seen(1.0, 0.3, 6))
        paused.record(paused.choose(), Seen(1000.0, 0.3, 6))
    assert paused._time < 1.3 * calm._time


def test_equal_ways_are_not_alternated() -> None:
    chosen = run(Ways(), 600, lambda _: Seen(1.0, 0.3, 6))
    assert sum(a != b for a, b in pairwise(chosen)) <= 12  # three trials, two turns each


def test_a_short_reply_is_not_spent_on_trials() -> None:
    chosen = run(Ways(), FIRST, lambda _: Seen(1.0, 0.3, 0.1))
    assert set(chosen) == {"layerwise"}


def test_reads_are_expected_to_take_what_they_took() -> None:
    pace = Pace()
    assert pace.left(1000, 0.0) == 0.0  # nothing is known
    for _ in range(50):
        pace.saw(1000, 2.0)
    assert pace.left(1000, 0.0) == pytest.approx(2.0)
    assert pace.left(3000, 1.0) == pytest.approx(5.0)
    assert pace.left(1000, 9.0) == 0.0
    for _ in range(100):
        pace.saw(1000, 1.0)
    assert pace.left(1000, 0.0) == pytest.approx(1.0, rel=0.01)


def test_guesses_under_way_hold_up_a_demand_no_longer_than_said() -> None:
    pace = Pace()
    assert pace.allowance() == GUESSES
    for bandwidth, expected in ((5e9, GUESSES), (1e9, DELAY * 1e9), (0.1e9, GUESSES // 4)):
        pace = Pace()
        pace.saw(1 << 20, (1 << 20) / bandwidth)
        assert pace.allowance() == pytest.approx(expected, rel=0.01)


def test_where_no_wait_is_long_enough_nothing_is_done_but_once_in_a_while() -> None:
    effort, pace = Effort(), Pace()
    for _ in range(20):
        effort.looked(1.0)
        effort.resumed(0.5)
        pace.saw(10, 0.5)
    assert pace.long() == pytest.approx(1.0)
    assert effort.worth(1.8)
    done = []
    for _ in range(900):
        done.append(effort.worth(pace.long()))
        if done[-1]:  # it still costs what it did
            effort.looked(1.0)
            effort.resumed(0.5)
    assert 1 <= done.count(True) < 30 and not any(done[:99])


def test_rehearsing_pays_only_in_time_that_is_there() -> None:
    effort = Effort()
    assert effort.pays(0.1) and not effort.pays(0.0)  # to be tried while nothing is known
    for _ in range(20):
        effort.looked(1.0)
        effort.resumed(0.5)
    assert effort.pays(1.8) and not effort.pays(1.6)
    assert effort.goes_on(1.6) and not effort.goes_on(1.4)


def test_a_hopeless_way_is_left_after_one_pass_and_a_shy_one_tries_late() -> None:
    def cost(way: Way) -> Seen:
        return Seen(2.0 if way == "lookahead" else 1.0, 0.3, 6)

    chosen = run(Ways(("layerwise", "lookahead")), 400, cost)
    assert chosen.count("lookahead") == 1
    chosen = run(Ways(("layerwise", "lookahead"), eager=False), 400, cost)
    assert "lookahead" not in chosen[:150] and chosen.count("lookahead") == 1


def test_a_way_that_only_looked_faster_is_left_soon() -> None:
    passes = 0

    def warming(way: Way) -> Seen:  # what runs later is faster, whatever it is
        nonlocal passes
        passes += 1
        slower = 1.03 if way == "lookahead" else 1.0
        return Seen(slower * (1.0 + 0.5 * 0.9**passes), 0.3, 6)

    chosen = run(Ways(("layerwise", "lookahead")), 300, warming)
    assert chosen[100:].count("layerwise") >= 180


@pytest.mark.parametrize("seed", range(20))
def test_passes_that_were_run_another_way(seed: int) -> None:
    """Whatever is recorded, a way is chosen."""
    random = Random(seed)
    ways = Ways(eager=seed % 2 == 0)
    for _ in range(300):
        way = ways.choose()
        assert way in WAYS
        ran = way if random.random() < 0.8 else random.choice(WAYS)
        ways.record(ran, Seen(*(random.choice((0.0, random.random(), 1e6)) for _ in range(4))))
