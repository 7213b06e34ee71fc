"""What a running model tells whoever watches it: passes and choices; reads are logged.

    model.streamer.watch = profiler
    ...generate...
    model.streamer.store.take_log()        # of all reads that ended since it was asked last

Nothing watches by default, and then every place that could tell something costs one
`if`. Calls come from the thread that generates. Reads are many and short: whoever watches
takes them from the store now and then, from any thread. Passes of a model whose experts are
all resident choose inside mlx-lm's own switches, so that `chose` is never called.
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

    def chose(self, layer: int, ids: np.ndarray, missed: Sequence[int]) -> None:
        """A router chose ids [..., k], of 32 bits, in `layer` (index in `Opened.layers`); those
        of `missed`, distinct, had to be read. Told before the pass's own `step`; late where
        all of the layer is resident."""
