"""What another pool would give, foretold from one watched run.

    curve = pool_curve(document, routes)
    expected(document, routes, slots=(1200,)).tokens_per_second

The run's routers are replayed on the other pool, which gives its misses (the replay runs
the runtime's own executor: on the run's pool it counts what the run counted). A step then
takes what those of the run took that found all of their experts, or what such a step was
measured to take (`streamer.calibrate`) where that is less or there were few: other work only
makes either longer, and a slow second of one must not pass for the model's; each layer that
misses and each expert that is read add what they added to the run's steps; where everything is
in memory, a step takes what that was measured to take. Where the run had no misses of its own,
a miss waits as long as the disk was measured to need for one expert.

Limits: the text decides what is routed, so this holds for texts like the run's; a back end
that serves another budget otherwise (from the page cache, say) is not foreseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .profiler import PARTS
from .replay import replay
from .routes import Call, Routes

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FEW = (0.125, 0.25, 0.5, 0.75, 0.9)  # of a long run, whose replays take seconds each
OWN = "lrfu"  # the runtime's policy
LONG = 20_000  # calls
ENOUGH = 4  # steps without misses whose mean can be believed
ROUNDS = 12  # of reweighting
GENERATED = ("decode", "verify")
ASKED = (*GENERATED, "draft")  # a step's drafts ask for experts too


class Costs(NamedTuple):
    """Seconds. hit: a generated step that finds all its experts; per_call, per_miss: what each
    layer that misses adds, and each expert that is read, waits and putting together what came
    late; resident: a step where all is in memory. tokens: that a step gives."""

    hit: float
    per_call: float
    per_miss: float
    resident: float
    tokens: float


class Expected(NamedTuple):
    """hit_rate: of generated steps; misses: of each, on average; bytes_read: of each token."""

    slots: int
    hit_rate: float
    misses: float
    bytes_read: float
    tokens_per_second: float


def costs(document: dict[str, Any]) -> Costs:
    """Of the document's run."""
    steps, measured, run = document["steps"], document["costs"], document["run"]
    chosen = generated(steps)
    hit, resident = measured["hit_step_seconds"], measured["resident_step_seconds"]
    if not chosen:
        return Costs(hit, 0.0, 0.0, resident, 1.0)
    tokens = (run["generated_tokens"] - 1) / len(chosen)
    column = {n: np.array(steps[n], dtype=float)[chosen] for n in (*PARTS, "misses", "calls")}
    calls, misses, waits = column["calls"], column["misses"], column["waiting"]
    busy = np.sum([column[part] for part in PARTS], axis=0) - waits
    if document["budget"]["resident"]:
        resident = float(busy.mean())
    if not misses.any():
        # a miss alone, whose reads nothing shares
        return Costs(hit, 0.0, measured.get("read_seconds", 0.0), resident, tokens)
    found = busy[misses == 0]
    if len(found) >= ENOUGH:
        hit = min(hit, float(found.mean()))
    late, waited = _prices(calls, misses, busy - hit), _prices(calls, misses, waits)
    return Costs(hit, late[0] + waited[0], late[1] + waited[1], resident, tokens)


