"""What a cache weighs at a context, from one that a pass of a few rows went through.

The pass need not be evaluated: shapes are enough. Weights are as they are stored then, so
floating arrays are counted in the type that they will be held in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from cache.sizes import CodedSize

from .kv import FULL

KV_STEP = 256  # mlx-lm's caches grow by this many tokens


class CacheSize(NamedTuple):
    """What a cache weighs: bytes from the start, and of every row until there are `limit`.

    coded: the same of the compressed cache that can take its place.
    """

    fixed: int
    row: int
    limit: int | None = None
    coded: CodedSize | None = None

    def at(self, context: int, bits: float = FULL) -> int:
        if self.coded and bits < FULL:
            return self.coded.at(context, bits)
        rows = -(-max(context, 1) // KV_STEP) * KV_STEP
        return self.fixed + self.row * min(rows, (self.limit or rows) + KV_STEP)

    def growth(self, context: int, bits: float = FULL) -> int:
        """Bytes of what mlx-lm's storage was, keys and values, while it is being copied."""
        return 0 if self.coded and bits < FULL else self.at(context)


def sizes_of(cache: Any, widen: mx.Dtype | None, kind: str | None = None) -> list[CacheSize]:
    """kind: what a compressed cache in its place would be (`cache.make.kinds_of`)."""
    if hasattr(cache, "caches"):
        return [size for c in cache.caches for size in sizes_of(c, widen)]
    arrays = _arrays(cache)
    if not hasattr(cache, "keys"):
        return [CacheSize(sum(_nbytes(a, widen) for a in arrays), 0)]
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    row = sum(_nbytes(a, widen) // a.shape[2] for a in arrays)
    coded = None
    if kind:
        keys, values = arrays
        widths = keys.shape[-1], values.shape[-1]
        coded = CodedSize(keys.shape[1], widths, held(keys, widen), kind == "latent")
    return [CacheSize(0, row, limit, coded)]


def _nbytes(array: mx.array, widen: mx.Dtype | None) -> int:
    """Of an array that comes of weights as they are stored, once they are held in `widen`."""
    return array.size * held(array, widen)


def extrapolated(few: Any, many: Any, widen: mx.Dtype | None) -> CacheSize:
    """Of a model's own kind of cache, from what it holds of 4 and of 8 steps of rows."""
    small, large = (sum(_nbytes(a, widen) for a in _arrays(cache)) for cache in (few, many))
    row = -(-(large - small) // (4 * KV_STEP))
    return CacheSize(max(0, small - row * 4 * KV_STEP), row)


def _arrays(cache: Any) -> list[mx.array]:
    parts = [cache.keys, cache.values] if hasattr(cache, "keys") else cache.state
    return [array for array in dict(tree_flatten(list(parts))).values() if array is not None]


def held(parameter: mx.array, widen: mx.Dtype | None) -> int:
    """Bytes of an element, once weights are held in `widen`."""
    if widen is not None and mx.issubdtype(parameter.dtype, mx.floating):
        return widen.size
    return parameter.dtype.size
