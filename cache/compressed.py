"""A KV cache whose history is codes, in the place of mlx-lm's KVCache.

Columns in order of position: the first few tokens as they came, then codes, then a window of the
newest 64 to 127 tokens as they came. A block of 64 is coded when a pass begins with 64 more behind
it, and all at once after a prompt's pass. What a token sees is therefore the same whether it was
decoded alone or in a verify pass, and drafts are never in a code: trimming them drops rows of
the window. Every token has its own code, so a trim may also end anywhere in the codes.
Means of keys and of values are frozen at the first block.

With `latent` (DeepSeek's MLA) keys are the latent, which also serves as the values, and values the
position part, kept as it is. Where mlx-lm's own attention multiplies the latent out, which it does
where `kernels.latent` does not run it, a pass of several rows reads it decoded; all of them read
the same, so a verify pass must not be longer than `rows_alike`.

A prompt's pass is evaluated layer by layer: what one layer reads decoded is gone before the next
one's history is, and its own rows are codes by then.

    from cache.make import make_cache; cache = make_cache(model, key_bits=3.5, value_bits=3.5)
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import _BaseCache

from kernels import latent

from .attention import ROWS, View
from .side import BLOCK, WINDOW, Side, Whole


class CompressedKVCache(_BaseCache):
    """mlx-lm's cache interface over two `Side`s; keys and values [B, H, T, D] come in."""

    def __init__(self, key_bits: float = 4, value_bits: float = 4, latent: bool = False):
        self.keys = Side(key_bits)
        self.values: Any = Whole() if latent else Side(value_bits)
        self.latent = latent
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take rows in; what attention may read: views, see attention.py."""
        prompt = keys.shape[2] > ROWS
        if prompt:
            mx.eval(keys, values)
        self.commit()
        before = self.keys.recent_length
        self.keys.append(keys)
        self.values.append(values)
        self.offset += keys.shape[2]
        crossing = WINDOW + BLOCK - before
        if not 0 < crossing < keys.shape[2] <= ROWS:
            crossing = 0
        views = self._views(keys.shape[2], crossing)
        if self.latent and prompt:  # else attention does so when it has read
            self.commit()
        return views

    @property
    def rows_alike(self) -> int:
        """The longest pass of which every row reads what it would in a pass of its own."""
        if not self.latent:
            return ROWS
        recent = self.keys.recent_length
        return WINDOW + BLOCK - (recent if recent < WINDOW + BLOCK else WINDOW + recent % BLOCK)

    def keys_and_values(self) -> tuple[Any, Any]:
        """What is held, for layers that read another layer's cache."""
        return self._views(1, 0)

    def _views(self, rows: int, crossing: int) -> tuple[Any, Any]:
        if not self.latent:
            view = View(self, rows, crossing)
            return view, view
        whole = self.values.dense()
        if rows == 1 or (rows <= ROWS and latent.inside()):
            return View(self, rows, crossing), whole
        return self.keys.dense(), whole

    def commit(self) -> None:
        """Code the blocks that have left the window."""
        blocks = max(0, (self.keys.recent_length - WINDOW) // BLOCK)
        self.keys.code(blocks * BLOCK)
        self.values.code(blocks * BLOCK)
        if blocks > 1:  # of a prompt: its rows go as soon as they are coded
            mx.eval(self.keys.arrays, [] if self.latent else self.values.arrays)

    def trim(self, n: int) -> int:
        """Drop the newest n tokens; how many were dropped."""
        n = min(self.offset, n)
        self.offset -= n
        self.keys.trim(n)
        self.values.trim(n)
        return n

    def is_trimmable(self) -> bool:
        return True

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: codes with their slack, scales, means, and the raw tokens."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def state(self) -> tuple[Any, ...]:
        return self.offset, self.latent, self.keys.state, self.values.state

    @state.setter
    def state(self, v: tuple[Any, ...]) -> None:
        self.offset, self.latent = int(v[0]), bool(v[1])
        self.keys = Side.from_state(v[2])
        self.values = (Whole if self.latent else Side).from_state(v[3])

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """As mlx-lm's KVCache: columns are absolute positions."""
        if window_size is not None or (N > 1 and return_array):
            return create_causal_mask(N, self.offset, window_size=window_size)
        return None if N == 1 else "causal"
