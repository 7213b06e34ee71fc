"""Compute a model's parameters piece by piece, though mlx-lm defines them whole.

`sanitize` and `quantize_model` stack, slice, turn and quantize lazy arrays, and
evaluating a part of such an array evaluates all of it. Within `piecewise`, an
array stacked from others or loaded from a large tensor is a `Pieces`: a lazy
`mx.array` that also knows how to make runs of its rows (axis 0) one by one, and
passes that on through every operation that leaves rows apart. Other operations
drop it: the result is right, and evaluated whole.

    with piecewise(checkpoint):
        model, config = mlx_lm.utils.load_model(path, lazy=True)
    for piece in recipe(array).take():
        mx.eval(piece)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .header import Tensor

PIECE = 4 << 20  # bytes; smaller tensors are loaded whole
Part = Callable[[], mx.array]


class Pieces(mx.array):
    """plain: the same array, whole and lazy; parts: make runs of `rows` rows each.

    A part holds no file's data until it is called; a stacked array is held by
    its part alone, so that a part called and dropped leaves nothing behind.
    """

    plain: mx.array
    rows: tuple[int, ...]
    parts: list[Part]

    def __getitem__(self, index: Any) -> mx.array:
        out = self.plain[index]
        return _mapped(self, out, lambda p: p[index]) if _keeps_rows(index, self.ndim) else out

    def __mul__(self, other: Any) -> mx.array:
        out = self.plain * whole(other)
        if not isinstance(other, mx.array) or other.ndim < self.ndim:
            return _mapped(self, out, lambda p: p * other)
        if other.ndim > self.ndim or other.shape[0] != self.shape[0]:
            return out
        return _pieces(out, self.rows, _zipped(lambda p, q: p * q, self, other))

    def reshape(self, *shape: Any, **kwargs: Any) -> mx.array:
        return _reshaped(self, self.plain.reshape(*shape, **kwargs))

    def flatten(self, *args: Any, **kwargs: Any) -> mx.array:
        return _reshaped(self, self.plain.flatten(*args, **kwargs))

    def view(self, dtype: mx.Dtype, **kwargs: Any) -> mx.array:
        out = self.plain.view(dtype, **kwargs)
        return _mapped(self, out, lambda p: p.view(dtype)) if self.ndim > 1 else out

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        return _mapped(self, self.plain.astype(dtype, stream=stream), lambda p: p.astype(dtype))

    def swapaxes(self, axis1: int, axis2: int, **kwargs: Any) -> mx.array:
        return mx.swapaxes(self, axis1, axis2, **kwargs)

    def moveaxis(self, source: int, destination: int, **kwargs: Any) -> mx.array:
        return mx.moveaxis(self, source, destination, **kwargs)

    def split(self, *args: Any, **kwargs: Any) -> Any:
        return mx.split(self, *args, **kwargs)


def _refuse(self: Pieces, *_: Any) -> None:
    raise NotImplementedError("its model file changes a weight in place")


# a change in place would reach `plain` only, or the parts only
for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    setattr(Pieces, f"__i{_operator}__", _refuse)
setattr(Pieces, "__setitem__", _refuse)  # noqa: B010


class Recipe(NamedTuple):
    """How to make an array in pieces of its rows, without the array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    parts: list[Part]

    def take(self) -> Iterator[mx.array]:
        """The pieces, lazy, each made once. Memory is bounded if the caller keeps none."""
        while self.parts:
            yield self.parts.pop(0)()

    def bytes_of(self, name: str) -> Iterator[memoryview]:
        """Of the pieces in order, as files hold them. Raises CheckpointError naming `name`."""
        try:
            for piece in self.take():
                if piece.size == 0:
                    continue
                flat: Any = mx.contiguous(piece).reshape(-1).view(mx.uint8)  # NumPy has no bfloat16
                del piece
                mx.eval(flat)
                yield memoryview(flat)
                del flat
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{name} cannot be computed: {text}") from error


