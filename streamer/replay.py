"""Replay a recording on a pool of any size, by any policy: hits, misses, bytes.

    routes = Routes.load(path)
    replay(routes, slots_of(routes, 0.5), "lrfu").hit_rate

The runtime's own `Executor` runs, over experts of one byte that nothing reads, so
that what it would keep, walk or evict is decided by the same lines: with the
recorded pool and its policy the counts equal the recorded run's. What other executors
guess and read ahead is not replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .counters import Counters
from .errors import UsageError
from .executor import Executor
from .experts import ExpertTensor, LayerExperts
from .loading import spread
from .policies import POLICIES, Belady
from .routes import KINDS, Call, Routes
from .store import Store

ONE_BYTE = (ExpertTensor("gate_proj", "weight", (1,), mx.uint8, mx.uint8),)


@dataclass
class Result:
    """hits and misses as the runtime counts them: distinct experts per layer and pass, nothing
    where a whole group is resident. by_kind: hits and misses of passes of each kind."""

    slots: int
    policy: str
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Of all passes; 1 where nothing was asked."""
        return rate(self.hits, self.misses)

    def rate_of(self, *kinds: str) -> float:
        """Hit rate of passes of these kinds."""
        found = [self.by_kind.get(kind, (0, 0)) for kind in kinds]
        return rate(sum(h for h, _ in found), sum(m for _, m in found))


def rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 1.0


def slots_of(routes: Routes, share: float) -> tuple[int, ...]:
    """Slots of each group when the pool holds `share` of all experts, as the loader divides it."""
    counts = [sum(routes.counts[i] for i in group.layers) for group in routes.groups]
    return spread(counts, share, routes.top_k)


def replay(
    routes: Routes,
    slots: Sequence[int],
    policy: str = "lrfu",
    *,
    warm: Callable[[Sequence[Executor]], None] | None = None,
    on_call: Callable[[Call, np.ndarray, np.ndarray], None] = lambda call, absent, missed: None,
) -> Result:
    """Run every call of `routes` in order on pools of `slots` each.

    warm(executors): fills pools before the first call. on_call(call, absent, missed): experts
    of the call's layer that are not resident, and those that it asks for. Raises UsageError
    for an unknown policy or a pool smaller than one row needs.
    """
    if policy not in POLICIES:
        raise UsageError(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
    if len(slots) != len(routes.groups) or min(slots, default=1) < routes.top_k:
        raise UsageError(
            f"{routes.model} needs {len(routes.groups)} pools of {routes.top_k} slots or more"
        )
    place = {layer: (g, i) for g, x in enumerate(routes.groups) for i, layer in enumerate(x.layers)}
    result = Result(sum(slots), policy)
    pools = [_Dry(routes, g, n, policy, place) for g, n in enumerate(slots)]
    if warm:
        warm([pool.executor for pool in pools])
    counts = {kind: [0, 0] for kind in KINDS}
    for call in routes.calls:
        g, layer = place[call.layer]
        need, absent = np.unique(call.experts), pools[g].absent(layer)
        missed = np.intersect1d(need, absent)
        on_call(call, absent, missed)
        pools[g].run(layer, call.experts)
        kind = counts[routes.passes[call.step].kind]
        kind[0] += len(need) - len(missed)
        kind[1] += len(missed)
        result.bytes_read += len(missed) * routes.groups[g].expert_bytes
    for pool in pools:
        pool.finish()
        result.hits += pool.executor.counters.hits
        result.misses += pool.executor.counters.misses
    result.by_kind = {kind: (h, m) for kind, (h, m) in counts.items() if h + m}
    return result


class _Dry:
    """One group's executor without weights or disk."""

    def __init__(
        self,
        routes: Routes,
        group: int,
        slots: int,
        policy: str,
        place: dict[int, tuple[int, int]],
    ):
        counts = [routes.counts[i] for i in routes.groups[group].layers]
        self.whole = slots >= sum(counts)  # mlx-lm's own switches then, which count nothing
        layers = [
            LayerExperts("", nn.Module(), n, ONE_BYTE, (np.arange(n, dtype=np.int64),))
            for n in counts
        ]
        self.executor = Executor(layers, slots, cast(Store, _NoDisk()), Counters())
        self._pool = self.executor.pool = POLICIES[policy](
            slots, counts, list(_future(routes, group, place)) if policy == "belady" else []
        )

    def absent(self, layer: int) -> np.ndarray:
        """Experts of the layer that would have to be read."""
        if self.whole:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self._pool.slot_of[layer] < 0)

    def run(self, layer: int, experts: np.ndarray) -> None:
        if self.whole:
            return
        if isinstance(self._pool, Belady):
            self._pool.advance()
        x = mx.zeros((len(experts), 1))
        self.executor(layer, cast(nn.Module, _nothing), x, mx.array(experts.astype(np.uint32)))

    def finish(self) -> None:
        """Choices of layers that were wholly resident are counted late."""
        self.executor.settle()


def _future(
    routes: Routes, group: int, place: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, np.ndarray]]:
    for call in routes.calls:
        g, layer = place[call.layer]
        if g == group:
            yield layer, np.unique(call.experts)


def _nothing(x: mx.array, slots: mx.array) -> mx.array:
    return mx.zeros((*slots.shape, 1))


class _Done:
    """A ticket of reads that were never made."""

    done = True
    seconds = 0.0

    def wait(self) -> None:
        return


class _NoDisk:
    def read(self, pieces: Any, guess: float | None = None, widen: Any = ()) -> _Done:
        return _Done()


def unions(routes: Routes, deepest: int = 8) -> list[float]:
    """M(rows) for 1..deepest: distinct experts of `rows` consecutive tokens, over top-k, on
    average over layers. From passes of one row and kept rows of verify passes."""
    per_layer: dict[tuple[int, int], list[np.ndarray]] = {}
    for call in routes.calls:
        step = routes.passes[call.step]
        if step.kind in ("decode", "verify"):
            rows = per_layer.setdefault((step.sequence, call.layer), [])
            rows += list(call.experts[: step.kept])
    found = []
    for depth in range(1, deepest + 1):
        sizes = [
            len(np.unique(np.concatenate(rows[i : i + depth]))) / rows[i].size
            for rows in per_layer.values()
            for i in range(len(rows) - depth + 1)
        ]
        if not sizes:
            break
        found.append(float(np.mean(sizes)))
    return found
