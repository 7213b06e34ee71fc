"""Where memory, reads and time go: one watched run, as a page to look at.

    python -m streamer.profile --model PATH --memory 8GB --out report.html
    python -m streamer.profile --memory 50% --json profile.json        # the embedded demo
    python -m streamer.profile --model PATH --sweep 4GB,8GB,12GB --out report.html

The run lives in a process of its own, whose memory is its own, and so does each run of a
sweep; what is drawn and replayed afterwards costs them nothing. The page needs matplotlib
(`pip install '.[profile]'`), --json does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .bench import PROMPT
from .console import (
    Parser,
    check_writable,
    command,
    filename,
    prompt_of,
    say,
    write_json,
    write_text,
)
from .errors import UsageError
from .footprint import parse_size, percentage
from .interrupted import importing
from .needed import installing
from .run import DEMO, add_options

MOST_BARS = 160  # of the timeline
TOKENS = 128


def parser() -> Parser:
    p = Parser(prog="streamer profile", description="Show where memory, reads and time go.")
    p.add_argument("--prompt", metavar="FILE", help="a file that holds the prompt, or - for stdin")
    p.add_argument("--out", type=filename, metavar="HTML", help="write the page to this file")
    p.add_argument("--json", type=filename, metavar="FILE", help="write everything as JSON")
    p.add_argument("--sweep", metavar="4GB,8GB", help="budgets to run besides, one by one")
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_options(p, max_tokens=TOKENS)
    # a pool that earlier runs have warmed would hide what this text asks for
    p.set_defaults(chat=False, system=None, stats=None, heat="off")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.worker:
        return _work(args)
    if not args.out and not args.json:
        raise UsageError("give --out report.html, --json FILE, or both")
    if args.out and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"a page needs matplotlib: {installing('[profile]')}")
    check_writable(args.out)
    check_writable(args.json)
    prompt = _prompt(args.prompt)
    budgets = _budgets(args)
    with tempfile.TemporaryDirectory(prefix="streamer-profile-") as folder:
        runs = []
        for i, memory in enumerate(budgets):
            code = _spawn(argv, memory, prompt, Path(folder) / str(i))
            if code:
                return code
            runs.append(json.loads((Path(folder) / str(i) / "run.json").read_text()))
        document = _document(runs, Path(folder), swept=bool(args.sweep))
    if args.json:
        write_json(args.json, document)
        say(f"wrote {args.json}")
    if args.out:
        from .report import page

        write_text(args.out, page(document))
        say(f"wrote {args.out}")
    return 0


def _prompt(file: str | None) -> str:
    """Of the file, or the benchmark's."""
    if file is None:
        return PROMPT
    if file == "-":
        return prompt_of(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot read the prompt {file}: {why}") from error
    if not text:
        raise UsageError("the prompt is empty")
    return text


def _budgets(args: Any) -> list[str | None]:
    """What to run: --memory first, then those of --sweep."""
    if args.sweep is None:
        return [args.memory]
    swept = [part.strip() for part in args.sweep.split(",") if part.strip()]
    if not swept:
        raise UsageError("--sweep takes budgets, such as 4GB,8GB or 25%,50%")
    for memory in swept:
        if memory.lower() != "min" and percentage(memory) is None:  # not after the others have run
            parse_size(memory)
    first = [args.memory] if args.memory else []
    return list(dict.fromkeys([*first, *swept]))


def _spawn(argv: list[str], memory: str | None, prompt: str, folder: Path) -> int:
    """Run one budget in a process of its own; its exit code."""
    folder.mkdir()
    (folder / "prompt").write_text(prompt, encoding="utf-8")
    command = [sys.executable, "-m", "streamer.profile", *argv]
    command += ["--worker", str(folder)]
    if memory is not None:
        command += ["--memory", memory]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


def _work(args: Any) -> int:
    """The worker: one run."""
    with importing():
        from .watched import watched_run

    prompt = (args.worker / "prompt").read_text(encoding="utf-8")
    document, routes = watched_run(args, prompt, DEMO)
    routes.save(args.worker / "run.routes")
    write_json(args.worker / "run.json", document)
    return 0


def _document(runs: list[dict[str, Any]], folder: Path, *, swept: bool) -> dict[str, Any]:
    """The first run's, with what its routes say of other pools, and the sweep."""
    from .forecast import pool_curve, sweep
    from .routes import Routes
    from .timeline import summary, timeline

    routes = [Routes.load(folder / str(i) / "run.routes") for i in range(len(runs))]
    document = runs[0]
    document["timeline"] = timeline(document["steps"], MOST_BARS)
    document["summary"] = summary(document)
    document["pool"] = pool_curve(document, routes[0]) if document["model"]["groups"] else None
    if swept:
        document["sweep"] = sweep(runs, routes)
    return document


if __name__ == "__main__":
    sys.exit(main())