def recipe(array: mx.array) -> Recipe:
    """One piece where nothing is known of the array's making.

    An array that shares a source with others keeps what they have computed of
    it, so for bounded memory every parameter is turned into its recipe first.
    """
    parts = array.parts if isinstance(array, Pieces) else [lambda: array]
    return Recipe(tuple(array.shape), array.dtype, list(parts))


def whole(array: Any) -> Any:
    """`array` without its parts."""
    return array.plain if isinstance(array, Pieces) else array


@contextlib.contextmanager
def piecewise(checkpoint: Checkpoint) -> Iterator[None]:
    """Within the block, what `mx` loads, stacks and quantizes comes as `Pieces`."""
    files = {str(path) for path in checkpoint.files}
    real = {name: getattr(mx, name) for name in (*_PATCHES, "load")}

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        arrays = real["load"](file, *args, **kwargs)
        if str(file) in files:
            for name, array in arrays.items():
                arrays[name] = _loaded(array, checkpoint.tensors[name])
        return arrays

    try:
        mx.load = load  # type: ignore[assignment]
        for name, patch in _PATCHES.items():
            setattr(mx, name, partial(patch, real[name]))
        yield
    finally:
        for name, function in real.items():
            setattr(mx, name, function)


def _pieces(array: mx.array, rows: tuple[int, ...], parts: list[Part]) -> mx.array:
    out = Pieces(array)
    out.plain, out.rows, out.parts = array, rows, parts
    return out


def _mapped(source: Pieces, out: mx.array, operation: Callable[[mx.array], mx.array]) -> mx.array:
    parts: list[Part] = [partial(_applied, operation, part) for part in source.parts]
    return _pieces(out, source.rows, parts)


def _applied(operation: Callable[..., mx.array], *parts: Part) -> mx.array:
    return operation(*(part() for part in parts))


def _zipped(operation: Callable[..., mx.array], first: Pieces, *others: mx.array) -> list[Part]:
    columns = [first.parts, *(_cut(other, first.rows) for other in others)]
    return [partial(_applied, operation, *parts) for parts in zip(*columns, strict=True)]


def _cut(array: mx.array, rows: tuple[int, ...]) -> list[Part]:
    if isinstance(array, Pieces) and array.rows == rows:
        return array.parts
    plain, ends = whole(array), np.cumsum(rows).tolist()
    return [partial(_slice, plain, end - n, end) for n, end in zip(rows, ends, strict=True)]


def _slice(array: mx.array, begin: int, end: int) -> mx.array:
    return array[begin:end]


def _keeps_rows(index: Any, ndim: int) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(p is None or p is Ellipsis or isinstance(p, (slice, int)) for p in parts):
        return False
    if parts and parts[0] is Ellipsis:
        return sum(p is not None for p in parts[1:]) < ndim
    return bool(parts) and isinstance(parts[0], slice) and parts[0] == slice(None)


def _reshaped(source: Pieces, out: mx.array) -> mx.array:
    if out.ndim == 0 or out.shape[0] != source.shape[0]:
        return out
    return _mapped(source, out, lambda p: p.reshape(p.shape[0], *out.shape[1:]))


