"""Where the bytes of a loaded parameter lie, found by watching mlx-lm load it.

mlx-lm's `load_model` renames, slices and stacks a checkpoint's tensors in ways
that differ by family (`sanitize`). Instead of repeating those rules, a tensor
loaded here is a `TracedArray`: a lazy `mx.array` that also carries a `Source`,
the grid of contiguous byte blocks in the files that it stands for. Slicing,
stacking, splitting and concatenating keep the source; arithmetic loses it, so
a parameter without a source was computed and cannot be paged in place.

Nothing is read: the arrays stay lazy.

    with tracing(checkpoint):
        model, config = mlx_lm.utils.load_model(path, lazy=True)
    source_of(model.layers[0].mlp.switch_mlp.up_proj.weight)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .checkpoint import Checkpoint

FILE_SHIFT = 44  # a block's address is file index << 44 | byte offset: 16 TB a file


@dataclass(frozen=True)
class Source:
    """`outer` indexes contiguous blocks of `inner` elements.

    starts: int64, shape `outer`, each block's address (`FILE_SHIFT`).
    inner: the trailing axes that lie contiguously within a block.
    itemsize: bytes per element, as stored.
    """

    starts: np.ndarray
    inner: tuple[int, ...]
    itemsize: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.starts.shape + self.inner

    @property
    def block_bytes(self) -> int:
        return math.prod(self.inner) * self.itemsize

    def expand(self, axes: int) -> Source:
        """The same bytes with at least `axes` leading axes in the grid."""
        source = self
        while source.starts.ndim < axes and source.inner:
            n, *rest = source.inner
            step = math.prod(rest) * source.itemsize
            starts = source.starts[..., None] + np.arange(n, dtype=np.int64) * step
            source = Source(starts, tuple(rest), source.itemsize)
        return source

    def slice(self, axis: int, part: slice | int) -> Source:
        """`x[:, ..., part]` with `part` on `axis`; steps of any size."""
        contiguous = isinstance(part, slice) and part.step in (None, 1)
        if axis >= self.starts.ndim and contiguous and isinstance(part, slice):
            source = self.expand(axis)
            n, *rest = source.inner
            first, last, _ = part.indices(n)
            skip = first * math.prod(rest) * source.itemsize
            return Source(source.starts + skip, (max(last - first, 0), *rest), source.itemsize)
        source = self.expand(axis + 1)
        return Source(source.starts[(slice(None),) * axis + (part,)], source.inner, self.itemsize)

    def reshape(self, shape: tuple[int, ...]) -> Source | None:
        """Reshaped, where the new shape leaves the grid's axes as they are."""
        n = self.starts.ndim
        if shape[:n] == self.starts.shape:
            return Source(self.starts, shape[n:], self.itemsize)
        return None


def _join(sources: list[Source | None], axis: int, *, stack: bool) -> Source | None:
    if axis < 0 or any(s is None for s in sources):
        return None
    depth = axis if stack else axis + 1
    depth = max(depth, *(s.starts.ndim for s in sources))  # type: ignore[union-attr]
    parts = [s.expand(depth) for s in sources]  # type: ignore[union-attr]
    first = parts[0]
    if any(p.inner != first.inner or p.itemsize != first.itemsize for p in parts):
        return None
    join = np.stack if stack else np.concatenate
    return Source(join([p.starts for p in parts], axis=axis), first.inner, first.itemsize)


class TracedArray(mx.array):
    """A lazy array that knows its `source`; any untraced operation drops it."""

    source: Source
    plain: mx.array

    def __getitem__(self, index: Any) -> mx.array:
        return _traced(self.plain[index], _index(self.source, index))

    def reshape(self, *shape: Any, **kwargs: Any) -> mx.array:
        out = self.plain.reshape(*shape, **kwargs)
        return _traced(out, self.source.reshape(tuple(out.shape)))

    def view(self, dtype: mx.Dtype, **kwargs: Any) -> mx.array:
        out = self.plain.view(dtype, **kwargs)
        if not self.source.inner:
            return out
        inner = (*self.source.inner[:-1], out.shape[-1])
        return _traced(out, Source(self.source.starts, inner, dtype.size))

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        return self if dtype == self.dtype else self.plain.astype(dtype, stream=stream)

    def split(self, *args: Any, **kwargs: Any) -> Any:
        return mx.split(self, *args, **kwargs)


