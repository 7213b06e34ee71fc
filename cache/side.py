"""Keys or values of one layer: the first tokens, codes, and the newest tokens.

side = Side(3.5); side.append(keys); side.code(64); side.dense()

`Whole` is what a layer keeps as it came.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from .codec import Codec, Codes

FIRST = 4  # attention sinks: kept as they came
WINDOW = 64  # newest tokens that are never coded
BLOCK = 64  # tokens coded at a time while decoding
STEP = 1024  # tokens that storage grows by, to its multiples
PIECE = 4096  # coded tokens decoded at a time


class Side:
    """bits: per channel, 0 to code nothing.

    first, recent: [B, H, n, D] as they came. words, scales: codes of `coded` tokens, with slack.
    mean: [B, H, 1, D] float32, subtracted before coding.
    """

    def __init__(self, bits: float):
        self.bits = bits
        self.coded = 0
        self.first: mx.array | None = None
        self.recent: mx.array | None = None
        self.words: mx.array | None = None
        self.scales: mx.array | None = None
        self.mean: mx.array | None = None

    @property
    def first_length(self) -> int:
        return 0 if self.first is None else self.first.shape[2]

    @property
    def recent_length(self) -> int:
        return 0 if self.recent is None else self.recent.shape[2]

    @property
    def codec(self) -> Codec:
        assert self.recent is not None
        return Codec.of(self.recent.shape[-1], self.bits)

    def append(self, x: mx.array) -> None:
        """Take x [B, H, T, D] in as the newest tokens."""
        room = FIRST - self.first_length if self.coded == 0 and not self.recent_length else 0
        if room > 0:
            head = mx.contiguous(x[..., :room, :])
            self.first = head if self.first is None else mx.concatenate([self.first, head], 2)
            x = x[..., room:, :]
        if self.recent is not None and self.recent_length:
            x = mx.concatenate([self.recent, x], 2)
        self.recent = x

    def code(self, count: int) -> None:
        """Move the oldest `count` of the newest tokens into codes."""
        if not count or not self.bits:
            return
        assert self.recent is not None
        codes = self.ahead(count)
        if self.mean is None:
            self.mean = self._mean()
        end = self.coded + count
        self._reserve(end, codes)
        assert self.words is not None and self.scales is not None
        self.words[..., self.coded : end, :] = codes.words
        self.scales[..., self.coded : end, :] = codes.scales
        self.coded = end
        self.recent = mx.contiguous(self.recent[..., count:, :])

    def ahead(self, count: int) -> Codes:
        """The codes that `code(count)` would add."""
        assert self.recent is not None
        return self.codec.encode(self.recent[..., :count, :] - self.centre())

    def centre(self) -> mx.array:
        """The mean that is, or would be, frozen: float32 [B, H, 1, D]."""
        return self._mean() if self.mean is None else self.mean

    def _mean(self) -> mx.array:
        assert self.recent is not None
        # a fixed number of tokens: the same codes however the prompt was cut into passes
        return mx.mean(self.recent[..., :BLOCK, :].astype(mx.float32), axis=2, keepdims=True)

    def _reserve(self, end: int, codes: Codes) -> None:
        held = 0 if self.words is None else self.words.shape[2]
        if end <= held:
            return
        grow = -(-end // STEP) * STEP - held
        parts = [
            mx.zeros((*c.shape[:2], grow, c.shape[3]), c.dtype) for c in (codes.words, codes.scales)
        ]
        if self.words is None or self.scales is None:
            self.words, self.scales = parts
        else:
            self.words = mx.concatenate([self.words, parts[0]], 2)
            self.scales = mx.concatenate([self.scales, parts[1]], 2)

    def codes(self, start: int, end: int) -> Codes:
        """Of the coded tokens start to end."""
        assert self.words is not None and self.scales is not None
        return Codes(self.words[..., start:end, :], self.scales[..., start:end, :])

    def dense(self) -> mx.array:
        """All tokens decoded: [B, H, S, D] in the type they came in."""
        assert self.first is not None
        dtype = self.first.dtype
        parts: list[mx.array] = [self.first]
        for start in range(0, self.coded, PIECE):
            x = self.codec.decode(self.codes(start, min(start + PIECE, self.coded)))
            parts.append((x + self.centre()).astype(dtype))
            if self.coded > PIECE:  # what decoding leaves behind is of one piece
                mx.eval(parts[-1])
        if self.recent is not None and self.recent_length:
            parts.append(self.recent)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, 2)

    def trim(self, n: int) -> None:
        """Drop the newest n tokens."""
        cut = min(n, self.recent_length)
        if cut and self.recent is not None:
            self.recent = self.recent[..., : self.recent_length - cut, :]
        n -= cut
        cut = min(n, self.coded)
        self.coded -= cut
        if not self.coded:  # the next ones may be of another text
            self.mean = None
        n -= cut
        if n and self.first is not None:
            self.first = self.first[..., : self.first_length - n, :]

    @property
    def arrays(self) -> list[mx.array]:
        """Those that are there, slack included."""
        arrays = (self.first, self.recent, self.words, self.scales, self.mean)
        return [a for a in arrays if a is not None]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    @property
    def state(self) -> tuple[Any, ...]:
        words, scales = self.words, self.scales
        if words is not None and scales is not None:  # slack is not worth saving
            words, scales = self.codes(0, self.coded)
        return self.bits, self.coded, self.first, self.recent, words, scales, self.mean

    @classmethod
    def from_state(cls, state: Any) -> Side:
        """The inverse of `state`."""
        side = cls(float(state[0]))
        side.coded = int(state[1])
        side.first, side.recent, side.words, side.scales, side.mean = state[2:]
        return side


class Whole:
    """Rows [B, H, T, D] of a layer in the type that they come in, in mlx-lm's own storage."""

    bits = 0.0
    coded = 0

    def __init__(self) -> None:
        self._rows = KVCache()

    def append(self, x: mx.array) -> None:
        """Take x [B, H, T, D] in as the newest tokens."""
        self._rows.update_and_fetch(x, x[..., :0])

    def code(self, count: int) -> None:
        """Nothing is coded here."""

    def dense(self) -> mx.array:
        """All rows: a view."""
        return self._rows.keys_and_values()[0]

    def trim(self, n: int) -> None:
        """Drop the newest n tokens."""
        self._rows.trim(n)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    @property
    def state(self) -> tuple[Any, ...]:
        return self.bits, self._rows.offset, self._rows.keys

    @classmethod
    def from_state(cls, state: Any) -> Whole:
        """The inverse of `state`."""
        side = cls()
        rows = state[2]
        side._rows.state = rows, None if rows is None else rows[..., :0], int(state[1])
        return side
