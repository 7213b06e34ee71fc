"""Read the trunk into memory: everything that is not a routed expert.

    load_trunk(open_model(path), progress=print)

Nothing lies in memory twice for longer than a piece: a tensor that is held in a
wider dtype than it is stored in is read from its file piece by piece, as MLX
would keep both forms until the wide one is whole. Tensors that mlx-lm computes
from stored ones are the exception.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from kernels import pages

from .errors import CheckpointError
from .opened import Opened, trunk_parameters
from .ranges import Widening, widened
from .trace import FILE_SHIFT, plain, source_of

PIECE = 4 << 20  # stored bytes widened at once; smaller tensors are left to MLX


def load_trunk(opened: Opened, progress: Callable[[int], None]) -> None:
    """Read every parameter; `progress` is called with the bytes of each.

    Raises CheckpointError where a file ends too early.
    """
    parameters = trunk_parameters(opened.model)[::-1]
    while parameters:
        path, parameter = parameters.pop()
        wide = opened.held(path, parameter.dtype)
        if parameter.dtype == wide:
            array = plain(parameter)
        elif parameter.nbytes > PIECE and (address := _address(parameter)) is not None:
            array = _widened(opened, address, parameter)
        else:
            array = plain(parameter).astype(wide)
        mx.eval(array)
        pages.move(array)
        # at once: what is stored must not stay while the rest is read
        opened.model.update(tree_unflatten([(path, array)]))
        del parameter
        mx.clear_cache()
        progress(array.nbytes)


def _address(parameter: mx.array) -> int | None:
    """Where a parameter lies on disk in one range (see `streamer.trace.FILE_SHIFT`)."""
    source = source_of(parameter)
    return int(source.starts) if source is not None and source.starts.ndim == 0 else None


def _widened(opened: Opened, address: int, parameter: mx.array) -> mx.array:
    """float16 or bfloat16 on disk, float32 in memory."""
    array = mx.zeros(parameter.shape, dtype=mx.float32)
    mx.eval(array)
    held = np.array(array, copy=False).reshape(-1).view(np.uint8)
    file = opened.files[address >> FILE_SHIFT]
    offset = address & ((1 << FILE_SHIFT) - 1)
    for at in range(0, parameter.nbytes, PIECE):
        nbytes = min(PIECE, parameter.nbytes - at)
        stored = np.fromfile(file, np.uint8, nbytes, offset=offset + at)
        if len(stored) < nbytes:
            raise CheckpointError(f"{file} was cut off while it was read")
        out = held[2 * at : 2 * (at + nbytes)]
        widened(Widening(stored.data, out.data, parameter.dtype == mx.bfloat16))
    return array
