"""What watching costs: the same reply with a watcher and without, in turns in one process.

    python -m tools.watch_cost --memory 50%
    python -m tools.watch_cost --model big --memory 50% --disk 1GB/s --rounds 40

Three ways take turns, in another order each round: nobody watches; `streamer.profile`'s profiler
and its samples of memory; the view of `streamer.run --live`, on a pseudo-terminal whose other end
is read and thrown away. In each the text goes to that terminal as it comes. A greedy reply to the
same prompt asks for the same experts each time and leaves the pool as the last one did, so rounds
differ by what else the machine does only; what is done once, before the reply, is not counted.
Of each round the watched time over the unwatched one is taken, and of these the median, with a
range that holds the true one 19 times in 20 (order statistics, no assumption about the spread).
Steps are compared one by one too, which tells more of a cost that every step has: of each place in
the text the median over rounds, watched and not, and the sums of these; its range is of rounds
drawn again (bootstrap). Processor time, of all threads, is told beside them.

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import pty
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from streamer.bench import PROMPT
from streamer.console import Parser, command, number, say
from streamer.errors import UsageError
from streamer.machine import machine, versions
from streamer.owners import SETTLING, Ledger, Sampler
from streamer.profiler import Profiler
from streamer.run import DEMO, add_options
from streamer.session import Session, open_session

UNWATCHED, WAYS = "unwatched", ("profile", "live")
WARM = 2  # rounds before those that count: the pool, the page cache, compiled samplers


def parser() -> Parser:
    p = Parser(prog="watch_cost", description="What watching a run costs, in turns.")
    p.add_argument("--rounds", type=number(6, 10_000, int), default=30)
    p.add_argument("--seconds", type=number(1), help="stop after about so many")
    p.add_argument("--ways", default="profile,live", help="which of them to compare")
    p.add_argument("--prompt", default=PROMPT)
    add_options(p, max_tokens=64)
    p.set_defaults(chat=False, system=None, stats=None, heat="off")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    ways = args.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        raise UsageError(f"--ways {min(unknown)!r} is neither profile nor live")
    until = time.monotonic() + (args.seconds or math.inf)
    session = open_session(args, args.prompt, DEMO)
    try:
        with terminal() as tty:
            rounds = _rounds(session, args, [UNWATCHED, *ways], tty, until)
    finally:
        session.close()
    rows = [_row(way, rounds) for way in ways]
    head = " | ".join(f"{name} over unwatched | range" for name in KINDS.values())
    print(f"| watched by | {head} |")
    print("|---" * (1 + 2 * len(KINDS)) + "|")
    for row in rows:
        cells = [_cells(row[name]) for name in KINDS]
        print(f"| {row['way']} | {' | '.join(cells)} |")
    about: dict[str, Any] = {"command": shlex.join(["python", "-m", "tools.watch_cost", *given])}
    about |= {"machine": machine(), "versions": versions(), "rounds": len(rounds)}
    unwatched = statistics.median(r[UNWATCHED].seconds for r in rounds)
    about |= {"tokens": len(session.tokens), "unwatched_seconds": unwatched}
    print(json.dumps(about | {"rows": rows}))
    return 0


@contextlib.contextmanager
def terminal() -> Iterator[TextIO]:
    """A pseudo-terminal to write to, whose other end somebody reads."""
    ours, theirs = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 65536):
                pass

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        with open(theirs, "w", encoding="utf-8") as tty:
            yield tty
    finally:
        reader.join(timeout=5)
        os.close(ours)


class Reply(NamedTuple):
    """Seconds, processor seconds of all threads, and those of each piece of text."""

    seconds: float
    processor: float
    steps: list[float]


Round = dict[str, Reply]  # by way
KINDS = {"time": "time", "steps": "steps' time", "processor_time": "processor time"}


def _rounds(
    session: Session, args: argparse.Namespace, ways: Sequence[str], tty: TextIO, until: float
) -> list[Round]:
    orders = itertools.cycle(itertools.permutations(ways))
    rounds: list[Round] = []
    for i in range(args.rounds + WARM):
        got = {way: timed(session, way, tty) for way in next(orders)}
        if i >= WARM:
            rounds.append(got)
        if time.monotonic() > until and len(rounds) >= 6:
            say(f"{len(rounds)} rounds")
            break
    return rounds


def timed(session: Session, way: str, tty: TextIO) -> Reply:
    """A reply, watched in a way."""
    streamer = session.streamer
    if way != "profile":  # a sampler does: what a pause costs what follows is not watching's
        time.sleep(SETTLING)
    with contextlib.ExitStack() as stack:
        profiler = Profiler(session.model) if way == "profile" else None
        ledger = Ledger(session.model, lambda: session.caches, streamer.opened.files)

        def write(piece: str) -> None:
            tty.write(piece)
            tty.flush()

        if way == "live":
            from streamer.live import SteadyConsole, View

            console = SteadyConsole(file=tty, force_terminal=True, width=120, height=40)
            view = View(session, console, own_text=True)
        if way == "profile":
            streamer.watch = profiler
            stack.enter_context(Sampler(ledger))
        if way == "live":
            stack.enter_context(view.shown())
            write = view.write  # type: ignore[assignment]
        began, cpu = time.perf_counter(), time.process_time()
        ends = [began]
        for piece in session.reply(session.prompt_tokens, lambda done, total: None):
            write(piece)
            ends.append(time.perf_counter())
        stack.close()
        seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    streamer.watch = None
    return Reply(seconds, spent, np.diff(ends).tolist())


def _row(way: str, rounds: Sequence[Round]) -> dict[str, Any]:
    made: dict[str, Any] = {"way": way}
    for name, of in (("time", "seconds"), ("processor_time", "processor")):
        ratios = [getattr(r[way], of) / getattr(r[UNWATCHED], of) for r in rounds]
        made[name] = {"median": statistics.median(ratios), "range": median_range(ratios)}
    watched, alone = (np.array([r[w].steps for r in rounds]) for w in (way, UNWATCHED))
    made["steps"] = {"median": _ratio(watched, alone), "range": _ratio_range(watched, alone)}
    return made


def _ratio(watched: np.ndarray, alone: np.ndarray) -> float:
    """Of steps [rounds, places]."""
    return float(np.median(watched, axis=0).sum() / np.median(alone, axis=0).sum())


def _ratio_range(watched: np.ndarray, alone: np.ndarray) -> tuple[float, float]:
    draw, count = np.random.default_rng(0), len(watched)
    drawn = [draw.integers(0, count, count) for _ in range(400)]
    low, high = np.quantile([_ratio(watched[d], alone[d]) for d in drawn], (0.025, 0.975))
    return float(low), float(high)


def _cells(found: dict[str, Any]) -> str:
    low, high = found["range"]
    return f"{found['median']:.3f} | {low:.3f} to {high:.3f}"


def median_range(values: Sequence[float], miss: float = 0.05) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the true median but in `miss` of cases."""
    ordered, n = sorted(values), len(values)
    below, i = 0.0, 0  # chance that fewer than i + 1 values lie below the median
    while i < n // 2 and below + math.comb(n, i) / 2**n <= miss / 2:
        below += math.comb(n, i) / 2**n
        i += 1
    i = max(0, i - 1)
    return ordered[i], ordered[n - 1 - i]


if __name__ == "__main__":
    sys.exit(main())
