"""The simulation: steps by hand, demands of a recording, shapes, and live runs within 15%."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamer.replay import replay, slots_of
from streamer.routes import Call, Group, Pass, Routes
from streamer.run import DEMO
from tools import simulate
from tools.calibrate import Step, fitted, waits
from tools.demands import Demand, hit_rate, replayed, stand_in, tokens_of, union_of
from tools.inflate import main as inflate
from tools.machines import MACHINES, Costs, costs_on, shape_of, slots_on
from tools.step_times import NAMES, Naming, layerwise, lookahead, rate, rehearse

COSTS = Costs(
    layers=4, once=1.0, layer=10.0, rehearsed=7.0, readback=3.0, drafts=2.0,
    expert=0.5, wait=1.0, miss=0.25, read=20.0,
)  # fmt: skip
PERFECT = Naming(1.0, 1.0)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def routes(tokens: int = 60, layers: int = 4, count: int = 16, k: int = 4) -> Routes:
    """Plain decoding that prefers some experts."""
    made = Routes("made", "", (count,) * layers, layers, k, (Group(tuple(range(layers)), 64, 100),))
    draw = rng()
    weight = np.arange(count, 0, -1) / np.arange(count, 0, -1).sum()
    for i in range(tokens):
        made.passes.append(Pass("decode" if i else "prefill", 0, np.array([i], np.int32), 1))
        for layer in range(layers):
            chosen = draw.choice(count, k, replace=False, p=weight).astype(np.uint16)
            made.calls.append(Call(i, layer, chosen[None]))
    return made


# Steps


@pytest.mark.smoke
def test_a_layerwise_step_by_hand() -> None:
    assert layerwise(Demand(1, 1, [4] * 4, [0] * 4), COSTS) == 1 + 2 + 40
    # two experts: wait, two reads, two times what each adds, less three computed meanwhile
    assert layerwise(Demand(1, 1, [4] * 4, [0, 2, 0, 0]), COSTS) == 43 + 1 + 40 + 0.5 - 1.5
    assert layerwise(Demand(2, 1, [4] * 4, [0] * 4, drafting=1), COSTS) == 43 + 20.25


@pytest.mark.smoke
def test_a_rehearsed_step_by_hand() -> None:
    seconds = rehearse(Demand(1, 1, [4] * 4, [0] * 4), COSTS, PERFECT, rng())
    assert seconds == 1 + 2 + 4 * 7 + 3
    # all named: reads go on from the rehearsal's end while layers from the first run
    seconds = rehearse(Demand(1, 1, [4] * 4, [0, 1, 0, 1]), COSTS, PERFECT, rng())
    one = 1 + 20 + 0.25 - 1.5  # of the first layer, whose expert is read from the start
    last = max(0.0, 40 - (10 + one + 10))  # of the last, read behind it
    assert seconds == pytest.approx(34 + 30 + one + last + 1 + 0.25 - min(1.5, 1 + last))


@pytest.mark.smoke
def test_unnamed_misses_and_wrong_guesses_cost() -> None:
    steps = [Demand(1, 1, [4] * 8, [1] * 8)] * 50
    costs = replace(COSTS, layers=8, read=8.0)

    def seconds(named: Naming) -> float:
        draw = rng()
        return sum(rehearse(step, costs, named, draw) for step in steps)

    best = seconds(PERFECT)
    assert seconds(Naming(0.5, 1.0)) > 1.03 * best
    assert seconds(Naming(1.0, 0.5)) > 1.03 * best


@pytest.mark.smoke
def test_a_step_that_looks_ahead_by_hand() -> None:
    """The third layer's expert is named while the second waits, and read behind its own."""
    step = Demand(1, 1, [4] * 4, [0, 1, 1, 0])
    waiting = 1 + 20 + 0.25 - 1.5  # of the second, alone; three experts are computed meanwhile
    came = 10 + 20 + 20.0  # both read, one after the other, from when the second asked
    third = 20 + waiting  # when the third begins
    late = 1 + (came - third) + 0.25 - 1.5
    seconds = lookahead(step, COSTS, PERFECT, rng())
    assert seconds == pytest.approx(3 + 40 + waiting + late)
    assert seconds < layerwise(step, COSTS)
    slow = replace(COSTS, rehearsed=30.0)  # a layer takes longer to rehearse than waits last
    assert lookahead(step, slow, PERFECT, rng()) == layerwise(step, slow)


@pytest.mark.smoke
def test_auto_is_about_as_fast_as_the_better_way() -> None:
    steps = [Demand(1, 1, [4] * 4, [2, 1, 0, 2])] * 300
    for costs in (COSTS, replace(COSTS, read=2.0), replace(COSTS, rehearsed=25.0)):
        best = max(rate(steps, costs, name, 0.5) for name in ("layerwise", "lookahead"))
        assert rate(steps, costs, "auto", 0.5) == pytest.approx(best, rel=0.03)


