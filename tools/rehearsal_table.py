"""Where rehearsing pays: tokens a second of each executor, by expert size, pool and disk.

    python -m tools.inflate streamer/demo demo-1mb --expert-bytes 1MB
    python -m tools.rehearsal_table run demo-1mb --pools 75,50,25,12 --disks 0.5,1.5,5,0 \\
        --out cells.jsonl
    python -m tools.rehearsal_table show cells.jsonl

The disk is imitated: reads come from the page cache and sleep until a disk of that bandwidth
(GB/s) would have sent them; 0 is as it comes. Executors take turns in one process, each with
a model of its own and every turn with another prompt, the same for all; medians of the rounds
after the first, ratios turn by turn. `run` adds a
line to the file for every cell and leaves out those that are there, so that it can be
interrupted; --seconds ends it before a cell for which no time is left. The roofline of a step
is the larger of its compute with everything resident and its misses at the disk's bandwidth.
`--mtp N` verifies N drafts of the model's head at every step.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer

from streamer.console import Parser, command, number, say
from streamer.disk import Disk
from streamer.engine import Timing, generate
from streamer.experts import stored_bytes
from streamer.loading import expert_count, load_streamed
from streamer.speculate import Speculation
from streamer.ways import EXECUTORS

HEADER = (
    "| experts | pool | disk | drafts | executor | tok/s | of layer-wise | of the best "
    "| read-backs a pass | recall | precision | misses a token | disk busy | of roofline |\n"
    + "|---" * 14
    + "|"
)
PROMPTS = (
    "import os\nimport sys\n\n\ndef main(argv=None):\n    ",
    "class Parser:\n    def __init__(self, text):\n        ",
    "def read_file(path, encoding=None):\n    with open(",
    "import unittest\n\nclass TestList(unittest.TestCase):\n    def test_",
    "    def __repr__(self):\n        return ",
    "try:\n    import threading\nexcept ImportError:\n    ",
    "for name, value in sorted(self.items()):\n    if ",
    "def dumps(obj, *, indent=None, sort_keys=False):\n    ",
)
KEY = ("model", "pool", "disk", "drafts")


def parser() -> Parser:
    p = Parser(prog="rehearsal_table", description="Compare executors on an imitated disk.")
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("run", help="measure cells that are not in the file yet")
    r.add_argument("models", nargs="+", type=Path)
    r.add_argument("--pools", default="75,50,25,12", help="%% of experts in memory")
    r.add_argument("--disks", default="0.5,1.5,5,0", help="GB/s; 0: as it comes")
    r.add_argument("--executors", default=",".join(EXECUTORS))
    r.add_argument("--tokens", type=number(8, 4096, int), default=32)
    r.add_argument("--rounds", type=number(1, 100, int), default=3)
    r.add_argument("--mtp", type=number(0, 8, int), default=0)
    r.add_argument("--seconds", type=number(1), default=float("inf"), help="begin no cell later")
    r.add_argument("--out", type=Path, required=True)
    s = commands.add_parser("show", help="print the table")
    s.add_argument("files", nargs="+", type=Path)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "show":
        print(HEADER)
        for path in args.files:
            for cell in _cells(path):
                print("\n".join(_lines(cell)))
        return 0
    return _run(args)


def _run(args: Any) -> int:
    began = longest = 0.0
    start = time.monotonic()
    there = {tuple(cell[k] for k in KEY) for cell in _cells(args.out)}
    names = ["layerwise", *(e for e in args.executors.split(",") if e != "layerwise")]
    for path in args.models:
        whole = 0.0
        for pool in map(int, args.pools.split(",")):
            for disk in map(float, args.disks.split(",")):
                key = path.name, pool, disk, args.mtp
                if key in there:
                    continue
                began = time.monotonic()
                if began - start + longest > args.seconds:
                    say("no time left; run it again")
                    return 0
                whole = whole or _resident(path, args)
                cell = dict(zip(KEY, key, strict=True)) | _cell(path, pool, disk, names, args)
                cell["resident_seconds"] = whole
                with args.out.open("a") as out:
                    print(json.dumps(cell), file=out)
                longest = max(longest, time.monotonic() - began)
                say("\n".join(_lines(cell)))
    return 0


def _cells(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _resident(path: Path, args: Any) -> float:
    """Seconds a token with all experts in memory."""
    one = _Turns(path, None, "layerwise", None, args)
    try:
        return statistics.median([one.turn() for _ in range(args.rounds + 1)][1:])
    finally:
        one.close()


def _cell(path: Path, pool: int, disk: float, names: list[str], args: Any) -> dict[str, Any]:
    slots, rate = expert_count(path) * pool // 100, disk * 1e9 or None
    ways = [_Turns(path, slots, name, rate, args) for name in names]
    try:
        for _ in range(args.rounds + 1):
            for way in ways:
                way.turn()
        same = all(way.out == ways[0].out for way in ways)
        rows = [way.row() for way in ways]
        return {"expert_bytes": ways[0].size, "same_tokens": same, "rows": rows}
    finally:
        for way in ways:
            way.close()


class _Turns:
    """One configuration and what its turns gave; those after the first count."""

    def __init__(self, path: Path, slots: int | None, executor: str, disk: float | None, args: Any):
        self.executor, self._count, self._drafts = executor, args.tokens, args.mtp
        self.model: Any = load_streamed(
            path,
            slots=slots,
            dtype="auto",
            mtp=bool(args.mtp),
            executor=executor,  # type: ignore[arg-type]
            disk=Disk(disk) if disk else None,
        )
        encode = load_tokenizer(path).encode
        self._prompts = [list(encode(text)) for text in PROMPTS]
        self.size = stored_bytes(self.model.streamer.opened.layers[0].format)
        self.seconds: list[float] = []  # a token
        self.out: list[list[int]] = []
        self._sums = [0] * 7

    def turn(self) -> float:
        """Seconds a token."""
        model, count = self.model, self._count
        head = model.streamer.opened.head
        speculation = Speculation(model, head, self._drafts) if self._drafts else None
        timing, passes, before = Timing(), 0, self._now()
        out: list[int] = []
        steps = generate(
            model,
            self._prompts[len(self.seconds) % len(PROMPTS)],
            make_prompt_cache(model),
            max_tokens=count,
            timing=timing,
            speculation=speculation,
        )
        with contextlib.closing(steps):
            for step in steps:
                if not out:  # the prompt's
                    before = self._now()
                else:
                    passes += not step.drafted
                out.append(step.token)
        self.out.append(out)
        self.seconds.append(timing.decode_seconds / (count - 1))
        if len(self.seconds) > 1:
            counted = [b - a for a, b in zip(before, self._now(), strict=True)]
            self._sums = [a + b for a, b in zip(self._sums, [*counted, passes], strict=True)]
        return self.seconds[-1]

    def _now(self) -> list[int]:
        c, store = self.model.streamer.counters, self.model.streamer.store
        nbytes = store.counters.bytes_read if store else 0
        return [c.misses, nbytes, c.syncs, c.prefetched, c.prefetch_used, c.rehearsed_misses]

    def row(self) -> dict[str, Any]:
        names = "misses", "bytes", "syncs", "prefetched", "used", "rehearsed_misses", "passes"
        return {
            "executor": self.executor,
            "seconds": self.seconds[1:],
            "tokens": (self._count - 1) * (len(self.seconds) - 1),
        } | dict(zip(names, self._sums, strict=True))

    def close(self) -> None:
        self.model.streamer.close()
        del self.model
        gc.collect()
        mx.clear_cache()


def _lines(cell: dict[str, Any]) -> list[str]:
    rate = cell["disk"] * 1e9 or float("inf")
    base = cell["rows"][0]["seconds"]
    ratios = [_ratio(base, row["seconds"]) for row in cell["rows"]]
    lines = []
    for row, ratio in zip(cell["rows"], ratios, strict=True):
        seconds, tokens = statistics.median(row["seconds"]), row["tokens"]
        ideal = max(cell["resident_seconds"], row["misses"] / tokens * cell["expert_bytes"] / rate)
        cells = [
            f"{cell['expert_bytes'] / 1e6:.2f} MB",
            f"{cell['pool']}%",
            f"{cell['disk']:g} GB/s" if cell["disk"] else "as it comes",
            str(cell["drafts"]),
            row["executor"],
            f"{1 / seconds:.1f}",
            f"{ratio:.2f}",
            f"{ratio / max(ratios):.2f}",
            f"{row['syncs'] / row['passes']:.1f}",
            _share(row["used"], row["rehearsed_misses"]),
            _share(row["used"], row["prefetched"]),
            f"{row['misses'] / tokens:.1f}",
            f"{row['bytes'] / rate / sum(row['seconds']) * len(row['seconds']) / tokens:.0%}",
            f"{ideal / seconds:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(base: list[float], seconds: list[float]) -> float:
    """The median over turns of layer-wise seconds over these."""
    return statistics.median(b / s for b, s in zip(base, seconds, strict=True))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else ""


if __name__ == "__main__":
    sys.exit(main())
