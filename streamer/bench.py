"""Streamed against in-memory decoding, interleaved, on this machine.

    python -m streamer.bench --model PATH
    python -m streamer.bench --quick
    python -m streamer.bench --mtp off,1,2,3,auto --shares 100,50,25   # drafting or not
    python -m streamer.bench --disk 0.5GB/s,5GB/s --executor layerwise,rehearse

Each configuration lives in a process of its own, whose peak memory is its own;
they take turns (A B C A B C ...), the first round is dropped, medians are
quoted. What bounds a step: computing it, which takes what the fastest of mlx-lm
and of ours takes with all experts in memory and no drafts, or reading its misses
at the disk's measured bandwidth, whichever is more; `roofline` is the share of
that bound's speed reached, and more than 1 where drafts save passes. Reads
go past the page cache (`--io direct`), so a hit in it cannot pass for speed; with `--disk`
from it, held back until the disk imitated would have sent them (`streamer.disk`).

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from .console import Parser, bar, command, number
from .errors import StreamerError

SHARES = (100, 50, 25, 12)


class Name(NamedTuple):
    """A configuration: share of the experts in memory, and the options."""

    share: int | None
    mtp: str = "off"
    executor: str = "layerwise"
    disk: str = "none"


MEMORY = Name(None)  # mlx-lm, everything in memory
PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n    "


def parser() -> Parser:
    p = Parser(prog="streamer bench", description="Measure streamed against in-memory decoding.")
    p.add_argument("--model", help="folder or repository; the embedded demo when left out")
    p.add_argument("--shares", default=",".join(map(str, SHARES)), help="%% of experts in memory")
    p.add_argument("--tokens", type=number(8, 4096, int), default=64, help="tokens per round")
    p.add_argument("--rounds", type=number(1, 100, int), default=5)
    p.add_argument("--prompt", default=PROMPT)
    p.add_argument("--mtp", default="off", help="list of off, auto and 1..8, each a row a share")
    p.add_argument("--executor", default="layerwise", help="list of layerwise, rehearse, auto")
    p.add_argument("--disk", default="none", help="list of disks to imitate: 1.5GB/s@100us, none")
    p.add_argument("--temp", type=number(0), default=0.0, help="0 is greedy")
    p.add_argument("--io", choices=("mmap", "pread", "direct"), default="direct")
    p.add_argument("--dtype", choices=("auto", "stored", "float32"), default="auto")
    p.add_argument("--quick", action="store_true", help="under a minute: 2 rounds of 32 tokens")
    p.add_argument("--no-memory-row", action="store_true", help="leave out in-memory mlx-lm")
    p.add_argument("--worker", help="internal")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.worker:
        return _serve(json.loads(args.worker))
    if args.quick:
        args.rounds, args.tokens = 2, 32
    from .disk import Disk
    from .hub import resolve
    from .loading import expert_bytes
    from .opened import open_model
    from .probe import measure
    from .rehearse import EXECUTORS
    from .run import DEMO

    path = resolve(args.model) if args.model else DEMO
    try:
        shares = [int(s) for s in args.shares.split(",")]
    except ValueError:
        raise StreamerError(f"--shares {args.shares!r} is not a list of percentages") from None
    drafts = args.mtp.split(",")
    if not set(drafts) <= {"off", "auto", *map(str, range(1, 9))}:
        raise StreamerError(f"--mtp {args.mtp!r} is not a list of off, auto and 1..8")
    ways, disks = args.executor.split(","), args.disk.split(",")
    if not set(ways) <= set(EXECUTORS):
        raise StreamerError(f"--executor {args.executor!r} is not a list of {', '.join(EXECUTORS)}")
    imitated = {name: Disk.parse(name) for name in disks}
    opened = open_model(path, args.dtype, mtp=set(drafts) != {"off"})
    if not opened.layers:
        raise StreamerError(f"{path} has no routed experts; there is nothing to page")
    if not opened.head and set(drafts) != {"off"}:
        raise StreamerError(f"--mtp {args.mtp}: {opened.head_notes[-1]}")
    disk = measure(opened.checkpoint.files, expert_bytes(opened), args.io)
    names: list[Name] = [] if args.no_memory_row else [MEMORY]
    names += map(Name._make, itertools.product(shares, drafts, ways, disks))
    workers = {n: _Worker(n, path, args) for n in names}
    results: dict[Name, list[dict[str, Any]]] = {name: [] for name in workers}
    try:
        with bar("rounds") as update:
            for i in range(args.rounds + 1):
                for name, worker in workers.items():
                    got = worker.run()
                    if i:
                        results[name].append(got)
                update(i + 1, args.rounds + 1, "rounds")
    finally:
        for worker in workers.values():
            worker.close()
    rates = {n: d.bandwidth if d else disk.bandwidth for n, d in imitated.items()}
    rows = [_row(name, results, rates.get(name.disk, disk.bandwidth)) for name in workers]
    print(table(rows))
    print(
        json.dumps(
            {
                "model": str(path),
                "experts": opened.experts,
                "bytes_per_expert": expert_bytes(opened),
                "disk_bytes_per_second": disk.bandwidth,
                "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
                "io": args.io,
                "tokens": args.tokens,
                "rounds": args.rounds,
                "temperature": args.temp,
                "rows": rows,
            }
        )
    )
    return 0


class _Worker:
    """One configuration in a process of its own, which waits between its turns."""

    def __init__(self, name: Name, path: Path, args: Any):
        self.name = _label(name)
        job = {
            **name._asdict(),
            "temp": args.temp,
            "path": str(path),
            "tokens": args.tokens,
            "prompt": args.prompt,
            "io": args.io if name.disk == "none" else "pread",
            "dtype": args.dtype,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamer.bench", "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise StreamerError(f"the {self.name} configuration did not finish")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _serve(job: dict[str, Any]) -> int:
    """A worker: load once, then one measured generation per line on stdin."""
    import mlx.core as mx

    from .footprint import peak_footprint
    from .loading import open_tokenizer
    from .opened import open_model

    path = Path(job["path"])
    tokens = list(open_tokenizer(open_model(path, job["dtype"])).encode(job["prompt"]))
    run = _in_memory(path, job) if job["share"] is None else _streamed(path, job)
    for turn, _ in enumerate(sys.stdin):
        mx.random.seed(turn)
        read_before = kernel_bytes_read()
        got = run(tokens, job["tokens"])
        got["kernel_bytes"] = kernel_bytes_read() - read_before
        got["peak"] = peak_footprint()
        got["greedy"] = job["temp"] == 0
        print(json.dumps(got), flush=True)
    return 0


def _in_memory(path: Path, job: dict[str, Any]) -> Any:
    """mlx-lm as it is, every expert in memory, in the dtype that streaming uses."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler

    from .opened import compute_dtype, load_lazily

    model, _ = load_lazily(path)
    dtype = compute_dtype(job["dtype"])
    if dtype is not None:
        floating = lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a  # noqa: E731
        model.update(tree_map(floating, model.parameters()))
    mx.eval(model.parameters())
    mx.clear_cache()

    def run(tokens: list[int], n: int) -> dict[str, Any]:
        out: list[int] = []
        began = time.perf_counter()
        sampler = make_sampler(job["temp"])
        for token, _ in generate_step(mx.array(tokens), model, max_tokens=n, sampler=sampler):
            if not out:
                began = time.perf_counter()
            out.append(token)
        return {"seconds": (time.perf_counter() - began) / (len(out) - 1), "out": out}

    return run


