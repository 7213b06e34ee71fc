"""Streamed against in-memory decoding, interleaved, on this machine.

    python -m streamer.bench --model PATH
    python -m streamer.bench --quick

Each configuration lives in a process of its own, whose peak memory is its own;
they take turns (A B C A B C ...), the first round is dropped, medians are
quoted. What bounds a step: computing it, which takes what mlx-lm takes with all
experts in memory, or reading its misses at the disk's measured bandwidth,
whichever is more; `roofline` is the share of that bound's speed reached. Reads
go past the page cache (`--io direct`), so a hit in it cannot pass for speed.

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .console import Parser, bar, command, number
from .errors import StreamerError

SHARES = (100, 50, 25, 12)
PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n    "


def parser() -> Parser:
    p = Parser(prog="streamer bench", description="Measure streamed against in-memory decoding.")
    p.add_argument("--model", help="folder or repository; the embedded demo when left out")
    p.add_argument("--shares", default=",".join(map(str, SHARES)), help="%% of experts in memory")
    p.add_argument("--tokens", type=number(8, 4096, int), default=64, help="tokens per round")
    p.add_argument("--rounds", type=number(1, 100, int), default=5)
    p.add_argument("--prompt", default=PROMPT)
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
    from .hub import resolve
    from .loading import expert_bytes
    from .opened import open_model
    from .probe import measure
    from .run import DEMO

    path = resolve(args.model) if args.model else DEMO
    opened = open_model(path, args.dtype)
    if not opened.layers:
        raise StreamerError(f"{path} has no routed experts; there is nothing to page")
    try:
        shares = [int(s) for s in args.shares.split(",")]
    except ValueError:
        raise StreamerError(f"--shares {args.shares!r} is not a list of percentages") from None
    disk = measure(opened.checkpoint.files, expert_bytes(opened), args.io)
    names: list[str | int] = [] if args.no_memory_row else ["mlx-lm"]
    names += shares
    workers = {n: _Worker(n, path, args) for n in names}
    results: dict[str | int, list[dict[str, Any]]] = {name: [] for name in workers}
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
    rows = [_row(name, results, disk.bandwidth) for name in workers]
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
                "rows": rows,
            }
        )
    )
    return 0


class _Worker:
    """One configuration in a process of its own, which waits between its turns."""

    def __init__(self, name: str | int, path: Path, args: Any):
        self.name = name
        job = {
            "share": name,
            "path": str(path),
            "tokens": args.tokens,
            "prompt": args.prompt,
            "io": args.io,
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
    from .footprint import peak_footprint
    from .loading import open_tokenizer
    from .opened import open_model

    path = Path(job["path"])
    tokens = list(open_tokenizer(open_model(path, job["dtype"])).encode(job["prompt"]))
    run = _in_memory(path, job) if job["share"] == "mlx-lm" else _streamed(path, job)
    for _ in sys.stdin:
        read_before = kernel_bytes_read()
        got = run(tokens, job["tokens"])
        got["kernel_bytes"] = kernel_bytes_read() - read_before
        got["peak"] = peak_footprint()
        print(json.dumps(got), flush=True)
    return 0


def _in_memory(path: Path, job: dict[str, Any]) -> Any:
    """mlx-lm as it is, every expert in memory, in the dtype that streaming uses."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.generate import generate_step

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
        for token, _ in generate_step(mx.array(tokens), model, max_tokens=n):
            if not out:
                began = time.perf_counter()
            out.append(token)
        return {"seconds": (time.perf_counter() - began) / (len(out) - 1), "out": out}

    return run


def _streamed(path: Path, job: dict[str, Any]) -> Any:
    from mlx_lm.models.cache import make_prompt_cache

    from .engine import Timing, generate
    from .loading import expert_count, load_streamed

    slots = round(expert_count(path) * job["share"] / 100)
    model = load_streamed(path, slots=slots, io=job["io"], dtype=job["dtype"])
    counters = model.streamer.counters

    def run(tokens: list[int], n: int) -> dict[str, Any]:
        timing = Timing()
        out: list[int] = []
        before = (0, 0, 0)
        for step in generate(model, tokens, make_prompt_cache(model), max_tokens=n, timing=timing):
            if not out:  # the prompt's reads are not decoding's
                before = (counters.hits, counters.misses, counters.bytes_wanted)
            out.append(step.token)
        return {
            "seconds": timing.decode_seconds / (n - 1),
            "out": out,
            "hits": counters.hits - before[0],
            "misses": counters.misses - before[1],
            "bytes": (counters.bytes_wanted - before[2]) / (n - 1),
        }

    return run


def kernel_bytes_read() -> int:
    """Bytes that the kernel fetched from storage for this process; 0 where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _row(name: str | int, results: dict[Any, list[dict[str, Any]]], disk: float) -> dict[str, Any]:
    runs = results[name]
    seconds = statistics.median(r["seconds"] for r in runs)
    row: dict[str, Any] = {
        "configuration": name if name == "mlx-lm" else f"{name}%",
        "tokens_per_second": 1 / seconds,
        "peak_bytes": max(r["peak"] for r in runs),
        "kernel_bytes": statistics.median(r["kernel_bytes"] for r in runs),
    }
    memory = results.get("mlx-lm")
    if memory:
        pairs = zip(memory, runs, strict=True)
        row["of_mlx_lm"] = statistics.median(m["seconds"] / r["seconds"] for m, r in pairs)
        row["same_tokens"] = all(r["out"] == memory[0]["out"] for r in runs)
    if "misses" in runs[0]:
        asked = sum(r["hits"] + r["misses"] for r in runs)
        row["hit_rate"] = sum(r["hits"] for r in runs) / asked if asked else 1.0
        row["bytes_per_token"] = statistics.median(r["bytes"] for r in runs)
        if memory:
            read = row["bytes_per_token"] / disk
            pairs = zip(memory, runs, strict=True)
            row["roofline"] = statistics.median(
                max(m["seconds"], read) / r["seconds"] for m, r in pairs
            )
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of the rows."""
    lines = [
        "| experts in memory | tok/s | of mlx-lm | hit rate | MB read a token | peak memory "
        "| roofline | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            r["configuration"],
            f"{r['tokens_per_second']:.1f}",
            f"{r['of_mlx_lm']:.2f}" if "of_mlx_lm" in r else "",
            f"{r['hit_rate']:.0%}" if "hit_rate" in r else "",
            f"{r['bytes_per_token'] / 1e6:.1f}" if "bytes_per_token" in r else "",
            f"{r['peak_bytes'] / 1e6:.0f} MB",
            f"{r['roofline']:.0%}" if "roofline" in r else "",
            {True: "same", False: "DIFFERENT"}.get(r.get("same_tokens", ""), ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
