"""The depth controller on simulated costs: it finds what is best and pays little to know."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from mtp.depth import DEEPEST, Depth, Fixed

Cost = Callable[[int], float]


class Machine:
    """Passes over k drafts that cost `cost(k)` seconds, a tenth of it random.

    Drafts cost `draft` each and stand with the chance that the head gives, or with its
    square root where it is too modest.
    """

    def __init__(
        self,
        cost: Cost,
        draft: float,
        chance: float,
        *,
        spread: float = 1.0,
        modest: bool = False,
        noise: float = 0.1,
        seed: int = 0,
    ):
        self.cost, self.draft, self.chance, self.spread = cost, draft, chance, spread
        self.modest, self.noise = modest, noise
        self._random = random.Random(seed)
        self.verified = [0] * (DEEPEST + 1)

    def confidence(self) -> float:
        """Mean `chance`; spread 0: always the same."""
        if not self.spread or self.chance in (0.0, 1.0):
            return self.chance
        return self._random.betavariate(
            2 * self.chance / self.spread, 2 * (1 - self.chance) / self.spread
        )

    def stands(self, confidence: float) -> float:
        return confidence**0.5 if self.modest else confidence

    def noisy(self, seconds: float) -> float:
        seconds *= 1 + self.noise * self._random.uniform(-1, 1)
        # another program, a flush to disk
        return seconds * (6 if self._random.random() < 0.01 else 1)

    def run(self, depth: Depth | Fixed, steps: int) -> float:
        """Tokens expected per second of what was chosen in `steps` steps."""
        tokens = seconds = 0.0
        self.verified = [0] * (DEEPEST + 1)
        for _ in range(steps):
            limit = depth.choose(8)
            chances: list[float] = []
            drafts = 0
            more = limit > 0
            while more:
                drafts += 1
                confidence = self.confidence()
                keep, more = True, drafts < limit
                if isinstance(depth, Depth):
                    keep, more = depth.goes_on(confidence, limit)
                if keep:
                    chances.append(self.stands(confidence))
            stood, chance = 0, 1.0
            tokens += 1
            for i, one in enumerate(chances):
                chance *= one
                tokens += chance
                if stood == i and self._random.random() < one:
                    stood += 1
            k = len(chances)
            self.verified[k] += 1
            seconds += self.cost(k) + drafts * self.draft
            depth.record(
                k,
                stood,
                self.noisy(self.cost(k)),
                tuple(self.noisy(self.draft) for _ in range(drafts)),
            )
        return tokens / seconds

    def plain(self) -> float:
        return 1 / self.cost(0)

    def best(self) -> float:
        """Of plain decoding and all fixed depths."""
        other = Machine(
            self.cost, self.draft, self.chance, spread=self.spread, modest=self.modest, seed=99
        )
        return max(other.run(Fixed(k), 4000) for k in range(DEEPEST + 1))


MACHINES: dict[str, Callable[[int], Machine]] = {
    "rows are free": lambda s: Machine(lambda k: 0.020 + 0.0005 * k, 0.0005, 0.8, seed=s),
    "a GPU": lambda s: Machine(lambda k: 0.020 + 0.002 * k, 0.002, 0.7, seed=s),
    "a CPU, linear in rows": lambda s: Machine(
        lambda k: 0.020 * (1 + 0.85 * k), 0.003, 0.75, seed=s
    ),
    "rows cost half": lambda s: Machine(lambda k: 0.010 + 0.005 * k, 0.0015, 0.85, seed=s),
    "every row reads its own experts": lambda s: Machine(
        lambda k: 0.050 + 0.045 * k, 0.004, 0.6, seed=s
    ),
    "a dear draft": lambda s: Machine(lambda k: 0.020 + 0.001 * k, 0.02, 0.9, seed=s),
    "drafts never stand": lambda s: Machine(lambda k: 0.020 + 0.004 * k, 0.002, 0.02, seed=s),
    "drafts always stand": lambda s: Machine(lambda k: 0.020 + 0.006 * k, 0.002, 1.0, seed=s),
    "a modest head": lambda s: Machine(
        lambda k: 0.020 + 0.008 * k, 0.002, 0.6, modest=True, seed=s
    ),
    "every draft as sure as the others": lambda s: Machine(
        lambda k: 0.020 + 0.004 * k, 0.002, 0.7, spread=0, seed=s
    ),
    "a cliff after 3": lambda s: Machine(
        lambda k: 0.020 + 0.002 * k + (0.05 if k > 3 else 0), 0.002, 0.85, seed=s
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("seed", range(3))
def test_as_fast_as_the_best_depth(name: str, seed: int) -> None:
    machine = MACHINES[name](seed)
    depth = Depth()
    assert machine.run(depth, 64) > 0.96 * machine.plain(), machine.verified  # finding out
    machine.run(depth, 300)
    assert machine.run(depth, 2000) > 0.97 * machine.best(), machine.verified


@pytest.mark.parametrize("name", ["a CPU, linear in rows", "drafts never stand", "a dear draft"])
def test_knowing_costs_less_than_a_hundredth(name: str) -> None:
    machine = MACHINES[name](0)
    machine.noise = 0.0
    depth = Depth()
    machine.run(depth, 150)
    assert machine.run(depth, 8000) > 0.99 * machine.plain(), machine.verified


def test_better_than_any_fixed_depth_where_the_head_knows() -> None:
    machine = MACHINES["rows cost half"](0)
    depth = Depth()
    machine.run(depth, 300)
    assert machine.run(depth, 4000) > 1.03 * machine.best(), machine.verified


def test_it_recovers_when_drafting_comes_to_pay() -> None:
    machine = Machine(lambda k: 0.020 + 0.003 * k, 0.002, 0.02)
    depth = Depth()
    assert machine.run(depth, 1500) > 0.98 * machine.plain(), machine.verified
    machine.chance = 0.85
    machine.run(depth, 600)
    assert machine.run(depth, 1500) > 0.95 * machine.best(), machine.verified


def test_it_falls_back_when_drafting_comes_to_lose() -> None:
    machine = Machine(lambda k: 0.020 + 0.003 * k, 0.002, 0.85)
    depth = Depth()
    machine.run(depth, 1500)
    assert machine.verified[0] < 0.1 * sum(machine.verified)
    machine.cost = lambda k: 0.020 + 0.060 * k
    machine.run(depth, 500)
    assert machine.run(depth, 3000) > 0.97 * machine.plain(), machine.verified


def test_it_finds_that_plain_steps_have_become_cheap() -> None:
    machine = Machine(lambda k: 0.1 + 0.002 * k, 0.003, 0.6)  # a cold pool: mostly reading
    depth = Depth()
    machine.run(depth, 300)
    machine.cost = lambda k: 0.010 * (1 + k)
    machine.run(depth, 600)
    assert machine.run(depth, 1500) > 0.95 * machine.plain(), machine.verified


def test_in_doubt_it_stays_plain() -> None:
    """Steps that wait for a disk differ by half, and a few say little of a tenth."""
    of_plain = []
    for seed in range(12):
        machine = Machine(lambda k: 0.020 + 0.018 * k, 0.002, 0.8, noise=0.9, seed=seed)
        of_plain.append(machine.run(Depth(), 640) / machine.plain())
    assert sum(of_plain) / len(of_plain) > 0.98, of_plain


@pytest.mark.smoke
def test_limits() -> None:
    depth = Depth()
    machine = Machine(lambda k: 0.02 + 0.0001 * k, 0.0001, 1.0)
    machine.run(depth, 500)
    assert machine.verified[DEEPEST] > 400
    assert all(depth.choose(limit) <= limit for limit in (3, 1, 0))
    assert [Fixed(4).choose(limit) for limit in (8, 4, 2, 0)] == [4, 4, 2, 0]
    depth.choose(1)
    assert depth.goes_on(1.0, 1) == (True, False)


def test_choosing_takes_microseconds() -> None:
    machine, depth = Machine(lambda k: 0.02 + 0.002 * k, 0.002, 0.7), Depth()
    machine.run(depth, 1000)
    began = time.process_time()
    for _ in range(1000):
        if depth.choose(8):
            depth.goes_on(0.9, 8)
            depth.record(1, 1, 0.02, (0.002,))
        else:
            depth.record(0, 0, 0.02, ())
    assert (time.process_time() - began) / 1000 < 0.0002, "1% of a step of 20 ms"
