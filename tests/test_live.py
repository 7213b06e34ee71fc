"""`--live` in a terminal: the text, what is shown beneath it, and what is left when it ends."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest

from streamer import live

pytestmark = pytest.mark.timed

ROWS, COLUMNS = 30, 160
COMMAND = [sys.executable, "-m", "streamer.run", "--memory", "50%", "--prompt", "def main("]


class Terminal:
    """A pseudo-terminal with a command in it, and a screen that shows what it drew."""

    def __init__(self, command: list[str], size: tuple[int, int] = (COLUMNS, ROWS), **more: str):
        columns, rows = self.size = size
        self.screen = pyte.HistoryScreen(columns, rows, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self._fds = ours, theirs
        # a size given there, as pytest-xdist does, would stand for the terminal's own
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command,
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={**environment, "TERM": "xterm-256color", **more},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fds[0], 65536)
            except OSError:
                return
            if not data:
                return
            self.raw += data
            self._stream.feed(data)
            self._seen.append("\n".join(self.screen.display))

    def until(self, there: Callable[[str], bool], seconds: float = 90) -> str:
        """What the screen showed when it first was as asked."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for shown in list(self._seen):
                if there(shown):
                    return shown
            time.sleep(0.02)
        raise AssertionError("never shown; the screen now:\n" + "\n".join(self.screen.display))

    def type(self, text: bytes) -> None:
        os.write(self._fds[0], text)

    def end(self) -> tuple[int, str]:
        """Exit code, and all lines that were shown, scrolled away ones first."""
        code = self.process.wait(timeout=90)
        assert termios.tcgetattr(self._fds[1]) == self.before, "no mode of the terminal changed"
        os.close(self._fds[1])
        self._reader.join(timeout=10)
        os.close(self._fds[0])
        columns = range(self.size[0])
        above = ["".join(row[x].data for x in columns) for row in self.screen.history.top]
        lines = [line.rstrip() for line in (*above, *self.screen.display)]
        # as it was found: a visible cursor, the main screen, no colour left on
        assert not self.screen.cursor.hidden
        assert b"\x1b[?1049h" not in self.raw
        assert self.screen.cursor.attrs == self.screen.default_char
        return code, "\n".join(lines).rstrip()


def status(shown: str) -> bool:
    return "tok/s" in shown and "in memory" in shown and "by layer" in shown


def test_the_text_is_whole_and_the_lines_beneath_it_go() -> None:
    plain = subprocess.run(
        [*COMMAND, "--max-tokens", "300"], capture_output=True, text=True, check=True
    )
    terminal = Terminal([*COMMAND, "--max-tokens", "300", "--live", "--mtp", "2"])
    shown = terminal.until(status)
    for word in ("speed", "hits", "reads", "queued", "disk", "memory", "experts"):
        assert word in shown, shown
    terminal.until(lambda s: "accepted" in s)
    code, lines = terminal.end()
    assert code == 0
    text = plain.stdout.rstrip("\n").expandtabs()
    assert "\n".join(line.rstrip() for line in text.split("\n")) in lines
    assert not status(lines) and "by layer" not in lines and "─" * 20 not in lines
    assert "300 tokens at" in lines.splitlines()[-1]


@pytest.mark.parametrize("size", [(100, 24), (40, 16)])
def test_a_narrow_terminal_shows_all_of_it(size: tuple[int, int]) -> None:
    more = ["--max-tokens", "60000", "--context", "4000", "--live", "--mtp", "2"]
    terminal = Terminal([*COMMAND, *more], size)
    words = ("speed", "hits", "queued", "disk", "accepted", "memory", "in memory")
    shown = terminal.until(lambda s: all(word in s for word in words))
    assert f"{'─' * size[0]}" in shown
    beneath = shown.partition("─" * size[0])[2].split("\n")[1:]
    assert all(len(line.rstrip()) <= size[0] - live.ECHO for line in beneath), shown
    terminal.type(b"\x03")
    code, lines = terminal.end()
    assert code == 130 and "─" * 20 not in lines and "queued" not in lines


@pytest.mark.parametrize("how", ["ctrl-c", "terminate"])
def test_an_end_that_comes_early_leaves_the_terminal_as_it_was(how: str) -> None:
    terminal = Terminal([*COMMAND, "--max-tokens", "100000", "--context", "4000", "--live"])
    terminal.until(status)
    if how == "ctrl-c":
        terminal.type(b"\x03")
    else:
        terminal.process.send_signal(signal.SIGTERM)
    code, lines = terminal.end()
    assert "Traceback" not in lines and "by layer" not in lines and "─" * 20 not in lines
    assert code == (130 if how == "ctrl-c" else 143)
    assert ("interrupted" in lines) == (how == "ctrl-c")


def test_an_error_meanwhile_is_one_line_on_a_clean_screen(tmp_path: Path) -> None:
    script = """
import sys
from streamer import run, session
from streamer.errors import StreamerError
whole = session.Session.reply
def reply(self, tokens, on_prompt):
    for i, piece in enumerate(whole(self, tokens, on_prompt)):
        if i == 60:
            raise StreamerError("the disk is gone")
        yield piece
session.Session.reply = reply
sys.exit(run.main(sys.argv[1:]))
"""
    terminal = Terminal([sys.executable, "-c", script, *COMMAND[3:], "--live"])
    code, lines = terminal.end()
    assert code == 2 and "by layer" not in lines
    assert lines.splitlines()[-1].endswith("error: the disk is gone")


def test_elsewhere_than_in_a_terminal_it_changes_nothing() -> None:
    def output(*more: str) -> tuple[str, bool]:
        command = [*COMMAND, "--max-tokens", "24", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout, "\x1b" in done.stdout + done.stderr

    assert output("--live") == output() and not output("--live")[1]


def test_text_in_a_file_is_text_alone_while_the_lines_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "out"
    command = " ".join(f"'{part}'" for part in COMMAND) + f" --max-tokens 200 --live > {file}"
    terminal = Terminal(["sh", "-c", command])
    terminal.until(status)
    code, lines = terminal.end()
    plain = subprocess.run(
        [*COMMAND, "--max-tokens", "200"], capture_output=True, text=True, check=True
    )
    assert code == 0 and file.read_text() == plain.stdout
    assert "by layer" not in lines


def test_drawing_takes_its_share_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a drawing takes, of the time it takes no more than was said."""
    session: Any = SimpleNamespace(streamer=SimpleNamespace(store=None))
    console = live.SteadyConsole(file=io.StringIO(), force_terminal=True, width=80, height=24)
    view = live.View(session, console, own_text=True)
    drawn = []

    def slow() -> str:
        end = time.thread_time() + 0.004
        while time.thread_time() < end:
            pass
        drawn.append(time.perf_counter())
        return ""

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "PERIOD", 0.001)
    monkeypatch.setattr(view, "_drawn", slow)
    began = time.perf_counter()
    with view.shown():
        time.sleep(1.2)
    lasted = time.perf_counter() - began
    # the first of the thread and those of the beginning and the end come anyway
    assert 2 <= len(drawn) <= 6 + lasted * live.SHARE / 0.004
