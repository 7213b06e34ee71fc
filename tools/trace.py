"""Record what the routers choose, and replay it on other pools.

    python -m tools.trace record --pool 50% --prompt "def " --max-tokens 120 --out demo.routes
    python -m tools.trace replay demo.routes --pool 25%,50%,75% --policy lrfu,lru,s3fifo,lfu,belady
    python -m tools.trace guess demo.routes --pool 25%,50%

`record` decodes greedily, one prompt after the other, on one pool. `replay` gives hit
rates and bytes read at any pool and by any policy; on the recorded pool by LRU they are
those of the recorded run, and it says so. `guess` asks what share of the misses is named
by guessers that need nothing but the past; rehearsal and the next layer's router need
the model, and are measured where they run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamer.console import Parser, command, number, say
from streamer.errors import UsageError
from streamer.footprint import format_size
from streamer.hub import resolve
from streamer.loading import load, load_streamed, open_tokenizer
from streamer.opened import open_model
from streamer.recorder import record
from streamer.replay import replay, slots_of, unions
from streamer.routes import Routes
from streamer.run import DEMO
from tools.guessers import GUESSERS, score

PROMPTS = ("def ", "import os\n\n", "class ")


def parser() -> Parser:
    p = Parser(prog="trace", description="Record what routers choose; replay it on other pools.")
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("record", help="decode some prompts and note every choice")
    r.add_argument("--model", help="folder or repository; the embedded demo when left out")
    r.add_argument("--prompt", action="append", help="may be given again; a few when left out")
    r.add_argument("--max-tokens", type=number(1, 1 << 20, int), default=120, help="of each")
    size = r.add_mutually_exclusive_group()
    size.add_argument("--memory", help="bound on the process, as of streamer.run")
    size.add_argument("--slots", type=number(0, 1 << 30, int), help="experts in the pool")
    size.add_argument("--pool", type=_share, default=0.5, help="share of the experts, 50%%")
    r.add_argument("--mtp", type=number(0, 8, int), default=0, help="drafts of each step")
    r.add_argument("--out", type=Path, required=True)
    for name, text in (("replay", "hit rates of pools"), ("guess", "what the past would name")):
        q = commands.add_parser(name, help=text)
        q.add_argument("file", type=Path)
        q.add_argument("--pool", type=_shares, help="25%%,50%%: shares of the experts")
        q.add_argument("--slots", type=_counts, help="64,128: experts in the pool")
        names = ("lrfu", "lru", "s3fifo", "lfu", "belady") if name == "replay" else tuple(GUESSERS)
        option = "--policy" if name == "replay" else "--guesser"
        q.add_argument(option, dest="names", type=lambda t: t.split(","), default=list(names))
        q.add_argument("--json", action="store_true")
    return p


def _share(text: str) -> float:
    if not text.endswith("%"):
        raise ValueError
    return float(number(0, 100)(text[:-1])) / 100


_share.__name__ = "share (such as 50%)"


def _shares(text: str) -> list[float]:
    return [_share(part) for part in text.split(",")]


_shares.__name__ = "list of shares (such as 25%,50%)"


def _counts(text: str) -> list[int]:
    return [number(1, 1 << 30, int)(part) for part in text.split(",")]


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return {"record": _record, "replay": _replay, "guess": _guess}[args.command](args)


def _record(args: Any) -> int:
    path = resolve(args.model) if args.model else DEMO
    if args.memory:
        model: Any = load(path, args.memory, mtp=args.mtp > 0, executor="layerwise")[0]
    else:
        experts = open_model(path, mtp=args.mtp > 0).experts
        slots = round(args.pool * experts) if args.slots is None else args.slots
        model = load_streamed(path, slots=slots, dtype="auto", mtp=args.mtp > 0)
    tokenizer = open_tokenizer(model.streamer.opened)
    prompts = [list(tokenizer.encode(text)) for text in args.prompt or PROMPTS]
    if not all(prompts):
        raise UsageError("a prompt has no tokens")
    try:
        routes = record(model, prompts, args.max_tokens, args.mtp)
    finally:
        model.streamer.close()
    routes.save(args.out)
    say(f"{len(routes.passes)} passes, {len(routes.calls)} calls of {routes.model} in {args.out}")
    return 0


def _sizes(args: Any, routes: Routes) -> list[tuple[int, ...]]:
    """Slots of each group for every pool asked for; that of the recorded run by default."""
    if args.pool is None and args.slots is None:
        return [tuple(group.slots for group in routes.groups)]
    shares = (args.pool or []) + [n / max(1, routes.total) for n in args.slots or []]
    return [slots_of(routes, share) for share in shares]


def _replay(args: Any) -> int:
    routes = Routes.load(args.file)
    results = [replay(routes, n, name) for n in _sizes(args, routes) for name in args.names]
    depths = unions(routes)
    if args.json:
        rows = [
            asdict(r) | {"hit_rate": r.hit_rate, "decode_hit_rate": r.rate_of("decode", "verify")}
            for r in results
        ]
        print(json.dumps({"model": routes.model, "replays": rows, "unions": depths}))
        return 0
    print(f"{'pool':>10} {'policy':8} {'hit rate':>8} {'decoding':>8} {'read':>9}")
    for r in results:
        pool = f"{r.slots / max(1, routes.total):.0%} {r.slots}"
        print(
            f"{pool:>10} {r.policy:8} {r.hit_rate:8.1%} {r.rate_of('decode', 'verify'):8.1%} "
            f"{format_size(r.bytes_read):>9}{_same(routes, r)}"
        )
    print("M(rows):", ", ".join(f"{i} {m:.2f}" for i, m in enumerate(depths, 1)))
    return 0


def _same(routes: Routes, result: Any) -> str:
    if result.policy != "lrfu" or result.slots != routes.slots:
        return ""
    same = (result.hits, result.misses) == (routes.hits, routes.misses)
    return "  as recorded" if same else f"  recorded: {routes.hits} hits, {routes.misses} misses"


def _guess(args: Any) -> int:
    routes = Routes.load(args.file)
    scores = [s for slots in _sizes(args, routes) for s in score(routes, slots, args.names)]
    if args.json:
        rows = [asdict(s) | {"recall": s.recall, "precision": s.precision} for s in scores]
        print(json.dumps({"model": routes.model, "guessers": rows}))
        return 0
    print(f"{'pool':>10} {'guesser':10} {'recall':>7} {'precision':>9} {'named per miss':>15}")
    for s in scores:
        pool = f"{s.slots / max(1, routes.total):.0%} {s.slots}"
        named = s.named / s.misses if s.misses else 0.0
        print(f"{pool:>10} {s.guesser:10} {s.recall:7.1%} {s.precision:9.1%} {named:15.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
