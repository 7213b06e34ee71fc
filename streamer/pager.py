"""A layer's paged experts, for who computes them in one operation with what is around them.

What `kernels.segments` asks of a switch: it reads a router's choice back, and gets the slots of
the experts and the reads that some of them wait for. The executor keeps the pool, as in its own
calls, which remain for prefill, rehearsals and families without such an operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .executor import Executor


class Pager:
    """switch: mlx-lm's, over the slots of the pool."""

    def __init__(self, run: Executor, layer: int, switch: nn.Module):
        self._run, self.layer, self.switch = run, layer, switch
        self._calls = run.fetching
        self.serving = run.serving

    def slots(self) -> np.ndarray | None:
        """Of the layer's experts, int32 [n], -1 where one is absent: the pool's own table.

        None where every choice is to be fetched, as reads ahead of need depend on it.
        """
        return self._calls.slots(self.layer)

    def found(self, pagers: Sequence[Pager], ids: np.ndarray) -> None:
        """These, in turn, had slots for all that was chosen, [n, rows, k], and used."""
        at = 0
        while at < len(pagers):
            first, end = pagers[at], at + 1
            while end < len(pagers) and pagers[end]._follows(first, end - at):
                end += 1
            first._calls.found(first.layer, ids[at:end])
            at = end

    def _follows(self, first: Pager, count: int) -> bool:
        """Whether it is so many layers behind another of its pool."""
        return self._run is first._run and self.layer == first.layer + count

    def fetch(
        self, ids: mx.array, x: mx.array | None = None
    ) -> tuple[mx.array, list[tuple[list[int], Any]]]:
        """Slots, int32, of experts [..., k], and (pairs, ticket) of those being read.

        x [..., D]: what the router took, from which others may be guessed.

        Raises StreamerError when a read fails.
        """
        slots, waiting = self._calls.fetch(self.layer, np.array(ids), x)
        return mx.array(slots), [(pairs, reading.native) for pairs, reading in waiting]

    def takes(self, pairs: int) -> bool:
        """Whether so many experts at most can be fetched at once."""
        return self._run.takes(pairs)

    def idle(self) -> bool:
        """Whether to rehearse what follows while that which was fetched is still being read."""
        return self._calls.idle()

    def guess(self, ids: mx.array) -> mx.array:
        """Slots, int32, of rehearsed experts [..., k], -1 where one is absent, which is read."""
        return mx.array(self._calls.guess(self.layer, np.array(ids)))

    def goes_on(self) -> bool:
        """Whether to rehearse one more."""
        return self._calls.goes_on()

    def arrived(self, waited: float) -> None:
        """What was fetched has been used, after `waited` seconds of reads. Raises StreamerError."""
        self._calls.landed(waited)
