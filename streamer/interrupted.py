"""Ctrl-C while modules are imported: exit code 130 at once, and no traceback.

    with importing():
        from .session import open_session

Raised in the middle of an extension's import, KeyboardInterrupt may abort the interpreter or
be lost; and what `python -m streamer.COMMAND` imports before its `main` nobody catches.
Nothing was begun by then, so that there is nothing to put back.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

EXIT = 130


def is_command(argv: Sequence[str]) -> bool:
    """Whether the interpreter was started, by these arguments, to run a module of this package."""
    name = next((b for a, b in pairwise(argv) if a == "-m"), "")
    return name.split(".")[0] == __package__


def _end(*_: Any) -> None:
    os._exit(EXIT)


def end_at_once() -> bool:
    """Ctrl-C ends the program from now on, where it would raise KeyboardInterrupt otherwise."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:  # not the main thread: the caller's signals are not ours
        return False
    return True


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt again, where `end_at_once` changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C ends the program within the block."""
    changed = end_at_once()
    try:
        yield
    finally:
        if changed:
            raise_again()


if is_command(sys.orig_argv):
    end_at_once()
