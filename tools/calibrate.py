"""What passes of a model cost on this machine, and what live runs give, to hold a simulation to.

`Live` is a loaded model in one configuration; each turn decodes the same prompts greedily and
notes, step by step, seconds and absent experts. `calibrate` turns some of them into `Costs`:

- a step without a miss, from pools that hold nearly everything, layer-wise and rehearsed;
- what a waiting layer adds, by least squares over the steps of one small pool;
- what each absent expert adds besides its bytes, and each that is read ahead, so that the
  layer-wise and the rehearsed run of that pool come out, the odd stall of the disk included.

Other pools are then predicted, not fitted. Everything resident decodes without read-backs, in
another way, and is not simulated.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from streamer.disk import Disk
from streamer.engine import Timing, generate
from streamer.experts import stored_bytes
from streamer.loading import load_streamed, open_tokenizer
from streamer.opened import open_model
from streamer.speculate import Speculation
from tools.machines import Costs


@dataclass
class Step:
    """A decoding step: its pass's rows, seconds of the pass and of drafting, absent experts."""

    rows: int
    seconds: float
    drafting: float = 0.0
    missed: list[int] = field(default_factory=list)


class Live:
    """A model with `slots` experts, its executor and drafts, and what its turns gave."""

    def __init__(
        self,
        path: Path,
        slots: int,
        executor: str,
        depth: int,
        *,
        disk: float | None,
        io: str = "direct",
    ):
        """disk: bytes a second of one to imitate, from the page cache; None for the real one."""
        self.depth = depth
        self.model: Any = load_streamed(
            path,
            slots=slots,
            io=io if disk is None else "pread",
            dtype="auto",
            mtp=depth > 0,
            executor=executor,  # type: ignore[arg-type]
            disk=None if disk is None else Disk(disk),
        )
        opened = self.model.streamer.opened
        self.expert_bytes = stored_bytes(opened.trunk_layers[0].format)
        self.layers = len(opened.trunk_layers)
        self.rates: list[float] = []
        self.steps: list[Step] = []
        self._tokenizer = open_tokenizer(opened)

    def turn(self, prompts: Sequence[str], count: int) -> float:
        """Tokens a second after each prompt's first; steps are kept from the second turn on."""
        seconds, tokens = 0.0, 0
        kept: list[Step] = []
        for text in prompts:
            timing = Timing()
            head = self.model.streamer.opened.head
            speculation = Speculation(self.model, head, self.depth) if self.depth else None
            notes = _Notes(self.layers)
            self.model.streamer.watch = notes
            steps = generate(
                self.model,
                list(self._tokenizer.encode(text)),
                make_prompt_cache(self.model),
                max_tokens=count,
                timing=timing,
                speculation=speculation,
            )
            with contextlib.closing(steps):
                for _ in steps:
                    pass
            self.model.streamer.watch = None
            kept += notes.steps[1:]  # the first belongs to the prompt
            seconds += timing.decode_seconds
            tokens += timing.generated_tokens - 1
        if self.rates:
            self.steps += kept
        self.rates.append(tokens / seconds)
        return tokens / seconds

    @property
    def rate(self) -> float:
        """The median of the turns after the first, as the pool then is warm."""
        return statistics.median(self.rates[1:])

    def close(self) -> None:
        self.model.streamer.close()


class _Notes:
    """Watches a generation."""

    def __init__(self, layers: int):
        self.steps: list[Step] = []
        self._layers = layers
        self._missed = [0] * layers
        self._drafting = 0.0

    def step(self, kind: str, rows: int, seconds: float) -> None:
        if kind == "draft":
            self._drafting += seconds
        if kind in ("decode", "verify"):
            self.steps.append(Step(rows, seconds, self._drafting, self._missed))
            self._drafting = 0.0
        if kind != "rehearse":
            self._missed = [0] * self._layers

    def chose(self, layer: int, ids: np.ndarray, missed: Sequence[int]) -> None:
        if layer < self._layers:
            self._missed[layer] += len(missed)


def without_misses(live: Live) -> float:
    """Seconds of a pass that missed nothing, the median. Raises ValueError where there is none."""
    found = [s.seconds for s in live.steps if not sum(s.missed) and s.rows == live.depth + 1]
    return statistics.median(found)


def calibrate(ample: Live, rehearsed: Live | None, small: Live, disk: float) -> Costs:
    """Costs of `ample`'s depth; all have had their turns. disk: bytes a second.

    ample, rehearsed: pools of nearly everything, by each executor; small: layer-wise, of a
    pool that misses a lot.
    """
    layers = ample.layers
    step = without_misses(ample)
    other = without_misses(rehearsed) if rehearsed else step
    read = small.expert_bytes / disk
    wait, miss = waits(small.steps, step, read)
    drafts = statistics.median([s.drafting for s in ample.steps]) if ample.depth else 0.0
    return Costs(
        layers=layers,
        once=0.0,
        layer=step / layers,
        rehearsed=other / layers,
        readback=0.0,  # within `rehearsed`, which is measured whole
        drafts=drafts,
        expert=0.0,  # within `wait`
        wait=wait,
        miss=miss,
        read=read,
    )


def waits(steps: Sequence[Step], base: float, read: float) -> tuple[float, float]:
    """(seconds more of a layer that waits, of each absent expert besides `read`).

    base: seconds of a step without misses.
    """
    count = np.array([sum(m > 0 for m in s.missed) for s in steps], dtype=float)
    missed = np.array([sum(s.missed) for s in steps], dtype=float)
    over = np.array([s.seconds for s in steps]) - base - missed * read
    # without the odd step that something else on the machine disturbed
    off = np.abs(over - np.median(over))
    keep = off <= 4 * np.median(off)
    columns = np.stack([count, missed], axis=1)[keep]
    wait, miss = np.linalg.lstsq(columns, over[keep], rcond=None)[0]
    if wait < 0 or miss < 0:  # the two go together too closely to be told apart
        return max(0.0, float(over[keep].mean() / max(1.0, count[keep].mean()))), 0.0
    return float(wait), float(miss)


def fitted(costs: Costs, name: str, measured: float, simulated: Callable[[Costs], float]) -> Costs:
    """Costs whose `name` makes simulated(costs), tokens a second, what was `measured`."""

    def put(value: float) -> Costs:
        changed: dict[str, Any] = {name: value}
        return replace(costs, **changed)

    low, high = -costs.read, 4 * costs.read
    for _ in range(24):
        middle = (low + high) / 2
        faster = simulated(put(middle)) > measured
        low, high = (middle, high) if faster else (low, middle)
    return put((low + high) / 2)


def experts_of(path: Path, mtp: bool) -> int:
    """Experts that share the pool."""
    return open_model(path, mtp=mtp).experts
