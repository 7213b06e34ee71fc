"""What the command lines share: errors as one line, bars, clean interruption.

Nothing here knows about models.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from .errors import StreamerError, UsageError
from .files import beside, replaced
from .interrupted import EXIT, raise_again
from .needed import told

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk


class Interrupted(Exception):
    """The user asked to end the current generation."""


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see --help)")


def number(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], Any]:
    """An argparse type: a finite number within [low, high]."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not (low <= value <= high and value < math.inf):
            bound = f"from {low}" + (f" to {high}" if math.isfinite(high) else " up")
            raise argparse.ArgumentTypeError(f"{text} is out of range; it goes {bound}")
        return value

    return parse


def filename(text: str) -> Path:
    """An argparse type: the name of a file."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


class Main(Protocol):
    """A command line: `main(argv)`, sys.argv when left out."""

    def __call__(self, argv: list[str] | None = None) -> int: ...


def command(main: Main) -> Main:
    """Decorate a `main(argv)`: a StreamerError becomes one line on stderr and exit code 2."""

    def run(argv: list[str] | None = None) -> int:
        # transformers imports torch when it is there; tokenizers do not need its 200 MB
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        _prepare_streams()
        raise_again()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _say_warning  # type: ignore[assignment]
                code = main(argv)
            sys.stdout.flush()
            return code
        except StreamerError as error:
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            return 2
        except ImportError as error:
            if (line := told(error)) is None:
                raise
            print("error:", line, file=sys.stderr)
            return 2
        except (KeyboardInterrupt, Interrupted):
            return EXIT
        except BrokenPipeError:
            _drop_output()
            return 0
        except OSError as error:
            if error.errno not in FULL:
                raise
            _drop_output()
            print(f"error: cannot write: {error.strerror}", file=sys.stderr)
            return 2

    return run


def _prepare_streams() -> None:
    """Open those that the caller closed: a file of ours would be given their numbers, and written
    to. A terminal that has no sign for a character shows a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """The reader went away, or the disk is full: stdout has to point somewhere harmless."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_warning(message: Warning | str, *_: Any) -> None:
    say(f"warning: {message}")


def say(text: str) -> None:
    """A line for people, apart from the generated text."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal, nothing elsewhere: `update(done, total, unit)`."""
    if not sys.stderr.isatty():
        yield lambda done, total, unit: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, amount="")

        def update(done: int, total: int, unit: str) -> None:
            scale = 1e6 if unit == "MB" else 1
            amount = f"{done / scale:.0f}/{total / scale:.0f} {unit}"
            progress.update(task, completed=done, total=total, amount=amount)

        yield update


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once sets the flag that the yielded function returns; twice ends the program."""
    pressed = 0

    def handler(*_: Any) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread: the caller's signals are not ours
        yield lambda: False
        return
    try:
        yield lambda: pressed > 0
    finally:
        signal.signal(signal.SIGINT, before)


def prompt_of(given: str) -> str:
    """A prompt from the command line, or from stdin where that is "-".

    Raises UsageError where there is none, and for bytes that are not UTF-8.
    """
    try:
        text = sys.stdin.read() if given == "-" else given
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8") from None
    text = as_utf8(text, "the prompt")
    if not text:
        raise UsageError("the prompt is empty")
    return text


def as_utf8(text: str, what: str) -> str:
    """`text`, where bytes that the locale could not decode, surrogates by now, are UTF-8.

    Raises UsageError where they are not.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UsageError(f"{what} is not UTF-8") from None


def check_writable(path: Path | None) -> None:
    """Raises UsageError now, not after the run, where `path` cannot be written then."""
    if path is None:
        return
    try:
        if aside := beside(path):
            aside.open("wb").close()
            aside.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, as `files.replaced`. Raises UsageError."""
    try:
        replaced(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