@pytest.mark.smoke
def test_no_executor_beats_the_disk_or_the_compute() -> None:
    steps = [Demand(1, 1, [4] * 4, [2, 1, 0, 2])] * 20
    for name in NAMES:
        for read in (0.1, 5.0, 50.0):
            seconds = 20 / rate(steps, replace(COSTS, read=read), name, 0.5)
            assert seconds >= 20 * 5 * read
            assert seconds >= 20 * 4 * min(COSTS.layer, COSTS.rehearsed)


# Demands


@pytest.mark.smoke
def test_demands_are_the_replays() -> None:
    made = routes()
    steps = replayed(made, 0.4)
    found = replay(made, slots_of(made, 0.4))
    hits, misses = found.by_kind["decode"]
    assert sum(sum(s.missed) for s in steps) == misses
    assert sum(sum(s.need) for s in steps) == hits + misses
    assert hit_rate(steps) == pytest.approx(hits / (hits + misses))
    assert tokens_of(steps) == made.tokens == 59 and union_of(steps, made.top_k) == 1.0


@pytest.mark.smoke
def test_a_stand_in_keeps_proportions() -> None:
    steps = replayed(routes(300), 0.5)
    made = stand_in(steps, 4, 10, 6, rng())
    assert all(len(s.need) == 10 and max(s.need) <= 6 for s in made)
    assert hit_rate(made) == pytest.approx(hit_rate(steps), abs=0.02)
    assert tokens_of(made) == tokens_of(steps)


# What is fitted


@pytest.mark.smoke
def test_fits_recover_what_was_planted() -> None:
    draw = rng()
    steps = [Step(1, 0.0, 0.0, draw.integers(0, 4, 8).tolist()) for _ in range(60)]
    for step in steps:
        waiting = sum(m > 0 for m in step.missed)
        step.seconds = 0.010 + waiting * 0.002 + sum(step.missed) * (0.003 + 0.0005)
    steps[7].seconds += 1.0  # something else ran
    assert waits(steps, 0.010, 0.003) == pytest.approx((0.002, 0.0005))
    ahead = replace(COSTS, guess=6.0)
    demands = [Demand(1, 1, [4] * 4, [2, 1, 0, 2])] * 20
    measured = rate(demands, ahead, "rehearse", 0.5)
    found = fitted(COSTS, "guess", measured, lambda c: rate(demands, c, "rehearse", 0.5))
    assert found.guess == pytest.approx(6.0, abs=0.01)


# Published models


def test_shapes_weigh_what_they_should() -> None:
    """35B parameters, 34 of them in experts, at 4.5 bits."""
    shape = shape_of("qwen3.5-35b-a3b")
    assert (shape.layers, shape.count, shape.top_k) == (40, 256, 8)
    assert shape.expert == 3 * 2048 * 512 * 4.5 / 8
    assert 0.9e9 < shape.trunk < 2.5e9
    assert 0 < slots_on(shape, MACHINES["m2-16"]) < shape.experts
    assert slots_on(shape, MACHINES["m5max-128"]) == shape.experts
    costs = costs_on(shape, MACHINES["m2-16"], 1, 1.0)
    assert costs.read == pytest.approx(shape.expert / 1.5e9)
    assert costs_on(shape, MACHINES["m2-16"], 3, 2.0).layer > costs.layer > costs.rehearsed


def test_the_table_says_that_it_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "made.routes"
    routes().save(file)
    command = ["table", str(file), "--models", "qwen3.5-35b-a3b"]
    assert simulate.main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("Simulated, not measured.") and "Assumed:" in out
    assert out.count("| qwen3.5-35b-a3b |") == len(MACHINES)
    assert simulate.main([*command, "--machines", "m2-16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["simulated"] and all(row["simulated"] for row in told["rows"])
    assert {r["executor"] for r in told["rows"][0]["rates"]} == set(NAMES)
    assert simulate.main(["table", "--machines", "z80"]) == 2


# Live


@pytest.mark.slow
@pytest.mark.timed
def test_live_runs_lie_within_15_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk so slow that steps wait for it most of the time, and with costs measured in turns
    with the runs, so that other work slows both; quiet, on fast ones: docs/benchmarks.md."""
    model = tmp_path / "padded"
    assert inflate([str(DEMO), str(model), "--expert-bytes", "256KB"]) == 0
    command = ["check", "--model", str(model), "--pools", "45,25", "--disk", "0.06"]
    command += ["--executors", "layerwise", "--tokens", "10", "--rounds", "3"]
    assert simulate.main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["within"] < 0.15, told["rows"]
    assert len(told["rows"]) == 2 and told["profile"]["0"]["read"] > 0
