"""The console script: `streamer run|plan|profile|bench|convert ...`."""

from __future__ import annotations

import importlib
import sys

from . import __version__
from .interrupted import EXIT, importing
from .needed import told

COMMANDS = {
    "run": "generate text or chat with a model larger than memory",
    "plan": "show what a memory budget buys",
    "profile": "show where memory, reads and time go, as a page",
    "bench": "measure streamed against in-memory decoding",
    "convert": "rewrite a checkpoint whose experts cannot be paged in place",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch to `streamer.<command>.main`; exit code 2 for an unknown command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if argv[:1] in (["-V"], ["--version"]):
        print(f"moe-streamer {__version__}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"unknown command {argv[0]!r}" if argv else "no command given"
        print(f"error: {given}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        with importing():
            module = importlib.import_module(f"streamer.{argv[0]}")
    except KeyboardInterrupt:  # of a caller whose handler raises it
        return EXIT
    except ImportError as error:
        if (line := told(error)) is None:
            raise
        print("error:", line, file=sys.stderr)
        return 2
    return module.main(argv[1:])  # type: ignore[no-any-return]


def _usage() -> str:
    lines = [f"  {name:8} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: streamer COMMAND ... (each has --help) | --version", *lines])


if __name__ == "__main__":
    sys.exit(main())
