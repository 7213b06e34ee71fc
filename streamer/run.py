"""Run a mixture-of-experts model larger than memory.

    python -m streamer.run --model PATH --memory 8GB --prompt "..."
    python -m streamer.run --memory 50% --prompt "def "      # the embedded demo
    python -m streamer.run --model PATH --chat

Text goes to stdout as it is made, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import (
    Interrupted,
    Parser,
    as_utf8,
    bar,
    check_writable,
    command,
    filename,
    interruptible,
    number,
    prompt_of,
    say,
    write_json,
)  # fmt: skip
from .disk import Disk
from .errors import UsageError
from .interrupted import importing
from .kv import bits_option

if TYPE_CHECKING:
    from .session import Session

DEMO = Path(__file__).parent / "demo"


def parser() -> Parser:
    p = Parser(prog="streamer run", description="Run a model larger than memory.")
    p.add_argument("--prompt", help="the prompt, or - to read it from stdin")
    p.add_argument("--chat", action="store_true", help="keep a conversation")
    p.add_argument(
        "--system", type=lambda text: as_utf8(text, "--system"), help="system prompt of the chat"
    )
    p.add_argument("--stats", type=filename, help="write what happened to this JSON file")
    p.add_argument(
        "--live", action="store_true", help="show speed, hits and reads in the terminal meanwhile"
    )
    add_options(p)
    return p


def add_options(p: Parser, max_tokens: int = 256) -> None:
    """What a session needs; `streamer.profile` takes the same."""
    p.add_argument("--model", help="folder or repository; the embedded demo when left out")
    p.add_argument("--raw", action="store_true", help="do not apply the model's chat template")
    p.add_argument(
        "--memory",
        help="bound on the whole process: 8GB, 50%% (of the experts), min; what can be spared "
        "when left out",
    )
    p.add_argument(
        "--max-tokens",
        type=number(1, 1 << 30, int),
        default=max_tokens,
        help=f"of a reply at most; {max_tokens} when left out",
    )
    p.add_argument(
        "--context",
        type=number(1, 1 << 30, int),
        help="tokens to plan the KV cache for, where a reply ends too; the prompt and --max-tokens "
        "when left out",
    )
    p.add_argument("--temp", type=number(0), default=0.0, help="0, when left out, is greedy")
    p.add_argument("--top-p", type=number(0, 1), default=1.0, help="0 or 1 is all")
    p.add_argument("--top-k", type=number(0, 1 << 30, int), default=0, help="0 is all")
    p.add_argument("--min-p", type=number(0, 1), default=0.0, help="0 is all")
    p.add_argument("--repetition-penalty", type=number(0), default=1.0, help="1 is none")
    p.add_argument("--seed", type=number(0, (1 << 63) - 1, int), help="the same text every time")
    p.add_argument(
        "--mtp",
        type=_depth,
        default="off",
        metavar="auto|off|1..8",
        help="tokens that the model's MTP head drafts at each step (auto: by measured cost)",
    )
    p.add_argument(
        "--kv-bits",
        type=bits_option,
        default="auto",
        metavar="auto|16|8|4|3.5|3|2.5|2",
        help="bits a channel of the KV cache, keys and values of every layer alike (auto: 16, full "
        "precision, unless the context would not fit)",
    )
    p.add_argument(
        "--prompt-cache",
        type=filename,
        metavar="FILE",
        help="keep the prompt, or the chat, in this file, and read none of it again next time",
    )
    p.add_argument(
        "--io",
        choices=("auto", "mmap", "pread", "direct"),
        default="auto",
        help="how experts are read; auto: as is fastest on this disk",
    )
    p.add_argument(
        "--executor",
        choices=("auto", "layerwise", "lookahead", "rehearse"),
        default="auto",
        help="stop where a layer misses experts (layerwise); while it waits, run those behind it "
        "with what is resident, to learn what to read (lookahead); run all with what is resident "
        "first (rehearse); auto, when left out: what is measured to be faster",
    )
    p.add_argument(
        "--guess",
        default="auto",
        metavar="auto|off|token,router,...",
        help="read ahead what these name: token, previous and frequency by the past, router by the "
        "next layer's; auto: where --executor auto finds that it pays",
    )
    p.add_argument(
        "--disk",
        type=Disk.parse,
        metavar="1.5GB/s[@100us]",
        help="imitate a disk as slow as this",
    )
    p.add_argument(
        "--heat",
        type=_heat,
        default=os.environ.get("STREAMER_HEAT") or "auto",
        metavar="auto|off|FILE",
        help="start with the experts that earlier runs used most, remembered in a file of 1 MB at "
        "most (auto: one per model in the cache folder; STREAMER_HEAT sets the default)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", "stored", "float32"),
        default="auto",
        help="of what is computed (auto: float32 on CPUs, as stored on GPUs)",
    )


def _depth(text: str) -> str | int:
    """An argparse type: auto, off or a number of drafts."""
    if text in ("auto", "off"):
        return text
    if text not in map(str, range(1, 9)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, off and 1 to 8")
    return int(text)


def _heat(text: str) -> str:
    """An argparse type: auto, off or a file, which `on` is not meant as."""
    if text in ("", "on"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, off and a file")
    return text


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.chat and args.prompt is not None:
        raise UsageError("--chat and --prompt exclude each other")
    if not args.chat and args.prompt is None:
        raise UsageError("give --prompt TEXT, --prompt - to read stdin, or --chat")
    if args.system is not None and not args.chat:
        raise UsageError("--system goes with --chat")
    prompt = None if args.chat else prompt_of(args.prompt)
    check_writable(args.stats)

    with importing():
        from .session import open_session

    began = time.perf_counter()
    session = open_session(args, prompt, DEMO)
    try:
        say(session.headline())
        if args.chat:
            from .chat import converse

            return converse(session, args)
        return _once(session, args, time.perf_counter() - began)
    finally:
        session.close()


def _once(session: Session, args: Any, load_seconds: float) -> int:
    shown = print_reply(session, session.prompt_tokens, live=args.live)
    if shown:
        print(flush=True)
    say(session.closing())
    if args.stats:
        write_json(args.stats, {**session.stats(), "load_seconds": load_seconds})
    return 130 if session.interrupted else 0


def print_reply(session: Session, tokens: list[int], *, live: bool = False) -> str:
    """Generate after `tokens`, printing as it comes; Ctrl-C ends it. Returns the text."""
    text = ""
    with interruptible() as stopped:
        try:
            with _shown(session, live) as (update, write):

                def on_prompt(done: int, total: int) -> None:
                    update(done, total)
                    if stopped():
                        raise Interrupted

                for piece in session.reply(tokens, on_prompt):
                    text += piece
                    write(piece)
                    if stopped():
                        raise Interrupted
        except Interrupted:
            session.interrupt()
    return text


@contextmanager
def _shown(
    session: Session, live: bool
) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """What is told of the prompt's progress, and what is given the text."""
    if live:
        from .live import live_view

        with live_view(session) as view:
            yield view.prompt, view.write
        return
    with ExitStack() as prompt:
        update = prompt.enter_context(bar("prompt"))

        def write(piece: str) -> None:
            prompt.close()  # the bar is gone before there is text
            print(piece, end="", flush=True)

        yield lambda done, total: update(done, total, "tokens"), write


if __name__ == "__main__":
    sys.exit(main())