def _traced(array: mx.array, source: Source | None) -> mx.array:
    if source is None or source.shape != tuple(array.shape):
        return array
    traced = TracedArray(array)
    traced.source, traced.plain = source, array
    return traced


def _index(source: Source, index: Any) -> Source | None:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(p is Ellipsis or isinstance(p, (slice, int)) for p in parts):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        fill = len(source.shape) - (len(parts) - 1)
        parts = parts[:at] + (slice(None),) * fill + parts[at + 1 :]
    axis = 0
    for part in parts:
        if part != slice(None):
            source = source.slice(axis, part)
        axis += not isinstance(part, int)
    return source


def source_of(array: mx.array) -> Source | None:
    """Where `array` lies on disk, or None when it was computed."""
    return array.source if isinstance(array, TracedArray) else None


def plain(array: mx.array) -> mx.array:
    """`array` without its source, so that nothing traced outlives loading."""
    return array.plain if isinstance(array, TracedArray) else array


@contextlib.contextmanager
def tracing(checkpoint: Checkpoint, hidden: Collection[str] = ()) -> Iterator[None]:
    """Within the block, `mx.load` of the checkpoint's files gives traced arrays.

    hidden: names of tensors that are not given.
    """
    index = {str(path): i for i, path in enumerate(checkpoint.files)}
    hidden = set(hidden)
    real = {name: getattr(mx, name) for name in _PATCHES} | {"load": mx.load}

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        arrays = real["load"](file, *args, **kwargs)
        if not isinstance(arrays, dict):
            return arrays
        number = index.get(str(file))
        if number is None:
            return arrays
        for name in hidden & arrays.keys():
            del arrays[name]
        for name, array in arrays.items():
            offset = checkpoint.tensors[name].offset
            start = np.array(number << FILE_SHIFT | offset, dtype=np.int64)
            arrays[name] = _traced(array, Source(start, tuple(array.shape), array.dtype.size))
        return arrays

    try:
        mx.load = load  # type: ignore[assignment]
        for name, patch in _PATCHES.items():
            setattr(mx, name, patch(real[name]))
        yield
    finally:
        for name, function in real.items():
            setattr(mx, name, function)


def _patch_join(stack: bool) -> Callable[[Callable], Callable]:
    def patch(real: Callable) -> Callable:
        def join(arrays: Any, axis: int = 0, **kwargs: Any) -> mx.array:
            arrays = list(arrays)
            out = real([plain(a) for a in arrays], axis, **kwargs)
            if not arrays or not all(isinstance(a, TracedArray) for a in arrays):
                return out
            return _traced(out, _join([source_of(a) for a in arrays], axis, stack=stack))

        return join

    return patch


def _patch_split(real: Callable) -> Callable:
    def split(a: mx.array, indices_or_sections: Any, axis: int = 0, **kwargs: Any) -> Any:
        parts = real(plain(a), indices_or_sections, axis, **kwargs)
        source = source_of(a)
        if source is None:
            return parts
        axis, at, traced = axis % a.ndim, 0, []
        for part in parts:
            end = at + part.shape[axis]
            traced.append(_traced(part, source.slice(axis, slice(at, end))))
            at = end
        return traced

    return split


def _patch_same(real: Callable) -> Callable:
    def same(a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return _traced(real(plain(a), *args, **kwargs), source_of(a))

    return same


_PATCHES: dict[str, Callable[[Callable], Callable]] = {
    "stack": _patch_join(stack=True),
    "concatenate": _patch_join(stack=False),
    "concat": _patch_join(stack=False),
    "split": _patch_split,
    "contiguous": _patch_same,
}
