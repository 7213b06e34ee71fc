"""The depth controller on simulated costs: it finds the best depth and pays little to know."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from mtp.depth import DEEPEST, Depth, Fixed

Cost = Callable[[int], float]


class Machine:
    """Steps that cost `cost(depth)` seconds, `noise` of it random, whose drafts stand so often."""

    def __init__(self, cost: Cost, acceptance: float, noise: float = 0.1, seed: int = 0):
        self.cost, self.acceptance, self.noise = cost, acceptance, noise
        self._random = random.Random(seed)
        self.depths = [0] * (DEEPEST + 1)

    def step(self, depth: int) -> tuple[int, float]:
        stood = 0
        while stood < depth and self._random.random() < self.acceptance:
            stood += 1
        seconds = self.cost(depth) * (1 + self.noise * self._random.uniform(-1, 1))
        if self._random.random() < 0.01:
            seconds *= 6  # another program, a flush to disk
        return stood, seconds

    def run(self, depth: Depth | Fixed, steps: int) -> float:
        """Expected tokens per second of the depths chosen in `steps` steps, luck left out."""
        tokens = seconds = 0.0
        self.depths = [0] * (DEEPEST + 1)
        for _ in range(steps):
            k = depth.choose(8)
            depth.record(k, *self.step(k))
            self.depths[k] += 1
            tokens += self.tokens(k)
            seconds += self.cost(k)
        return tokens / seconds

    def tokens(self, depth: int) -> float:
        return sum(self.acceptance**i for i in range(depth + 1))

    def best(self) -> float:
        return max(self.tokens(k) / self.cost(k) for k in range(DEEPEST + 1))

    def plain(self) -> float:
        return 1 / self.cost(0)


# seconds of a step at depth k
MACHINES: dict[str, tuple[Cost, float]] = {
    "rows are free": (lambda k: 0.020 + 0.0005 * k, 0.8),
    "a GPU": (lambda k: 0.020 + 0.002 * k, 0.7),
    "a CPU, linear in rows": (lambda k: 0.020 * (1 + 0.85 * k), 0.75),
    "every row reads its own experts": (lambda k: 0.050 + 0.045 * k, 0.6),
    "the first draft is dear": (lambda k: 0.020 + (0.02 + 0.001 * k if k else 0), 0.9),
    "drafts never stand": (lambda k: 0.020 + 0.004 * k, 0.02),
    "drafts always stand": (lambda k: 0.020 + 0.006 * k, 1.0),
    "a cliff after 3": (lambda k: 0.020 + 0.002 * k + (0.05 if k > 3 else 0), 0.85),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("seed", range(3))
def test_as_fast_as_the_best_depth(name: str, seed: int) -> None:
    machine = Machine(*MACHINES[name], seed=seed)
    depth = Depth()
    assert machine.run(depth, 300) > 0.85 * machine.plain(), machine.depths  # finding out
    assert machine.run(depth, 3000) > 0.97 * machine.best(), machine.depths


@pytest.mark.parametrize("name", ["a CPU, linear in rows", "drafts never stand"])
def test_knowing_costs_less_than_a_hundredth(name: str) -> None:
    machine = Machine(*MACHINES[name], noise=0.0)
    depth = Depth()
    machine.run(depth, 150)
    assert machine.run(depth, 8000) > 0.99 * machine.plain(), machine.depths


def test_it_recovers_when_drafting_comes_to_pay() -> None:
    machine = Machine(lambda k: 0.020 + 0.003 * k, 0.02)
    depth = Depth()
    assert machine.run(depth, 1500) > 0.98 * machine.plain(), machine.depths
    machine.acceptance = 0.85
    machine.run(depth, 500)
    assert machine.run(depth, 1500) > 0.95 * machine.best(), machine.depths


def test_it_falls_back_when_drafting_comes_to_lose() -> None:
    machine = Machine(lambda k: 0.020 + 0.003 * k, 0.85)
    depth = Depth()
    machine.run(depth, 1500)
    assert machine.depths[0] < 0.05 * sum(machine.depths)
    machine.cost = lambda k: 0.020 + 0.060 * k
    machine.run(depth, 1000)  # every depth was cheap once and is tried again
    assert machine.run(depth, 3000) > 0.97 * machine.plain(), machine.depths


def test_it_finds_that_plain_steps_have_become_cheap() -> None:
    machine = Machine(lambda k: 0.1 + 0.002 * k, 0.6)  # a cold pool: reading is most of a step
    depth = Depth()
    machine.run(depth, 300)
    machine.cost = lambda k: 0.010 * (1 + k)
    machine.run(depth, 600)
    assert machine.run(depth, 1500) > 0.95 * machine.plain(), machine.depths


@pytest.mark.smoke
def test_limits() -> None:
    depth = Depth()
    machine = Machine(lambda k: 0.02 + 0.0001 * k, 1.0)
    machine.run(depth, 500)
    assert depth.choose(100) == DEEPEST
    assert [depth.choose(limit) for limit in (3, 1, 0)] == [3, 1, 0]
    assert [Fixed(4).choose(limit) for limit in (8, 4, 2, 0)] == [4, 4, 2, 0]


def test_choosing_takes_microseconds() -> None:
    machine, depth = Machine(lambda k: 0.02 + 0.002 * k, 0.7), Depth()
    machine.run(depth, 1000)
    began = time.process_time()
    for _ in range(1000):
        depth.record(depth.choose(8), 1, 0.02)
    assert (time.process_time() - began) / 1000 < 0.0002, "1% of a step of 20 ms"
