"""Tokens a second on machines that are not here, from a recording of what routers choose.

    python -m tools.simulate check --model big --disk 1.0            # simulated beside measured
    python -m tools.simulate table                                   # published models, simulated
    python -m tools.trace record --mtp 2 --out drafts.routes
    python -m tools.simulate table drafts.routes

`check` measures what passes cost on this machine, decodes live at some pool sizes, replays the
same prompts' routes on pools of those sizes and prints both, with their ratio. `table` puts
published models on known machines (`tools.machines`): sizes are the models' own, speeds follow
from bytes over bandwidths, and which experts are asked for is the demo's: its misses, layer by
layer and step by step, at the same share of experts in memory, stand in for the models'.
Everything that `table` prints is simulated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamer.bench import PROMPT
from streamer.console import Parser, command, number, say, write_json
from streamer.errors import UsageError
from streamer.hub import resolve
from streamer.loading import expert_bytes, load_streamed, open_tokenizer
from streamer.machine import machine as this_machine
from streamer.opened import open_model
from streamer.recorder import record
from streamer.routes import Routes
from streamer.run import DEMO
from tools import calibrate as live
from tools.demands import Demand, hit_rate, replayed, stand_in, union_of
from tools.machines import ASSUMED, MACHINES, Costs, costs_on, shape_of, slots_on
from tools.step_times import NAMES, rate

MODELS = ("qwen3.5-35b-a3b", "qwen3.5-122b-a10b", "glm-4.5-air", "deepseek-v3")
SHOWN = ("layerwise", "auto")  # of the executors, in the table
PROMPTS = (PROMPT, "class ", "def ")


def _numbers(text: str) -> list[int]:
    return [number(0, 100, int)(part) for part in text.split(",")]


_numbers.__name__ = "list of numbers (such as 75,50,25)"


def parser() -> Parser:
    p = Parser(prog="simulate", description="Tokens a second on machines that are not here.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="simulated beside measured, on this machine")
    c.add_argument("--model", help="folder or repository; the embedded demo when left out")
    c.add_argument("--pools", type=_numbers, default=[75, 50, 25], help="%% of experts in memory")
    c.add_argument(
        "--fit", type=number(1, 99, int), default=35, help="pool that waits are fitted at"
    )
    c.add_argument("--depths", type=_numbers, default=[0], help="drafts of each step")
    c.add_argument("--executors", default="layerwise,lookahead,auto")
    c.add_argument(
        "--disk", type=number(0.001), help="GB/s of one to imitate; this one's otherwise"
    )
    c.add_argument("--tokens", type=number(8, 4096, int), default=32, help="after each prompt")
    c.add_argument("--rounds", type=number(1, 100, int), default=3)
    c.add_argument("--prompt", action="append", help="may be given again; a few when left out")
    c.add_argument("--save", type=Path, help="write the measured profile and the rows to this file")
    t = commands.add_parser("table", help="published models on known machines, simulated")
    t.add_argument("routes", nargs="*", type=Path, help="recordings, one a depth; the demo's else")
    t.add_argument("--models", default=",".join(MODELS))
    t.add_argument("--machines", default=",".join(MACHINES))
    t.add_argument("--json", action="store_true")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return {"check": _check, "table": _table}[args.command](args)


# This machine


def _check(args: Any) -> int:
    path = resolve(args.model) if args.model else DEMO
    names = args.executors.split(",")
    if unknown := set(names) - set(NAMES):
        raise UsageError(f"no executor {min(unknown)!r}; there are {', '.join(NAMES)}")
    rows: list[dict[str, Any]] = []
    costs: dict[str, dict[str, float]] = {}
    for depth in args.depths:
        found, costs[str(depth)] = _compare(path, names, depth, args)
        rows += found
        for row in found:
            say(_line(row))
    print("| executor | drafts | experts in memory | simulated tok/s | measured tok/s | ratio |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(_line(row).split('  '))} |")
    told = {
        "model": str(path),
        "machine": this_machine(),
        "profile": costs,  # by drafts
        "rows": rows,
        "within": max(abs(row["ratio"] - 1) for row in rows),
    }
    if args.save:
        write_json(args.save, told)
    print(json.dumps(told))
    return 0


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['executor']}  {row['depth']}  {row['pool']}%  {row['simulated']:.1f}  "
        f"{row['measured']:.1f}  {row['ratio']:.2f}"
    )


def _compare(path: Path, names: list[str], depth: int, args: Any) -> tuple[list[dict], dict]:
    """(rows, what was measured of this machine): live runs of one depth, interleaved, and the
    same simulated."""
    total = live.experts_of(path, depth > 0)
    bandwidth = args.disk * 1e9 if args.disk else None
    prompts = args.prompt or PROMPTS

    def run(slots: int, executor: str) -> live.Live:
        return live.Live(path, slots, executor, depth, disk=bandwidth)

    runs: dict[tuple[Any, str], live.Live] = {("resident", ""): run(total, "layerwise")}
    for name in dict.fromkeys(["layerwise", *names]):
        whole = ["ample"] if name in ("layerwise", "rehearse") else []
        for pool in (*whole, args.fit, *(args.pools if name in names else [])):
            slots = total - 1 if pool == "ample" else round(total * pool / 100)
            runs[pool, name] = run(slots, name)
    try:
        for _ in range(args.rounds + 1):
            for one in runs.values():
                one.turn(prompts, args.tokens)
    finally:
        for one in runs.values():
            one.close()
    disk = bandwidth or _measured_disk(path)
    ample = runs["ample", "layerwise"]
    costs = live.calibrate(
        ample, runs.get(("ample", "rehearse")), runs[args.fit, "layerwise"], disk
    )
    routes = _recorded(path, depth, prompts, args.tokens, turns=2)
    steps = {p: _second_half(replayed(routes, p / 100)) for p in (args.fit, *args.pools)}
    fits: dict[str, Costs] = {}
    for name in dict.fromkeys(["layerwise", *names]):

        def simulated(c: Costs, name: str = name) -> float:
            return rate(steps[args.fit], c, name, args.fit / 100)

        cost = "miss" if name == "layerwise" else "guess"
        fits[name] = live.fitted(costs, cost, runs[args.fit, name].rate, simulated)
        if name == "layerwise":
            costs = fits[name]
    rows = [
        _row(
            pool,
            name,
            depth,
            rate(steps[pool], fits[name], name, pool / 100),
            runs[pool, name].rate,
        )
        for pool in args.pools
        for name in names
    ]
    resident = live.without_misses(runs["resident", ""])
    return rows, {
        "disk_bytes_per_second": disk,
        "resident_pass_seconds": resident,
        "readback_seconds": (live.without_misses(ample) - resident) / ample.layers,
        **costs.stats(),
    }


def _row(pool: int, name: str, depth: int, simulated: float, measured: float) -> dict[str, Any]:
    made: dict[str, Any] = {"executor": name, "depth": depth, "pool": pool}
    return made | {
        "simulated": simulated,
        "measured": measured,
        "ratio": simulated / measured,
    }


def _measured_disk(path: Path) -> float:
    from streamer.probe import measure

    opened = open_model(path)
    return measure(opened.files, expert_bytes(opened), "direct").bandwidth


def _second_half(steps: list[Demand]) -> list[Demand]:
    """A recording of two equal turns: the second, on a pool that is warm."""
    return steps[len(steps) // 2 :]


def _recorded(path: Path, depth: int, texts: Sequence[str], tokens: int, turns: int = 1) -> Routes:
    """Routes after these prompts, recorded with everything at hand, `turns` times over."""
    model: Any = load_streamed(path, slots=None, dtype="auto", mtp=depth > 0)
    try:
        tokenizer = open_tokenizer(model.streamer.opened)
        prompts = [list(tokenizer.encode(text)) for text in texts]
        return record(model, prompts * turns, tokens, depth)
    finally:
        model.streamer.close()


# Other machines


def _table(args: Any) -> int:
    for given, known in ((args.models, MODELS), (args.machines, MACHINES)):
        if unknown := set(given.split(",")) - set(known):
            raise UsageError(f"nothing is known of {min(unknown)!r}; there are {', '.join(known)}")
    recordings = [Routes.load(path) for path in args.routes] or [
        _recorded(DEMO, depth, PROMPTS, 120) for depth in (0, 1, 2)
    ]
    rows = [
        _simulated(name, machine, recordings)
        for name in args.models.split(",")
        for machine in args.machines.split(",")
    ]
    if args.json:
        print(json.dumps({"simulated": True, "assumed": ASSUMED, "rows": rows}))
        return 0
    print("Simulated, not measured. Routing statistics are the demo's.\n")
    print(_markdown(rows))
    print("\nAssumed:", "; ".join(f"{name} {value:g}" for name, value in ASSUMED.items()))
    return 0


def _simulated(name: str, where: str, recordings: list[Routes]) -> dict[str, Any]:
    """A model on a machine: every executor at every recorded depth."""
    shape, machine = shape_of(name), MACHINES[where]
    slots = slots_on(shape, machine)
    row: dict[str, Any] = {"simulated": True, "model": name, "machine": machine.name}
    row |= {"experts": shape.experts, "slots": slots, "expert_bytes": shape.expert}
    row |= {"trunk_bytes": shape.trunk, "share": slots / shape.experts, "rates": []}
    if not slots:
        return row
    for routes in recordings:
        share = row["share"]
        steps = replayed(routes, max(share, routes.top_k / routes.total))
        rows = max(step.rows for step in steps)
        union = union_of([s for s in steps if s.rows == rows], routes.top_k)
        rng = np.random.default_rng(0)
        steps = stand_in(steps, routes.top_k, shape.layers, shape.top_k, rng)
        costs = costs_on(shape, machine, rows, union, resident=slots == shape.experts)
        for executor in NAMES:
            row["rates"].append(
                {
                    "executor": executor,
                    "depth": rows - 1,
                    "tokens_per_second": rate(steps, costs, executor, share),
                    "hit_rate": hit_rate(steps),
                }
            )
    return row


def _markdown(rows: list[dict[str, Any]]) -> str:
    found = next(r["rates"] for r in rows if r["rates"])
    ways = [(r["executor"], r["depth"]) for r in found if r["executor"] in SHOWN]
    head = ["model", "machine", "experts in memory", "hit rate"]
    head += [f"{e}, {d} drafts" if d else e for e, d in ways]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], row["machine"]]
        if row["rates"]:
            cells += [f"{row['share']:.0%}", f"{row['rates'][0]['hit_rate']:.0%}"]
            shown = [r for r in row["rates"] if r["executor"] in SHOWN]
            cells += [f"{r['tokens_per_second']:.1f}" for r in shown]
        else:
            cells += ["does not fit", ""] + [""] * len(ways)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
