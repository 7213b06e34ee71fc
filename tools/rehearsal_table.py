"""Where rehearsing pays: tokens per second of each executor, by expert size, pool and disk.

    python -m tools.inflate streamer/demo demo-1mb --expert-bytes 1MB
    python -m tools.rehearsal_table demo-1mb --pools 75,50,25,12 --disks 0.5,1.5,5

The disk is imitated: reads come from the page cache and sleep until a disk of that
bandwidth would have sent them. Executors take turns in one process, each with a model of
its own; medians of the rounds after the first. The roofline of a step is the larger of its
compute with everything resident and its misses at the disk's bandwidth. `--mtp N` verifies
N drafts of the model's head at every step.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer

from streamer.bench import PROMPT
from streamer.console import Parser, command, number
from streamer.disk import Disk
from streamer.engine import Timing, generate
from streamer.experts import stored_bytes
from streamer.loading import expert_count, load_streamed
from streamer.rehearse import EXECUTORS
from streamer.speculate import Speculation

HEADER = (
    "| experts | pool | disk | executor | tok/s | of layer-wise | read-backs per pass | recall "
    "| precision | misses per token | disk busy | of roofline |\n" + "|---" * 12 + "|"
)


def parser() -> Parser:
    p = Parser(prog="rehearsal_table", description="Compare executors on an imitated disk.")
    p.add_argument("models", nargs="+", type=Path)
    p.add_argument("--pools", default="75,50,25,12", help="%% of experts in memory")
    p.add_argument("--disks", default="0.5,1.5,5", help="GB/s; 0: as it comes")
    p.add_argument("--tokens", type=number(8, 4096, int), default=32)
    p.add_argument("--rounds", type=number(1, 100, int), default=2)
    p.add_argument("--mtp", type=number(0, 8, int), default=0)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    print(HEADER, flush=True)
    for path in args.models:
        resident = _Turns(path, None, "layerwise", None, args)
        whole = statistics.median(resident.turn() for _ in range(args.rounds + 1))
        total = expert_count(path)
        for pool in map(int, args.pools.split(",")):
            for disk in map(float, args.disks.split(",")):
                ways = [
                    _Turns(path, total * pool // 100, e, disk * 1e9 or None, args)
                    for e in ("layerwise", *(e for e in EXECUTORS if e != "layerwise"))
                ]
                for _ in range(args.rounds + 1):
                    for way in ways:
                        way.turn()
                rate = disk * 1e9 or float("inf")
                for way in ways:
                    print(_row(pool, rate, way, ways[0], whole), flush=True)
    return 0


class _Turns:
    """One configuration and what its turns gave."""

    def __init__(self, path: Path, slots: int | None, executor: str, disk: float | None, args: Any):
        self.executor, self._count, self._args = executor, args.tokens, args
        model: Any = load_streamed(
            path,
            slots=slots,
            dtype="auto",
            mtp=bool(args.mtp),
            executor=executor,  # type: ignore[arg-type]
            disk=Disk(disk) if disk else None,
        )
        self.model = model
        self._prompt = load_tokenizer(path).encode(PROMPT)
        self.size = stored_bytes(model.streamer.opened.layers[0].format)
        self.rates: list[float] = []
        self.seconds = self.misses = self.bytes = self.passes = self.syncs = 0.0
        self.recall: list[float] = []
        self.precision: list[float] = []

    def turn(self) -> float:
        """Seconds per token."""
        model, count, drafts = self.model, self._count, self._args.mtp
        counters, store = model.streamer.counters, model.streamer.store
        speculation = Speculation(model, model.streamer.opened.head, drafts) if drafts else None
        timing, passes = Timing(), 0
        cache = make_prompt_cache(model)
        with contextlib.closing(
            generate(
                model,
                self._prompt,
                cache,
                max_tokens=count,
                timing=timing,
                speculation=speculation,
            )
        ) as steps:
            next(steps)  # the prompt's
            before = _now(counters, store)
            for step in steps:
                passes += not step.drafted
        misses, nbytes, syncs, issued, used, rehearsed = (
            b - a for a, b in zip(before, _now(counters, store), strict=True)
        )
        each = timing.decode_seconds / (count - 1)
        self.rates.append(1 / each)
        if len(self.rates) > 1:
            self.seconds += timing.decode_seconds
            self.misses += misses
            self.bytes += nbytes
            self.passes += passes
            self.syncs += syncs
            self.recall += [used / rehearsed] if rehearsed else []
            self.precision += [used / issued] if issued else []
        return each

    @property
    def rate(self) -> float:
        return statistics.median(self.rates[1:])


def _now(counters: Any, store: Any) -> tuple[int, ...]:
    return (
        counters.misses,
        store.counters.bytes_read,
        counters.syncs,
        counters.prefetched,
        counters.prefetch_used,
        counters.rehearsed_misses,
    )


def _row(pool: int, rate: float, way: _Turns, base: _Turns, whole: float) -> str:
    tokens = (way._count - 1) * (len(way.rates) - 1)
    ideal = max(whole, way.misses / tokens * way.size / rate)
    cells = [
        f"{way.size / 1e6:.2f} MB",
        f"{pool}%",
        f"{rate / 1e9:g} GB/s",
        way.executor,
        f"{way.rate:.1f}",
        f"{way.rate / base.rate:.2f}",
        f"{way.syncs / way.passes:.1f}",
        _share(way.recall),
        _share(way.precision),
        f"{way.misses / tokens:.1f}",
        f"{way.bytes / rate / way.seconds:.0%}",
        f"{ideal * way.rate:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _share(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" if values else ""


if __name__ == "__main__":
    sys.exit(main())
