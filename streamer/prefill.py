"""A call of many rows, or with more experts than slots: walk the absent ones, batch by batch.

They are read in disk order through a few scratch slots, one batch ahead of what computes, so
that each is read once and what decoding uses stays. Free slots, up to the layer's even share,
keep its most used experts for later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .pairs import Pairs

if TYPE_CHECKING:
    from .ahead import Reading
    from .pool import SlotPool
    from .residency import Residency

SCRATCH_BATCH = 16  # experts read ahead at once
MAX_PAIRS = 4096  # pairs computed at once, which bounds transients


def walk(
    held: Residency,
    layer: int,
    inner: nn.Module,
    x: mx.array,
    ids: np.ndarray,
    hits: np.ndarray,
    misses: np.ndarray,
) -> mx.array:
    """x [..., D], ids [..., k], of these the resident and the absent ones -> [..., k, D]."""
    held.moved()
    pool = held.pool
    flat = ids.reshape(-1)
    pairs = Pairs(x, ids)
    table = pool.slot_of[layer].copy()
    outputs: list[mx.array] = []
    order: list[np.ndarray] = []

    def compute(experts: np.ndarray) -> None:
        chosen = np.flatnonzero(np.isin(flat, experts))
        for part in np.split(chosen, range(MAX_PAIRS, len(chosen), MAX_PAIRS)):
            outputs.append(pairs.run(inner, table, part))
            order.append(part)
            mx.eval(outputs[-1])

    starts = held.layers[layer].starts[0]
    misses = misses[np.argsort(starts[misses], kind="stable")]  # as they lie on disk
    homes = _homes(pool, layer, flat, misses)
    batch = batch_of(pool)
    batches = np.split(misses, range(batch, len(misses), batch))
    scratch: list[list[int]] = []
    if pool.slots - len(hits) - len(homes) >= 2 * batch:
        keep = (layer, frozenset(hits.tolist()))
        scratch = [pool.take(batch, keep) for _ in range(2)]
    readings: list[Reading] = []

    def start(i: int) -> None:
        spare = iter(scratch[i % len(scratch)])
        slots = [homes[e] if e in homes else next(spare) for e in batches[i].tolist()]
        table[batches[i]] = slots
        readings.append(held.load(layer, batches[i].tolist(), slots))

    if scratch:
        start(0)
    if len(hits):
        compute(hits)
    if not scratch:  # a pool this small is all scratch once its hits are done
        scratch = [pool.take(batch)]
        start(0)
    for i, experts in enumerate(batches):
        if len(scratch) == 2 and i + 1 < len(batches):
            start(i + 1)
        held.wait(readings[i].wait)
        compute(experts)
        if len(scratch) == 1 and i + 1 < len(batches):
            start(i + 1)
    for slots in scratch:
        pool.release(slots)
    for expert, slot in homes.items():
        pool.place(layer, expert, slot)
    return pairs.join(outputs, np.concatenate(order))


def in_parts(inner: nn.Module, x: mx.array, slots: mx.array) -> mx.array:
    """y [..., k, D] of x [..., D] and slots [..., k], all there: `MAX_PAIRS` pairs at a time."""
    rows = max(1, MAX_PAIRS // slots.shape[-1])
    if slots.size <= rows * slots.shape[-1]:
        return inner(x, slots)
    x, flat = x.reshape(-1, x.shape[-1]), slots.reshape(-1, slots.shape[-1])
    parts = []
    for first in range(0, len(flat), rows):
        parts.append(inner(x[first : first + rows], flat[first : first + rows]))
        mx.eval(parts[-1])
    return mx.concatenate(parts).reshape(*slots.shape, -1)


def batch_of(pool: SlotPool) -> int:
    """Experts of one scratch batch: a sixteenth of the pool, at most."""
    return max(1, min(SCRATCH_BATCH, pool.slots // 16))


def _homes(pool: SlotPool, layer: int, flat: np.ndarray, misses: np.ndarray) -> dict[int, int]:
    """Free slots that this layer's most used absent experts may stay in.

    Only free slots, two batches of them left for scratch, and never more
    than the layer's even share: prefill evicts nothing that decoding used.
    """
    share = pool.slots // len(pool.slot_of) - pool.resident[layer]
    room = min(share, len(pool.free) - 2 * batch_of(pool))
    if room <= 0:
        return {}
    uses = np.bincount(flat, minlength=len(pool.slot_of[layer]))[misses]
    chosen = misses[np.argsort(-uses, kind="stable")[:room]].tolist()
    return dict(zip(chosen, pool.take(len(chosen)), strict=True))
