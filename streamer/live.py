"""What a generation is doing, in the terminal while its text is made: `streamer.run --live`.

    with live_view(session) as view:
        for piece in session.reply(tokens, view.prompt):
            view.write(piece)

On a terminal the text scrolls as it would without, and a few lines beneath it say how fast
it comes, how many experts were found in memory and how full each layer's are, how deep the
queue of reads is and how many drafts are accepted. They are gone when the text is done. The
cursor stays visible and no mode of the terminal is changed, so that nothing has to be put
back, whatever ends the program. Text that goes elsewhere (a file, a pipe) goes there as it
is, with the lines on standard error where that is a terminal, and without them where not.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from .footprint import footprint, format_size
from .session import Session

PERIOD = 0.125  # seconds between drawings
SHARE = 0.005  # of the time may go into drawing: it is done less often where it takes long
WINDOW = 3.0  # seconds that rates are taken over
BETWEEN = "   "
ECHO = 2  # columns left free: what a terminal shows of Ctrl-C must not begin another line
BARS = "▁▂▃▄▅▆▇█"


class Moment(NamedTuple):
    """Counts so far. queued, in_flight: seconds that reads waited and then were under way."""

    seconds: float
    tokens: int
    hits: int
    misses: int
    drafted: int
    accepted: int
    nbytes: float
    queued: float
    in_flight: float


class Meter:
    """Adds up reads, and what a session has counted otherwise."""

    def __init__(self, session: Session):
        self._session = session
        self._read = np.zeros(3)  # bytes, seconds queued, seconds under way
        self._moments: deque[Moment] = deque()

    def span(self) -> tuple[Moment, Moment]:
        """Counts some seconds ago, and now."""
        session = self._session
        counters, drafts = session.streamer.counters, session.drafts
        if session.streamer.store is not None:
            self._read += session.streamer.store.take_log().sum(axis=0)
        now = Moment(
            time.perf_counter(),
            session.timing.generated_tokens,
            counters.hits,
            counters.misses,
            drafts.drafted,
            drafts.accepted,
            *self._read.tolist(),
        )
        self._moments.append(now)
        while len(self._moments) > 2 and self._moments[1].seconds < now.seconds - WINDOW:
            self._moments.popleft()
        return self._moments[0], now


class View:
    """Text and what is beneath it. Without a console the text is printed and that is all."""

    def __init__(self, session: Session, console: Console | None, *, own_text: bool):
        """own_text: the text goes to the console too, above the lines."""
        self._session, self._console, self._own_text = session, console, own_text
        self._meter = Meter(session)
        self._come: list[str] = []  # text since the last drawing
        self._line = ""  # the text's last, unfinished line
        self._done = self._total = 0
        self._cost = 0.0  # processor seconds of a drawing

    def prompt(self, done: int, total: int) -> None:
        """Tokens of the prompt that were read."""
        self._done, self._total = done, total

    def write(self, piece: str) -> None:
        """More text. Whole lines scroll away, the last one is drawn with the lines beneath."""
        if not self._own_text or self._console is None:
            print(piece, end="", flush=True)
            return
        self._come.append(piece)

    @contextlib.contextmanager
    def shown(self) -> Iterator[View]:
        if self._console is None:
            yield self
            return
        store, over = self._session.streamer.store, threading.Event()
        if store is not None:
            store.logging = True
        live = Live(
            _Beneath(self._drawn),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

        def work() -> None:
            while not over.wait(max(PERIOD, self._cost / SHARE)):
                self._draw(live)

        artist = threading.Thread(target=work, name="live-view", daemon=True)
        try:
            with _ends_on_sigterm(), live:
                artist.start()
                try:
                    yield self
                finally:
                    over.set()
                    artist.join()
                    self._draw(live)
        finally:
            if store is not None:
                store.logging = False
            if self._own_text and self._line:
                print(self._line, end="", flush=True, file=self._console.file)
            self._line = ""

    def _draw(self, live: Live) -> None:
        """Whole lines go above, the rest is drawn anew: once, since it costs a millisecond."""
        assert self._console is not None
        began = time.thread_time()
        come = self._come[:]
        del self._come[: len(come)]  # more may come meanwhile
        whole, newline, self._line = (self._line + "".join(come)).rpartition("\n")
        if newline:
            self._console.print(Text(whole), soft_wrap=True)
        else:
            live.refresh()
        spent = time.thread_time() - began
        self._cost = self._cost + (spent - self._cost) / 4 if self._cost else spent

    def _drawn(self) -> RenderableType:
        status = self._status()
        if not self._line or self._console is None:
            return Group(*status)
        size = self._console.size
        # of a line longer than the screen its end
        room = max(1, size.height - len(status) - 2) * size.width
        return Group(Text(self._line[-room:], overflow="fold"), *status)

    def _status(self) -> list[Text]:
        """The lines beneath the text: as many as the terminal's width asks for."""
        old, now = self._meter.span()
        streamer = self._session.streamer
        seconds = max(1e-3, now.seconds - old.seconds)
        cells: list[tuple[str, str]] = []
        if now.tokens:
            cells.append(("speed", f"{(now.tokens - old.tokens) / seconds:.1f} tok/s"))
        else:
            cells.append(("prompt", f"{self._done} of {self._total} tokens"))
        asked = now.hits + now.misses - old.hits - old.misses
        if asked:
            cells.append(("hits", f"{(now.hits - old.hits) / asked:.0%}"))
        if not streamer.resident:
            in_flight = (now.in_flight - old.in_flight) / seconds
            queued = (now.queued - old.queued) / seconds
            rate = (now.nbytes - old.nbytes) / seconds / 1e9
            cells.append(("reads", f"{in_flight:.1f} under way, {queued:.1f} queued"))
            cells.append(("disk", f"{rate:.2f} GB/s"))
        if drafted := now.drafted - old.drafted:
            cells.append(("drafts", f"{(now.accepted - old.accepted) / drafted:.0%} accepted"))
        limit = format_size(streamer.budget.limit)
        cells.append(("memory", f"{format_size(footprint())} of {limit}"))
        width, height = self._console.size if self._console else (80, 25)
        rule = Text("─" * width, "dim", no_wrap=True)
        room = max(1, width - ECHO)
        lines = _packed(cells, room)[: max(1, height - 4)]
        if streamer.executors:
            lines.append(self._residency())
        for line in lines:
            line.truncate(room, overflow="ellipsis")
        return [rule, *lines]

    def _residency(self) -> Text:
        """Of each layer, how many of its experts are in memory."""
        shares: dict[int, float] = {}
        for run in self._session.streamer.executors:
            for i, number in enumerate(run.numbers):
                shares[number] = run.pool.resident[i] / len(run.pool.slot_of[i])
        held = sum(sum(run.pool.resident) for run in self._session.streamer.executors)
        bars = "".join(BARS[round(shares[i] * (len(BARS) - 1))] for i in sorted(shares))
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append("in memory ", "dim")
        text.append(f"{held} of {self._session.streamer.total} experts ", "bold")
        return text.append(bars).append(" by layer", "dim")


