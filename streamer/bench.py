"""Configurations of decoding side by side, interleaved, on this machine.

    python -m streamer.bench --model PATH
    python -m streamer.bench --quick
    python -m streamer.bench --suite --model PATH                 # drafts, executors, all of it
    python -m streamer.bench --mtp off,1,2,3,auto --shares 100,50,25
    python -m streamer.bench --disk 0.5GB/s,5GB/s --executor layerwise,rehearse
    python -m streamer.bench --limit 180MB --llama llama-server --gguf model.gguf --model PATH

Each configuration lives in a process of its own, whose peak memory is its own, and with
--limit in a memory cgroup of its own, page cache counted; they take turns (A B C A B C ...),
the first round is dropped, medians are quoted. What bounds a step: computing it, which takes
what the fastest of mlx-lm and of ours takes with all experts in memory and no drafts, or
reading its misses at the disk's measured bandwidth, whichever is more; `roofline` is the
share of that bound's speed reached, and more than 1 where drafts save passes. Reads go past
the page cache (`--io direct`), so a hit in it cannot pass for speed; with `--disk` from it, held
back until the disk imitated would have sent them (`streamer.disk`). llama.cpp's mapping lives
in it, and is charged for it under --limit only.

Prints a table and, last, one JSON line. Exit code 1: a configuration ended without a result, or
--limit killed them all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .bench_rows import KILLED, LLAMA, MEMORY, Configuration, Run, crossed, row, suite, table
from .bench_worker import Worker, serve
from .console import Parser, bar, command, number, prompt_of, say
from .errors import StreamerError, UsageError
from .interrupted import importing
from .ways import EXECUTORS

SHARES = "100,50,25,12"
PROCESS = 200 << 20  # bytes of an interpreter with MLX, a prompt's cache and workspace
QUICK_SHARES, QUICK_SECONDS = "100,50", 35
PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n    "
KV_BITS = ("16", "8", "4", "3.5", "3", "2.5", "2")
DRAFTS = ("off", "auto", *map(str, range(1, 9)))


def parser() -> Parser:
    p = Parser(prog="streamer bench", description="Measure ways of decoding side by side.")
    p.add_argument("--model", help="folder or repository; the embedded demo when left out")
    p.add_argument("--shares", help=f"%% of experts in memory ({SHARES}; what fits with --limit)")
    p.add_argument("--mtp", help="list of off, auto and 1..8, each a row a share")
    p.add_argument("--executor", help=f"list of {', '.join(EXECUTORS)}, each a row a share")
    p.add_argument("--kv-bits", help="list of 16, 8, 4, 3.5, 3, 2.5 and 2, each a row a share")
    p.add_argument("--disk", help="list of disks to imitate (1.5GB/s@100us) and none")
    p.add_argument("--suite", action="store_true", help="one row of each kind of decoding")
    p.add_argument("--tokens", type=number(8, 4096, int), default=64, help="per round (64)")
    p.add_argument("--rounds", type=number(1, 100, int), default=5, help="5 when left out")
    p.add_argument("--prompt", default=PROMPT, help="or - for stdin; some Python when left out")
    p.add_argument("--temp", type=number(0), default=0.0, help="0 is greedy")
    p.add_argument("--io", choices=("mmap", "pread", "direct"), default="direct")
    p.add_argument("--dtype", choices=("auto", "stored", "float32"), default="auto")
    p.add_argument("--quick", action="store_true", help="the suite on the demo within a minute")
    p.add_argument("--limit", help="memory of each configuration, such as 180MB (Linux, root)")
    p.add_argument(
        "--llama", type=Path, help="llama.cpp's llama-server, with --mtp by its head too"
    )
    p.add_argument("--gguf", type=Path, help="the model for it")
    p.add_argument("--llama-args", default="", help="further options for it, one string")
    p.add_argument("--no-memory-row", action="store_true", help="leave out in-memory mlx-lm")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.worker:
        return serve(json.loads(args.worker))
    args.prompt = prompt_of(args.prompt)
    until = time.monotonic() + (QUICK_SECONDS if args.quick else float("inf"))
    if args.quick:
        args.rounds, args.tokens = 2, 32
    if (args.llama is None) != (args.gguf is None):
        raise UsageError("--llama and --gguf go together")
    with importing():
        from .disk import Disk
        from .footprint import available_memory, parse_size
        from .hub import resolve
        from .loading import expert_bytes, open_tokenizer
        from .opened import open_model
        from .probe import measure
        from .run import DEMO

    path = DEMO if args.model is None else resolve(args.model)
    limit = parse_size(args.limit) if args.limit else None
    opened = open_model(path, args.dtype)
    if not opened.layers:
        raise StreamerError(f"{path} has no routed experts; there is nothing to page")
    open_tokenizer(opened)  # raises once, not in every worker
    names = _configurations(args, open_model(path, args.dtype, mtp=True))
    if limit is None:
        names = _fitting(names, opened, available_memory())
    disk = measure(opened.checkpoint.files, expert_bytes(opened), args.io)
    results = _turns(names, path, limit, args, until)
    rates = {n: imitated.bandwidth for n in names if (imitated := Disk.parse(n.disk))}
    rows = [row(name, results, rates.get(name, disk.bandwidth)) for name in names]
    print(table(rows))
    print(json.dumps(_about(argv, args, path, limit) | {
        "experts": opened.experts,
        "bytes_per_expert": expert_bytes(opened),
        "disk_bytes_per_second": disk.bandwidth,
        "disk_seconds_per_expert": disk.latency,
        "rounds": len(results[names[0]]),
        "rows": rows,
    }))  # fmt: skip
    failed = [made["failed"] for made in rows if "failed" in made]
    return int(len(failed) == len(rows) or not set(failed) <= {KILLED})


def _configurations(args: Any, opened: Any) -> list[Configuration]:
    """What the options ask for of a model opened with its head.

    Raises UsageError for what makes no sense.
    """
    from .disk import Disk

    default = QUICK_SHARES if args.quick else SHARES
    try:
        given = args.shares or ("" if args.limit else default)
        shares: list[int | None] = [number(1, 100, int)(s) for s in given.split(",") if given]
    except Exception:
        raise UsageError(f"--shares {args.shares!r} is not a list of percentages") from None
    shares = shares or [None]
    drafts = _list("--mtp", args.mtp, "off", DRAFTS)
    executors = _list("--executor", args.executor, "layerwise", EXECUTORS)
    disks = (args.disk or "none").split(",")
    for name in disks:
        Disk.parse(name)  # raises
    if not opened.head and set(drafts) != {"off"}:
        raise StreamerError(f"--mtp {args.mtp}: {opened.head_notes[-1]}")
    bits = [float(b) for b in _list("--kv-bits", args.kv_bits, "16", KV_BITS)]
    alone = not (args.mtp or args.executor or args.disk or args.kv_bits)
    if args.suite or (args.quick and alone):
        ours = suite(shares, head=bool(opened.head))
    else:
        ours = crossed(shares, drafts, executors, disks, bits)
    first = [] if args.no_memory_row else [MEMORY]
    theirs = [replace(LLAMA, mtp=depth) for depth in drafts if depth != "auto"]
    return [*first, *ours, *(theirs if args.llama else [])]


def _fitting(names: list[Configuration], opened: Any, room: int) -> list[Configuration]:
    """Those whose processes fit into `room` bytes all at once; the largest are left out, and said.

    Raises StreamerError where none does.
    """
    from .experts import held_bytes
    from .footprint import format_size

    groups = opened.groups.items()
    experts = sum(held_bytes(fmt) * layer.count for fmt, layers in groups for layer in layers)
    sizes = {
        name: PROCESS + opened.trunk_bytes + experts * (name.share or 100) // 100
        for name in names
        if name.kind != LLAMA.kind  # its mapping is the system's to drop
    }
    while sizes and sum(sizes.values()) > room:
        largest = max(sizes, key=lambda name: sizes[name])
        size = format_size(sizes[largest])
        say(
            f"{largest.label}: left out; {size} do not fit beside the others in {format_size(room)}"
        )
        del sizes[largest]
    if not sizes:
        raise StreamerError(f"no configuration fits into {format_size(room)}; give less --shares")
    return [name for name in names if name in sizes or name.kind == LLAMA.kind]


def _list(option: str, text: str | None, default: str, known: tuple[str, ...]) -> list[str]:
    names = (text or default).split(",")
    if not set(names) <= set(known):
        raise UsageError(f"{option} {text!r} is not a list of {', '.join(known)}")
    return names


def _turns(
    names: list[Configuration], path: Path, limit: int | None, args: Any, until: float
) -> dict[Configuration, list[Run]]:
    """Every configuration's turns, the first dropped; fewer where `until` comes first."""
    from .bench_llama import Llama
    from .memory_cgroup import memory_cgroup, why_not

    if limit is not None and (reason := why_not()):
        raise UsageError(f"--limit cannot be held here: {reason}")
    job = {"path": str(path)}
    job |= {k: getattr(args, k) for k in ("tokens", "prompt", "temp", "io", "dtype")}
    results: dict[Configuration, list[Run]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        workers: dict[Configuration, Any] = {}
        for name in names:
            group = stack.enter_context(memory_cgroup(limit)) if limit is not None else None
            if name.kind == LLAMA.kind:
                more = args.llama_args, name.mtp
                workers[name] = Llama(args.llama, args.gguf, job, group, *more)
            else:
                workers[name] = Worker(name, job, group)
            stack.callback(workers[name].close)
        with bar("rounds") as update:
            for i in range(args.rounds + 1):
                began = time.monotonic()
                for name, worker in workers.items():
                    got = worker.run()
                    if i:
                        results[name].append(got)
                update(i + 1, args.rounds + 1, "rounds")
                took = time.monotonic() - began
                if i and time.monotonic() + took > until:
                    break
    for name, runs in results.items():
        if "failed" in runs[-1]:
            say(f"{name.label}: {runs[-1]['failed']}")
    return results


def _about(argv: list[str] | None, args: Any, path: Path, limit: int | None) -> dict[str, Any]:
    """What was run, on what, with what."""
    from .machine import machine, versions

    with_what = versions()
    if args.llama:
        from .bench_llama import version

        with_what["llama.cpp"] = version(args.llama)
    given = sys.argv[1:] if argv is None else argv
    return {
        "command": shlex.join(["python", "-m", "streamer.bench", *given]),
        "machine": machine(),
        "versions": with_what,
        "model": str(path),
        "limit_bytes": limit,
        "io": args.io,
        "tokens": args.tokens,
        "temperature": args.temp,
    }


if __name__ == "__main__":
    sys.exit(main())
