"""One configuration of the benchmark in a process of its own, which waits between its turns.

`Worker` is the parent's end: `run()` asks for a turn and gives what it measured. `serve` is
the child's: load once, then one measured generation per line on stdin. A process of its own
has a peak of its own, and can be put under a memory limit of its own.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bench_rows import KILLED, Configuration, Run
from .memory_cgroup import MemoryCgroup

Turn = Callable[[list[int], int], Run]  # prompt, tokens -> what was measured


class Worker:
    """job: what `serve` is told besides the configuration; group: its memory limit."""

    def __init__(self, one: Configuration, job: dict[str, Any], group: MemoryCgroup | None):
        self._group, self._dead = group, ""
        told = json.dumps(job | one.job())
        argv = [sys.executable, "-m", "streamer.bench", "--worker", told]
        # in a group of its own: Ctrl-C is for the parent, which ends it
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "process_group": 0}
        if group is None:
            self._process = subprocess.Popen(argv, text=True, **pipes)  # type: ignore[call-overload]
        else:
            self._process = group.start(argv, **pipes)

    def run(self) -> Run:
        """A turn; {"failed": why} for ever once the process has ended."""
        if self._dead:
            return {"failed": self._dead}
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            killed = self._group is not None and self._group.killed
            self._dead = KILLED if killed else "ended without a result"
            return {"failed": self._dead}
        got = json.loads(line)
        if self._group is not None:
            got["peak"] = self._group.peak
        return got

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(job: dict[str, Any]) -> int:
    """The child's loop; ends with its stdin."""
    import mlx.core as mx

    from .footprint import peak_footprint
    from .loading import open_tokenizer
    from .opened import open_model

    path = Path(job["path"])
    opened = open_model(path, job["dtype"], mtp=job["mtp"] != "off")
    tokens = list(open_tokenizer(opened).encode(job["prompt"]))
    run = _in_memory(path, job) if job["kind"] == "mlx-lm" else _streamed(opened, job, len(tokens))
    for turn, _ in enumerate(sys.stdin):
        mx.random.seed(turn)
        read_before = kernel_bytes_read()
        got = run(tokens, job["tokens"])
        got["kernel_bytes"] = kernel_bytes_read() - read_before
        got["peak"] = peak_footprint()
        got["greedy"] = job["temp"] == 0
        print(json.dumps(got), flush=True)
    return 0


def _in_memory(path: Path, job: dict[str, Any]) -> Turn:
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

    def run(tokens: list[int], n: int) -> Run:
        out: list[int] = []
        began = time.perf_counter()
        sampler = make_sampler(job["temp"])
        for token, _ in generate_step(mx.array(tokens), model, max_tokens=n, sampler=sampler):
            if not out:
                began = time.perf_counter()
            out.append(token)
        return {"seconds": (time.perf_counter() - began) / (len(out) - 1), "out": out}

    return run


def _streamed(opened: Any, job: dict[str, Any], prompt: int) -> Turn:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    from .engine import Timing, generate
    from .speculate import Speculation

    mtp = job["mtp"]
    model: Any = _loaded(opened, job, prompt)
    counters, speculation = model.streamer.counters, None
    if mtp != "off":
        depth = None if mtp == "auto" else int(mtp)
        speculation = Speculation(model, model.streamer.opened.head, depth)

    def run(tokens: list[int], n: int) -> Run:
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
            "slots": model.streamer.slots,
        }
        if speculation:
            got["drafted"] = speculation.counters.drafted - drafts[0]
            got["accepted"] = speculation.counters.accepted - drafts[1]
            got["passes"] = speculation.counters.verify_passes - drafts[2]
        return got

    return run


def _loaded(opened: Any, job: dict[str, Any], prompt: int) -> Any:
    """The model with the share of its experts in the pool, or with what the machine can spare."""
    from .budget import divide
    from .disk import Disk
    from .footprint import default_budget
    from .loading import attach, load_streamed

    disk = Disk.parse(job["disk"])
    io = "pread" if disk else job["io"]  # from the page cache, then held back
    if job["share"] is None:
        context, spare = prompt + job["tokens"], default_budget()[0]
        budget = divide(opened, None, context, spare=spare, kv_bits=job["kv_bits"])
        return attach(opened, budget, io, lambda *_: None, executor=job["executor"], disk=disk)
    slots = round(opened.experts * job["share"] / 100)  # a head's experts share the pool
    return load_streamed(
        opened.path,
        slots=slots,
        io=io,
        dtype=job["dtype"],
        mtp=job["mtp"] != "off",
        executor=job["executor"],
        disk=disk,
        kv_bits=job["kv_bits"],
    )


def kernel_bytes_read() -> int:
    """Bytes that the kernel fetched from storage for this process; 0 where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