def _loaded(array: mx.array, tensor: Tensor) -> mx.array:
    if array.nbytes <= PIECE or array.nbytes != tensor.nbytes or array.ndim < 2:
        return array
    # stacked experts one by one, so that weights and scales are cut alike
    step = 1 if array.ndim > 2 else max(1, PIECE * array.shape[0] // array.nbytes)
    firsts = range(0, array.shape[0], step)
    rows = tuple(min(step, array.shape[0] - first) for first in firsts)
    shape, dtype = tuple(array.shape[1:]), array.dtype
    parts: list[Part] = [
        partial(_read, tensor, first, (n, *shape), dtype)
        for first, n in zip(firsts, rows, strict=True)
    ]
    return _pieces(array, rows, parts)


def _read(tensor: Tensor, first: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    nbytes = math.prod(shape) * dtype.size
    at = tensor.offset + first * nbytes // shape[0]
    data = np.fromfile(tensor.path, np.uint8, nbytes, offset=at)
    if len(data) != nbytes:
        raise CheckpointError(f"{tensor.path} was cut off while it was read")
    return mx.array(data).view(dtype).reshape(shape)


class _Once:
    """Quantizes a piece when the first of its outputs is asked for; each is given out once."""

    def __init__(self, quantize: Callable[[mx.array], Sequence[mx.array]], part: Part):
        self._make: Callable[[], Sequence[mx.array]] | None = lambda: quantize(part())
        self._outputs: dict[int, mx.array] = {}

    def __call__(self, output: int) -> mx.array:
        if self._make is not None:
            self._outputs = dict(enumerate(self._make()))
            mx.eval(self._outputs)
            self._make = None
        return self._outputs.pop(output)


def _quantize(real: Callable, w: mx.array, *args: Any, **kwargs: Any) -> Any:
    outputs = real(whole(w), *args, **kwargs)
    if not isinstance(w, Pieces) or kwargs.get("global_scale") is not None:
        return outputs
    once = [_Once(lambda piece: real(piece, *args, **kwargs), part) for part in w.parts]
    return [_pieces(o, w.rows, [partial(x, i) for x in once]) for i, o in enumerate(outputs)]


def _dequantize(
    real: Callable, w: mx.array, scales: mx.array, biases: Any = None, *args: Any, **kwargs: Any
) -> mx.array:
    out = real(whole(w), whole(scales), whole(biases), *args, **kwargs)
    if not isinstance(w, Pieces) or kwargs.get("global_scale") is not None:
        return out
    if biases is None:
        parts = _zipped(lambda p, s: real(p, s, None, *args, **kwargs), w, scales)
    else:
        parts = _zipped(lambda p, s, b: real(p, s, b, *args, **kwargs), w, scales, biases)
    return _pieces(out, w.rows, parts)


def _stack(real: Callable, arrays: Any, axis: int = 0, **kwargs: Any) -> mx.array:
    plain = [whole(a) for a in arrays]
    out = real(plain, axis, **kwargs)
    return _pieces(out, (1,) * len(plain), [partial(_row, a) for a in plain]) if axis == 0 else out


def _row(array: mx.array) -> mx.array:
    return array[None]


def _join(real: Callable, arrays: Any, axis: int = 0, **kwargs: Any) -> mx.array:
    return real([whole(a) for a in arrays], axis, **kwargs)


def _split(real: Callable, a: mx.array, sections: Any, axis: int = 0, **kwargs: Any) -> Any:
    outputs = real(whole(a), sections, axis, **kwargs)
    axis %= a.ndim
    if not isinstance(a, Pieces) or axis == 0:
        return outputs
    ends = np.cumsum([out.shape[axis] for out in outputs]).tolist()
    before = (slice(None),) * axis
    return [a[(*before, slice(e - o.shape[axis], e))] for o, e in zip(outputs, ends, strict=True)]


def _same_rows(real: Callable, a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    out = real(whole(a), *args, **kwargs)
    return _mapped(a, out, lambda p: real(p, *args, **kwargs)) if isinstance(a, Pieces) else out


def _turn(real: Callable, a: mx.array, axis1: int, axis2: int, **kwargs: Any) -> mx.array:
    if 0 in (axis1 % a.ndim, axis2 % a.ndim):
        return real(whole(a), axis1, axis2, **kwargs)
    return _same_rows(real, a, axis1, axis2, **kwargs)


_PATCHES: dict[str, Callable[..., Any]] = {
    "stack": _stack,
    "concatenate": _join,
    "concat": _join,
    "split": _split,
    "swapaxes": _turn,
    "moveaxis": _turn,
    "contiguous": _same_rows,
    "from_fp8": _same_rows,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