def _streamed(path: Path, job: dict[str, Any]) -> Any:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    from .disk import Disk
    from .engine import Timing, generate
    from .loading import load_streamed
    from .opened import open_model
    from .speculate import Speculation

    mtp = job["mtp"]
    total = open_model(path, mtp=mtp != "off").experts  # a head's experts share the pool
    slots = round(total * job["share"] / 100)
    model = load_streamed(
        path,
        slots=slots,
        io=job["io"],
        dtype=job["dtype"],
        mtp=mtp != "off",
        executor=job["executor"],
        disk=Disk.parse(job["disk"]),
    )
    counters, speculation = model.streamer.counters, None
    if mtp != "off":
        depth = None if mtp == "auto" else int(mtp)
        speculation = Speculation(model, model.streamer.opened.head, depth)

    def run(tokens: list[int], n: int) -> dict[str, Any]:
        timing = Timing()
        out: list[int] = []
        before = drafts = (0, 0, 0)
        if speculation:
            speculation.follow(0)
            c = speculation.counters
            drafts = (c.drafted, c.accepted, c.verify_passes)
        for step in generate(
            model,
            tokens,
            make_prompt_cache(model),
            max_tokens=n,
            timing=timing,
            sampler=make_sampler(job["temp"]),
            speculation=speculation,
            seeded=False,
        ):
            if not out:  # the prompt's reads are not decoding's
                before = (counters.hits, counters.misses, counters.bytes_wanted)
            out.append(step.token)
        got = {
            "seconds": timing.decode_seconds / (n - 1),
            "out": out,
            "hits": counters.hits - before[0],
            "misses": counters.misses - before[1],
            "bytes": (counters.bytes_wanted - before[2]) / (n - 1),
        }
        if speculation:
            got["drafted"] = speculation.counters.drafted - drafts[0]
            got["accepted"] = speculation.counters.accepted - drafts[1]
            got["passes"] = speculation.counters.verify_passes - drafts[2]
        return got

    return run


