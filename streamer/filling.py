"""Fill an empty pool before the first token: with everything, or with what was used before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.nn as nn

from .ahead import Reading
from .residency import Residency


def fill(held: Residency, progress: Callable[[int, int], None]) -> list[nn.Module]:
    """Read everything into an empty pool that holds it all; progress(bytes done, in all).

    Returns the layers' switches as mlx-lm has them, over their part of the pool.
    """
    pool, size, done, switches = held.pool, held.expert_bytes, 0, []
    for layer, experts in enumerate(held.layers):
        slots = sorted(pool.take(experts.count))
        held.load(layer, range(experts.count), slots).wait()
        for expert, slot in enumerate(slots):
            pool.place(layer, expert, slot)
        switches.append(held.arrays.bind(experts.switch, slice(slots[0], slots[-1] + 1)))
        done += len(slots) * size
        progress(done, pool.total * size)
    return switches


def warm(held: Residency, keys: Sequence[tuple[int, int]], wave: int) -> Iterator[int]:
    """Read (layer, expert) `keys` into an empty pool, `wave` at once, as they lie on disk.

    The last key will be the last to be evicted. Yields how many have come each time.
    """
    slots = dict(zip(keys, held.pool.take(len(keys)), strict=True))
    on_disk = sorted(keys, key=lambda key: int(held.layers[key[0]].starts[0][key[1]]))
    waves = [on_disk[i : i + wave] for i in range(0, len(on_disk), wave)]
    waiting: list[list[Reading]] = []
    try:
        for i in range(len(waves) + 1):
            if i < len(waves):
                waiting.append([held.load(k[0], [k[1]], [slots[k]]) for k in waves[i]])
            if i:
                for reading in waiting.pop(0):
                    reading.wait()
                yield len(waves[i - 1])
    except BaseException:
        held.abandon()
        raise
    for key in keys:
        held.pool.place(*key, slots[key])
