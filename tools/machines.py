"""Machines to simulate, and what a pass of a model costs on them.

A `Machine` is what is known of hardware before anything runs on it; `Costs` are seconds of one
model there. Of this machine costs are measured (`tools.calibrate`); of others they follow from
shapes, for memory-bound decoding: bytes of weights over memory bandwidth. What is assumed and
not published is in `ASSUMED`, and beside the machines.

    python -c "from tools.machines import MACHINES; print(*MACHINES.values(), sep='\\n')"
"""

from __future__ import annotations

import contextlib
import functools
import io
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from streamer.footprint import parse_size
from tools.make_checkpoint import skeleton
from tools.shapes import SHAPES

ASSUMED = {
    "share of the memory bandwidth that decoding reaches": 0.7,
    "seconds of a router's read-back": 250e-6,
    "more of a trunk's time for each further row": 0.08,
    "share of memory that a GPU may hold": 0.75,
    "bytes of runtime and workspace": 1 << 30,
    "bytes of KV cache and states": 1 << 30,
}


@dataclass(frozen=True)
class Machine:
    """memory: bytes; disk: bytes a second of its SSD at expert grain; latency: seconds until a
    read's first byte; bandwidth: bytes a second of memory; readback: seconds to read a router
    back; row: what a further row adds to the trunk's time, as a share."""

    name: str
    memory: int
    disk: float
    latency: float
    bandwidth: float
    readback: float = ASSUMED["seconds of a router's read-back"]
    row: float = ASSUMED["more of a trunk's time for each further row"]


# Where the numbers are from:
# - memory bandwidth: 614 GB/s of an M5 Max with 40 GPU cores (checked against Apple's pages in
#   Andyyyy64/whichllm #92; press reports of 3 March 2026), 100 of an M2 (a third party's report);
#   120 of an M4 is an assumption: no source was found;
# - SSD: 1.5 GB/s of an M2 Mac mini with 256 GB, as reported by carloslfu/slotstream #22 and #5.
#   Reads of an expert's size on an M5 Max gave 11.0 GB/s by one thread and 14.1 by nine
#   (antirez/ds4 #491), Apple says up to 14.5, a review of the 4 TB one measured 13.6: 12.5 lies
#   between. 2.4 GB/s of an M4 is an assumption: no source was found;
# - a read-back took 0.2 to 0.35 ms on an M4 (ml-explore/mlx-lm #1438), of which ASSUMED has .25
#   for all; latencies, the share of bandwidth reached and a row's cost are assumptions.
MACHINES = {
    "m2-16": Machine("M2, 16 GB", parse_size("16GB"), 1.5e9, 120e-6, 100e9),
    "m4-32": Machine("M4, 32 GB", parse_size("32GB"), 2.4e9, 100e-6, 120e9),
    "m5max-128": Machine("M5 Max, 128 GB", parse_size("128GB"), 12.5e9, 80e-6, 614e9),
}


@dataclass(frozen=True)
class Costs:
    """Seconds, of a pass over so many rows and the drafts before it.

    layers: those with experts; once: what a pass costs besides its layers; layer: a layer with
    all its experts at hand, its read-back included; rehearsed: a layer of a rehearsal, which has
    none; readback: the rehearsal's one; drafts: all drafts of a step; expert: computing one,
    while others are read; wait: more where a layer has to wait for reads; miss: more for each
    absent expert; read: of one expert's bytes from the disk; guess: more where it is read ahead.
    """

    layers: int
    once: float
    layer: float
    rehearsed: float
    readback: float
    drafts: float
    expert: float
    wait: float
    miss: float
    read: float
    guess: float = 0.0

    def stats(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Shape:
    """A published model at 4 bits: bytes of its trunk, of one expert and of all of them; layers
    with experts, experts in each, and how many a row asks for."""

    name: str
    trunk: int
    expert: int
    layers: int
    count: int
    top_k: int

    @property
    def experts(self) -> int:
        return self.layers * self.count


@functools.cache
def shape_of(name: str, bits: int = 4) -> Shape:
    """Sizes from mlx-lm's own model of that shape, whose parameters are never computed."""
    with contextlib.redirect_stdout(io.StringIO()):  # quantize_model says how many bits it made
        model, config = skeleton(SHAPES[name], bits, 64, "affine")
    part = config.get("text_config", config)
    experts, trunk, layers, count = 0, 0, set(), 0
    flat: Any = tree_flatten(model.parameters())
    for path, array in flat:
        if ".switch_mlp." in path:
            experts += array.nbytes
            layers.add(path.partition(".switch_mlp.")[0])
            count = array.shape[0]
        else:
            trunk += array.nbytes
    mx.clear_cache()
    each = experts // (len(layers) * count)
    return Shape(name, trunk, each, len(layers), count, part["num_experts_per_tok"])


def slots_on(shape: Shape, machine: Machine) -> int:
    """Experts that fit beside trunk, KV cache and runtime; 0 where even a row's do not."""
    room = machine.memory * ASSUMED["share of memory that a GPU may hold"] - shape.trunk
    room -= ASSUMED["bytes of runtime and workspace"] + ASSUMED["bytes of KV cache and states"]
    slots = min(shape.experts, int(room // shape.expert))
    return slots if slots >= shape.top_k else 0


def costs_on(
    shape: Shape, machine: Machine, rows: int, union: float, resident: bool = False
) -> Costs:
    """union: distinct experts that so many rows ask of a layer, over those of one.

    Drafting is counted as one layer with its experts at hand for each draft. resident: nothing
    pages, so that no router is read back and every executor is the same.
    """
    speed = machine.bandwidth * ASSUMED["share of the memory bandwidth that decoding reaches"]
    trunk = shape.trunk / speed * (1 + machine.row * (rows - 1))
    expert = shape.expert / speed
    layer = trunk / shape.layers + expert * shape.top_k * union
    one = shape.trunk / speed / shape.layers + expert * shape.top_k
    return Costs(
        layers=shape.layers,
        once=machine.readback if resident else 0.0,
        layer=layer if resident else layer + machine.readback,
        rehearsed=layer,
        readback=0.0 if resident else machine.readback,
        drafts=(rows - 1) * (one + machine.readback),
        expert=expert,
        wait=machine.latency,
        miss=0.0,
        read=shape.expert / machine.disk,
    )
