"""What passes ask of a pool: experts needed and absent, layer by layer, from a recording.

    demands = replayed(Routes.load(path), share=0.5)
    stand_in(demands, layers=40, top_k=8, rng)          # on a model that was not recorded

A recording holds the true choices of every pass, so misses of an LRU pool of any size are
exact. What a rehearsal would have named is not in it: recall and precision are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streamer.replay import replay, slots_of
from streamer.routes import Call, Routes


@dataclass
class Demand:
    """One step: a pass over `rows` rows of which `kept` stay, and the drafts before it.

    need, missed: distinct experts of each layer of the trunk, in all and absent; drafting:
    absent experts of the head's own passes.
    """

    rows: int
    kept: int
    need: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    drafting: int = 0


def replayed(routes: Routes, share: float) -> list[Demand]:
    """Every decoding step of the recording, on the runtime's pool with `share` of the experts."""
    found: list[Demand] = []
    steps: dict[int, Demand] = {}
    drafting = 0

    def on_call(call: Call, absent: np.ndarray, missed: np.ndarray) -> None:
        nonlocal drafting
        step = routes.passes[call.step]
        if step.kind == "draft":
            drafting += len(missed)
        if step.kind not in ("decode", "verify") or call.layer >= routes.head:
            return
        if call.step not in steps:
            steps[call.step] = Demand(len(step.tokens), step.kept, drafting=drafting)
            found.append(steps[call.step])
            drafting = 0
        steps[call.step].need.append(len(np.unique(call.experts)))
        steps[call.step].missed.append(len(missed))

    replay(routes, slots_of(routes, share), on_call=on_call)
    return found


def tokens_of(demands: Sequence[Demand]) -> int:
    return sum(d.kept for d in demands)


def hit_rate(demands: Sequence[Demand]) -> float:
    need = sum(sum(d.need) for d in demands)
    return 1 - sum(sum(d.missed) for d in demands) / max(1, need)


def union_of(demands: Sequence[Demand], top_k: int) -> float:
    """M(rows): distinct experts of a layer over those of one row, on average."""
    needs = [n for d in demands for n in d.need]
    return sum(needs) / len(needs) / top_k if needs else 1.0


def stand_in(
    demands: Sequence[Demand], top_k: int, layers: int, new_k: int, rng: np.random.Generator
) -> list[Demand]:
    """The same steps on a model of `layers` layers and `new_k` experts a row.

    Each layer takes the place of the one as deep in the recorded model, and asks for and misses
    in proportion, rounded at random so that means stay.
    """

    def scaled(n: int) -> int:
        exact = n * new_k / top_k
        return int(exact) + (rng.random() < exact - int(exact))

    made = []
    for one in demands:
        depth = len(one.need)
        step = Demand(one.rows, one.kept, drafting=scaled(one.drafting))
        for layer in range(layers):
            old = layer * depth // layers
            step.need.append(max(1, scaled(one.need[old])))
            step.missed.append(min(step.need[-1], scaled(one.missed[old])))
        made.append(step)
    return made