def _packed(cells: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """Names and values side by side, in lines of up to `width`."""
    lines: list[Text] = []
    for name, value in cells:
        cell = Text(no_wrap=True, overflow="ellipsis").append(f"{name} ", "dim")
        cell.append(value, "bold")
        if lines and len(lines[-1]) + len(BETWEEN) + len(cell) <= width:
            lines[-1].append(BETWEEN).append_text(cell)
        else:
            lines.append(cell)
    return lines


class _Beneath:
    """Made anew whenever it is drawn, when lines are printed above it too."""

    def __init__(self, made: Callable[[], RenderableType]):
        self._made = made

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._made()


@contextlib.contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as `exit` does, so that the lines are taken away first."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: the caller's signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class SteadyConsole(Console):
    """Leaves the cursor as it is: one that was hidden would stay so if the program is killed."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def show_cursor(self, show: bool = True) -> bool:
        return False


@contextlib.contextmanager
def live_view(session: Session) -> Iterator[View]:
    """The view of a session's next reply, on whichever of the outputs is a terminal."""
    console, own_text = None, False
    if sys.stdout.isatty():
        console, own_text = SteadyConsole(), True
    elif sys.stderr.isatty():
        console = SteadyConsole(stderr=True)
    if console is not None and (console.is_dumb_terminal or not console.is_terminal):
        console, own_text = None, False
    with View(session, console, own_text=own_text).shown() as view:
        yield view