def _prices(calls: np.ndarray, misses: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """What a call and a miss cost, seconds >= 0: how it is shared out by the steps as most of
    them are, by least absolute deviations, so that a few that something else disturbed do not
    turn it; how much it is by all of them, since a disk's stalls are its own."""
    weights = np.ones_like(seconds)
    least = 0.02 * float(np.abs(seconds).mean()) + 1e-9
    for _ in range(ROUNDS):
        scale = np.sqrt(weights)
        call, miss = _two(scale * calls, scale * misses, scale * seconds)
        weights = 1 / np.maximum(np.abs(seconds - call * calls - miss * misses), least)
    told, spent = float((call * calls + miss * misses).sum()), max(0.0, float(seconds.sum()))
    factor = spent / told if told > 0 else 0.0
    return call * factor, miss * factor


def _two(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """x, z >= 0 for which y is closest to x a + z b."""
    x, z = np.linalg.lstsq(np.stack([a, b], axis=1), y, rcond=None)[0]
    if 0 <= x < np.inf and 0 <= z < np.inf:
        return float(x), float(z)
    x, z = (max(0.0, float(c @ y) / max(1e-12, float(c @ c))) for c in (a, b))
    return (x, 0.0) if ((y - x * a) ** 2).sum() < ((y - z * b) ** 2).sum() else (0.0, z)


def generated(steps: dict[str, Any]) -> list[int]:
    """Indices of a document's generated steps: after the one that belongs to the prompt."""
    return [i for i, kind in enumerate(steps["kind"]) if kind in GENERATED][1:]


def expected(
    document: dict[str, Any], routes: Routes, slots: Sequence[int], policy: str = OWN
) -> Expected:
    """With pools of `slots` for the groups of experts."""
    found = costs(document)
    steps = max(1, sum(p.kind in GENERATED for p in routes.passes))
    calls = misses = 0

    def on_call(call: Call, absent: np.ndarray, missed: np.ndarray) -> None:
        nonlocal calls, misses
        if len(missed) and routes.passes[call.step].kind in ASKED:
            calls += 1
            misses += len(missed)

    result = replay(routes, slots, policy, on_call=on_call)
    every = sum(m for _, m in result.by_kind.values())
    nbytes = result.bytes_read * misses / max(1, every)
    seconds = found.hit + (found.per_call * calls + found.per_miss * misses) / steps
    if sum(slots) >= routes.total:
        seconds = found.resident
    return Expected(
        sum(slots),
        result.rate_of(*ASKED),
        misses / steps,
        nbytes / steps / found.tokens,
        found.tokens / seconds if seconds else 0.0,
    )


def pool_curve(document: dict[str, Any], routes: Routes) -> dict[str, Any]:
    """Hit rates of the run's text over the size of the pool, by columns for JSON.

    Hit rates of the runtime's policy, of LRU, and of Belady's rule, which none can pass;
    budget_bytes: of the whole process; tokens_per_second: as `expected`.
    """
    groups = document["model"]["groups"]
    budget = document["budget"]
    fixed = budget["limit"] if not groups else _total(budget) - budget["pool"]
    sizes = _sizes(routes, budget["slots"])
    columns: dict[str, list[float]] = {
        name: []
        for name in (
            "slots", "share", "budget_bytes", "own", "lru", "belady", "misses_per_step",
            "bytes_per_token", "tokens_per_second",
        )
    }  # fmt: skip
    for slots in sizes:
        here = expected(document, routes, slots)
        lru, best = (replay(routes, slots, p).rate_of(*ASKED) for p in ("lru", "belady"))
        pool = sum(n * g["held_bytes"] for n, g in zip(slots, groups, strict=True))
        row = (
            here.slots, here.slots / routes.total, fixed + pool, here.hit_rate, lru, best,
            here.misses, here.bytes_read, here.tokens_per_second,
        )  # fmt: skip
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    at = sizes.index(tuple(budget["slots"]))
    return columns | {"here": at, "costs": costs(document)._asdict()}


def at_share(document: dict[str, Any], share: float) -> tuple[float, float, float, float]:
    """(hit rate, bytes read a token, tokens per second, seconds of a step without reads) of a
    finished document, with a share of the experts in memory; between the pools replayed, by
    their misses. Of a dense model, its run's speed."""
    pool = document["pool"]
    if not pool:
        return 1.0, 0.0, document["run"]["tokens_per_second"], 0.0
    found = Costs(**pool["costs"])
    if share >= 1:
        return 1.0, 0.0, pool["tokens_per_second"][-1], found.resident
    # the last is where all is in memory, which is another way to run
    shares = pool["share"][:-1]
    hits = np.interp(share, shares, pool["own"][:-1])
    nbytes = np.interp(share, shares, pool["bytes_per_token"][:-1])
    seconds = np.interp(share, shares, 1 / np.array(pool["tokens_per_second"][:-1]))
    return float(hits), float(nbytes), 1 / float(seconds), found.hit


def _total(budget: dict[str, Any]) -> int:
    parts = ("runtime", "trunk", "head", "kv", "head_kv", "workspace", "pool")
    return sum(budget[part] for part in parts)


def _sizes(routes: Routes, own: Sequence[int]) -> list[tuple[int, ...]]:
    """Slots of each group: of the shares, of the run and of everything."""
    counts = [sum(routes.counts[i] for i in group.layers) for group in routes.groups]
    shares = SHARES if len(routes.calls) <= LONG else FEW
    sizes = {tuple(max(routes.top_k, int(n * share)) for n in counts) for share in shares}
    sizes |= {tuple(own), tuple(counts)}
    return sorted(sizes, key=sum)


def sweep(runs: Sequence[dict[str, Any]], routes: Sequence[Routes]) -> dict[str, Any]:
    """Of runs in several budgets what was measured, and what the first that paged foretells.

    By columns, in order of budget; source: the place of the run that the forecasts are from.
    """
    paged = [i for i, run in enumerate(runs) if not run["budget"]["resident"]]
    source = paged[0] if paged else 0
    order = sorted(range(len(runs)), key=lambda i: runs[i]["budget"]["limit"])
    foreseen = [expected(runs[source], routes[source], runs[i]["budget"]["slots"]) for i in order]
    measured = [runs[i]["run"]["tokens_per_second"] for i in order]
    forecast = [e.tokens_per_second for e in foreseen]
    errors = [abs(f / m - 1) for f, m in zip(forecast, measured, strict=True) if m]
    return {
        "memory": [runs[i]["options"]["memory"] for i in order],
        "budget_bytes": [runs[i]["budget"]["limit"] for i in order],
        "slots": [sum(runs[i]["budget"]["slots"]) for i in order],
        "io": [runs[i]["options"]["io"] for i in order],
        "peak_bytes": [runs[i]["run"]["peak_bytes"] for i in order],
        "tokens_per_second": measured,
        "hit_rate": [runs[i]["experts"]["generated_hit_rate"] for i in order],
        "forecast_tokens_per_second": forecast,
        "forecast_hit_rate": [e.hit_rate for e in foreseen],
        "source": order.index(source),
        "worst_error": max(errors, default=0.0),
    }
