"""Warm start: which experts a model used before, kept in a small file and read at start.

    streamer run --heat auto|off|FILE        # auto: a file per model in the user's cache folder

The file is JSON: for each MoE layer how often every expert was chosen, by checkpoint. A
session that closes adds its own counts to what the file holds by then and renames it into
place; older uses fade once there are `MEMORY` of them. It says what to read first and
nothing else, so it may be deleted at any time, and one that is damaged or of another
checkpoint is as good as none. What is no such file is not written over.

Limits: of two sessions that close in the same instant one may be forgotten. Where all
experts are resident nothing is counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .console import check_writable
from .errors import UsageError
from .experts import stored_bytes
from .files import replaced
from .filling import warm

if TYPE_CHECKING:
    from .executor import Executor
    from .opened import Opened

FORMAT, VERSION = "moe-heat", 1
MAX_BYTES = 1 << 20  # of a file
MEMORY = 1 << 22  # uses that a file remembers
WAVE_BYTES = 16 << 20  # read at once when a pool is filled
Uses = dict[str, np.ndarray]  # module path of a layer -> uses of its experts, int64


def cache_folder() -> Path:
    """Ours in the user's cache. Raises RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "streamer"


class Heat:
    """The heat of one checkpoint, in one file.

    filled, seconds: experts that `fill` read, and how long it took.
    """

    def __init__(self, opened: Opened, path: Path | None = None):
        """path: of the file; None for one in the user's cache folder."""
        self._fingerprint = opened.checkpoint.fingerprint
        self._asked = path is not None  # then the user is told when it cannot be written
        self.path = path or cache_folder() / "heat" / f"{self._fingerprint}.json"
        self._counts = {layer.path: layer.count for layer in opened.layers}
        self._top_k = opened.top_k
        self.filled, self.seconds = 0, 0.0

    @classmethod
    def of(cls, choice: str, opened: Opened) -> Heat | None:
        """choice: auto, off or a file.

        Raises UsageError for one that cannot be written, or that holds something else.
        """
        if choice == "off" or not opened.layers:
            return None
        if choice != "auto":
            check_writable(Path(choice))
            if not _replaceable(Path(choice)):
                raise UsageError(f"--heat {choice} is no heat file, and would be replaced by one")
            return cls(opened, Path(choice))
        try:
            return cls(opened)
        except RuntimeError:  # a user without a home
            return None

    def load(self) -> Uses:
        """What the file says of this checkpoint's layers; nothing if it is of no use."""
        return {p: u for p, u in self._read().items() if self._counts.get(p) == len(u)}

    def _read(self) -> Uses:
        try:
            if not self.path.is_file():  # a pipe would be waited for
                return {}
            with open(self.path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                return {}
            document = json.loads(data)
            same = document["fingerprint"] == self._fingerprint
            if document["format"] != FORMAT or document["version"] != VERSION or not same:
                return {}
            uses = {str(p): np.array(u, dtype=np.int64) for p, u in document["uses"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return {}
        except RecursionError:  # brackets without end
            return {}
        sane = all(u.ndim == 1 and (u >= 0).all() and (u <= MEMORY).all() for u in uses.values())
        return uses if sane else {}

    def fill(self, runs: Sequence[Executor], progress: Callable[[int, int], None]) -> None:
        """Read the experts used most into empty pools; progress(bytes done, in all).

        Raises StreamerError when a read fails; the pools are then empty and usable.
        """
        uses, began = self.load(), time.perf_counter()
        plans = [(r, hottest(r, uses)) for r in runs if r.pool.slots < r.pool.total]
        total = sum(len(keys) * stored_bytes(run.arrays.format) for run, keys in plans)
        done = 0
        for run, keys in plans:
            size = stored_bytes(run.arrays.format)
            for wave in warm(run, keys, max(1, WAVE_BYTES // size)):
                done += wave * size
                self.filled += wave
                progress(done, total)
            for layer, experts in enumerate(run.layers):
                seen = uses.get(experts.path)
                if seen is not None and seen.any():
                    run.pool.seed(layer, seen * self._top_k / seen.sum())
        self.seconds = time.perf_counter() - began

    def save(self, runs: Sequence[Executor]) -> None:
        """Add what `runs` counted to the file. Raises UsageError where the user named it."""
        new: Uses = {
            layer.path: uses
            for run in runs
            for layer, uses in zip(run.layers, run.uses, strict=True)
            if uses.any()
        }
        if not new:
            return
        old = self._read()  # of other layers too: a head that did not run this time
        for path, uses in new.items():
            before = old.get(path)
            old[path] = uses if before is None or len(before) != len(uses) else before + uses
        data = self._encode(old)
        if data is None:
            return
        try:
            if not self._asked:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            replaced(self.path, data)
        except OSError as error:
            if self._asked:
                raise UsageError(f"cannot write {self.path}: {error.strerror}") from error

    def _encode(self, uses: Uses) -> bytes | None:
        scale = min(1.0, MEMORY / max(1, sum(int(u.sum()) for u in uses.values())))
        while scale > 1 / MEMORY:
            document: dict[str, Any] = {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": self._fingerprint,
                "uses": {p: np.rint(u * scale).astype(int).tolist() for p, u in uses.items()},
            }
            data = json.dumps(document, separators=(",", ":")).encode()
            if len(data) <= MAX_BYTES:
                return data
            scale /= 10
        return None


def _replaceable(path: Path) -> bool:
    """Whether nothing but heat, of whatever version or checkpoint, is lost with the file."""
    if not path.is_file():
        return True
    try:
        with open(path, "rb") as file:
            start = b"".join(file.read(64).split())
    except OSError:
        return False
    return not start or start.startswith(b'{"format":"%s"' % FORMAT.encode())


def hottest(run: Executor, uses: Uses) -> list[tuple[int, int]]:
    """(layer, expert) to fill the pool of `run` with, those used least first; none unused."""
    found = [
        (int(n), layer, expert)
        for layer, experts in enumerate(run.layers)
        for expert, n in enumerate(uses.get(experts.path, ()))
        if n
    ]
    found.sort(key=lambda key: key[0])
    return [(layer, expert) for _, layer, expert in found[-run.pool.slots :]]
