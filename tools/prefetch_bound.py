"""The most that any prefetching could gain, by perfect foresight, from a recording of routers.

    python -m tools.trace record --pool 50% --max-tokens 120 --out demo.routes
    python -m tools.prefetch_bound demo.routes --step 8 --expert-bytes 1.08e6 \\
        --pools 75,50,25 --disks 0.5,1.5,5

--step: milliseconds of a pass without misses. Four ways to read what each pass misses on a pool
that evicts as the runtime does: layer-wise, where a layer's reads begin when it has chosen;
`next`, where they begin when the layer before it has; `pass`, where all of a pass's begin with
it, nearest first; and `ever`, which is the larger of computing and reading all passes. The share
of a layer that comes before its choice is --before. What computes while reads come is left out
of layer-wise, so that it is a little slower here than it runs. Computed, not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from streamer.console import Parser, command, number
from streamer.routes import Routes
from tools.demands import Demand, replayed, tokens_of

WAYS = ("layer-wise", "next", "pass", "ever")


def parser() -> Parser:
    p = Parser(prog="prefetch_bound", description="What perfect foresight would gain.")
    p.add_argument("file", type=Path)
    p.add_argument("--step", type=number(0.001), required=True, help="ms of a pass without misses")
    p.add_argument("--expert-bytes", type=number(1), required=True)
    p.add_argument("--pools", default="75,50,25", help="%% of experts in memory")
    p.add_argument("--disks", default="0.5,1.5,5", help="GB/s")
    p.add_argument("--before", type=number(0, 1), default=0.6, help="of a layer, its choice")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    routes = Routes.load(args.file)
    print(
        f"| pool | disk | misses a token | {' | '.join(w + ', ms' for w in WAYS)} | most gained |"
    )
    print("|---" * (4 + len(WAYS)) + "|")
    for pool in map(int, args.pools.split(",")):
        steps = replayed(routes, pool / 100)
        tokens = tokens_of(steps)
        misses = sum(sum(s.missed) for s in steps) / tokens
        for disk in map(float, args.disks.split(",")):
            read = args.expert_bytes / disk / 1e6  # ms
            found = bounds(steps, args.step, read, args.before)
            each = [ms / tokens for ms in found]
            cells = [f"{pool}%", f"{disk:g} GB/s", f"{misses:.1f}", *(f"{ms:.1f}" for ms in each)]
            print(f"| {' | '.join(cells)} | {each[0] / each[2]:.2f} |")
    return 0


def bounds(steps: Sequence[Demand], step: float, read: float, before: float) -> list[float]:
    """Time of all steps by each of `WAYS`; step: of a pass without misses, read: of an expert."""
    count = len(steps[0].missed)
    layer = step / count
    early, late = layer * before, layer * (1 - before)
    layerwise = ahead = whole = reading = 0.0
    for one in steps:
        reads = [n * read for n in one.missed]
        reading += sum(reads)
        layerwise += step + sum(reads)
        # reads of a layer begin when the layer before it has chosen, after those before them
        now = disk = chosen = 0.0
        for nth, seconds in enumerate(reads):
            asked = chosen if nth else early
            disk = max(disk, asked) + seconds if seconds else disk
            chosen = now + early
            now = max(chosen, disk) + late
        ahead += now
        now = disk = 0.0
        for seconds in reads:
            disk += seconds
            now = max(now + early, disk if seconds else 0.0) + late
        whole += now
    return [layerwise, ahead, whole, max(step * len(steps), reading)]


if __name__ == "__main__":
    sys.exit(main())