def kernel_bytes_read() -> int:
    """Bytes that the kernel fetched from storage for this process; 0 where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _label(name: Name) -> str:
    if name.share is None:
        return "mlx-lm"
    said = [f"{name.share}%"]
    said += [f"mtp {name.mtp}"] if name.mtp != "off" else []
    said += [name.executor] if name.executor != "layerwise" else []
    return ", ".join(said + ([f"disk {name.disk}"] if name.disk != "none" else []))


def _row(name: Name, results: dict[Name, list[dict[str, Any]]], disk: float) -> dict[str, Any]:
    runs = results[name]
    seconds = statistics.median(r["seconds"] for r in runs)
    row: dict[str, Any] = {
        "configuration": _label(name),
        "tokens_per_second": 1 / seconds,
        "peak_bytes": max(r["peak"] for r in runs),
        "kernel_bytes": statistics.median(r["kernel_bytes"] for r in runs),
    }
    plain = results.get(name._replace(mtp="off"))
    layerwise = results.get(name._replace(executor="layerwise"))
    if layerwise and name.executor != "layerwise":
        pairs = zip(layerwise, runs, strict=True)
        row["of_layerwise"] = statistics.median(p["seconds"] / r["seconds"] for p, r in pairs)
    if plain and name.mtp != "off":
        pairs = zip(plain, runs, strict=True)
        row["of_plain"] = statistics.median(p["seconds"] / r["seconds"] for p, r in pairs)
    if name.mtp != "off":
        row["drafted"] = sum(r["drafted"] for r in runs)
        row["acceptance"] = sum(r["accepted"] for r in runs) / max(1, row["drafted"])
        row["verify_passes"] = sum(r["passes"] for r in runs)
    memory = results.get(MEMORY)
    if memory:
        pairs = zip(memory, runs, strict=True)
        row["of_mlx_lm"] = statistics.median(m["seconds"] / r["seconds"] for m, r in pairs)
        same = all(r["out"] == m["out"] for m, r in zip(memory, runs, strict=True))
        if same or name.mtp == "off" or runs[0]["greedy"]:  # drafts are sampled with other noise
            row["same_tokens"] = same
    if "misses" in runs[0]:
        asked = sum(r["hits"] + r["misses"] for r in runs)
        row["hit_rate"] = sum(r["hits"] for r in runs) / asked if asked else 1.0
        row["bytes_per_token"] = statistics.median(r["bytes"] for r in runs)
        if memory:
            read = row["bytes_per_token"] / disk
            resident = [r for n, r in results.items() if n == MEMORY or n[:2] == (100, "off")]
            compute = [min(r["seconds"] for r in turn) for turn in zip(*resident, strict=True)]
            row["roofline"] = statistics.median(
                max(c, read) / r["seconds"] for c, r in zip(compute, runs, strict=True)
            )
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of the rows."""
    columns: dict[str, list[str]] = {
        "experts in memory": [r["configuration"] for r in rows],
        "tok/s": [f"{r['tokens_per_second']:.1f}" for r in rows],
        "of mlx-lm": _cells(rows, "of_mlx_lm", "{:.2f}"),
        "of plain": _cells(rows, "of_plain", "{:.2f}"),
        "of layer-wise": _cells(rows, "of_layerwise", "{:.2f}"),
        "drafts accepted": _cells(rows, "acceptance", "{:.0%}"),
        "hit rate": _cells(rows, "hit_rate", "{:.0%}"),
        "MB read a token": _cells(rows, "bytes_per_token", "{:.1f}", 1e6),
        "peak memory": _cells(rows, "peak_bytes", "{:.0f} MB", 1e6),
        "roofline": _cells(rows, "roofline", "{:.0%}"),
        "tokens": [_SAME[r.get("same_tokens")] for r in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    head = [" | ".join(columns), "|".join(["---"] * len(columns))]
    lines = ["| " + head[0] + " |", "|" + head[1] + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


_SAME = {True: "same", False: "DIFFERENT", None: ""}


def _cells(rows: list[dict[str, Any]], key: str, form: str, unit: float = 1) -> list[str]:
    return [form.format(r[key] / unit) if key in r else "" for r in rows]


if __name__ == "__main__":
    sys.exit(main())
