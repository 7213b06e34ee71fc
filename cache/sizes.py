"""What a compressed cache weighs, told from its shape before there is one.

Counted as it is allocated: codes and scales in steps of STEP tokens, the first tokens and the
window as they came, means. `CompressedKVCache.nbytes` of one that is there is never more.

    CodedSize(2, (256, 256), 4).at(32768, 3.5)    # bytes of a layer: 2 key heads of 256, float32
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from kernels import codes

from .attention import ROWS
from .codec import row_bytes
from .side import BLOCK, FIRST, PIECE, STEP, WINDOW

RAW = FIRST + WINDOW + BLOCK - 1 + ROWS  # most tokens held as they came between two passes
WHOLE_STEP = 256  # rows that mlx-lm's own storage grows by


@dataclass(frozen=True)
class CodedSize:
    """A layer's key heads, channels of its keys and of its values, and bytes of one of them.

    latent: the values are kept as they come (see compressed.py).
    """

    heads: int
    widths: tuple[int, int]
    itemsize: int
    latent: bool = False

    def at(self, tokens: int, bits: float) -> int:
        """Bytes held at `tokens` tokens."""
        coded = max(0, tokens - FIRST - WINDOW) // BLOCK * BLOCK
        room = -(-coded // STEP) * STEP
        raw = min(tokens, RAW)
        total = 0
        for width in self._coded_widths:
            total += room * row_bytes(width, bits) + raw * width * self.itemsize
            total += 4 * width if coded else 0
        if self.latent:
            total += -(-tokens // WHOLE_STEP) * WHOLE_STEP * self.widths[1] * self.itemsize
        return self.heads * total

    def transient(self, rows: int, tokens: int, bits: float) -> int:
        """Bytes that a pass of `rows` rows at the end of `tokens` tokens takes besides.

        A prompt's pass has the history of one layer decoded, a piece at a time (without a
        kernel shorter passes decode pieces, too), or storage grows while the old one is
        still there; the pass's own rows are there twice.
        """
        widths, channels = self._coded_widths, sum(self._coded_widths)
        several = rows > (1 if self.latent else ROWS)
        dense = tokens * channels * self.itemsize if several else 0
        kernel = self.itemsize == 4 and codes.available(mx.float32)
        piece = 0 if kernel and not several else 6 * 4 * min(tokens, PIECE) * max(widths)
        grown = -(-tokens // STEP) * STEP * sum(row_bytes(width, bits) for width in widths)
        own = 2 * (rows + BLOCK + WINDOW) * channels * self.itemsize
        return self.heads * (dense + max(piece, grown) + own)

    @property
    def _coded_widths(self) -> tuple[int, ...]:
        return self.widths[:1] if self.latent else self.widths
