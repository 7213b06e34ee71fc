"""Large arrays on huge pages, where the CPU kernels run and the system has them (Linux).

A product reads each weight once, so on pages of 4 kB looking addresses up is a sixth of its time.
Whether there are huge pages is the system's to say: without them nothing changes but the speed.
"""

from __future__ import annotations

import mlx.core as mx

from . import backend


def zeros(rows: int, nbytes: int) -> mx.array:
    """[rows, nbytes] uint8, evaluated."""
    native = backend.native() if backend.available() else None
    if native is not None:
        return native.zeros_on_huge_pages(rows, nbytes)  # type: ignore[no-any-return]
    array = mx.zeros((rows, nbytes), dtype=mx.uint8)
    mx.eval(array)
    return array


def move(array: mx.array) -> bool:
    """Move an evaluated array's memory, 2 MB at a time; whether there was anything to move and
    the system did (from Linux 6.1 on)."""
    native = backend.native() if backend.available() else None
    return native is not None and bool(native.onto_huge_pages(array))
