"""What a running model tells whoever watches it: passes, choices, waits and reads.

    model.streamer.watch = Watchers([profiler, recorder])

Nothing watches by default, and then every place that could tell something costs one
`if`. Calls come from the thread that generates, but `reads`, which may come from the I/O
workers. Passes of a model whose experts are all resident choose inside mlx-lm's own
switches, so that `chose` is never called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Watch(Protocol):
    """Whoever watches; a method that does nothing is a fine one."""

    def step(self, kind: str, rows: int, seconds: float) -> None:
        """A pass over `rows` rows ended, after `seconds` of wall time.

        kind: prefill, decode, verify, draft (the MTP head's, which give up to `rows` tokens)
        or rehearse, which lies inside a decode or verify and is told before it.
        """

    def chose(self, layer: int, ids: np.ndarray, misses: int) -> None:
        """A router chose ids [..., k] in `layer` (index in `Opened.layers`); of the distinct
        ones `misses` had to be read. Told before the pass's own `step`, and before the pool
        changes for them; late where all of the layer is resident."""

    def waited(self, seconds: float) -> None:
        """The generation stood still for reads."""

    def reads(self, ended: np.ndarray) -> None:
        """Reads that have ended, [n, 3] float64, n >= 0: bytes; seconds after it was asked for
        that each began; seconds later that it was done. From any thread: must be safe between
        them. Several at once, since a call for each costs more than keeping it."""


class Watchers:
    """Several as one."""

    def __init__(self, watchers: Sequence[Watch]):
        self._watchers = tuple(watchers)

    def step(self, kind: str, rows: int, seconds: float) -> None:
        for watcher in self._watchers:
            watcher.step(kind, rows, seconds)

    def chose(self, layer: int, ids: np.ndarray, misses: int) -> None:
        for watcher in self._watchers:
            watcher.chose(layer, ids, misses)

    def waited(self, seconds: float) -> None:
        for watcher in self._watchers:
            watcher.waited(seconds)

    def reads(self, ended: np.ndarray) -> None:
        for watcher in self._watchers:
            watcher.reads(ended)
