"""The routed experts of a model: what each is made of and where it lies on disk.

`find_experts(model)` walks a model that was loaded lazily under
`streamer.trace.tracing` and describes every `SwitchGLU` / `SwitchMLP` in it.
A layer's experts all have one `ExpertFormat`; layers of equal format share a
pool. Nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from .errors import LayoutError
from .held import Held
from .hub import called
from .trace import source_of


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert, e.g. `gate_proj.scales`.

    shape: of one expert's part; stored and held: dtype on disk and in the pool.
    Floating tensors may be held wider than stored (see `streamer.held`); packed
    weights never are.
    """

    projection: str
    kind: str
    shape: tuple[int, ...]
    stored: mx.Dtype
    held: mx.Dtype

    @property
    def stored_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.stored.size

    @property
    def held_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.held.size


ExpertFormat = tuple[ExpertTensor, ...]


def held_bytes(fmt: ExpertFormat) -> int:
    """Bytes of one expert in the pool."""
    return sum(t.held_bytes for t in fmt)


def stored_bytes(fmt: ExpertFormat) -> int:
    """Bytes of one expert on disk: what a miss reads."""
    return sum(t.stored_bytes for t in fmt)


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one MoE layer.

    path: module path in the model; switch: the module, whose parameters are
    still lazy; starts: for each tensor of the format the address of every
    expert's part, int64 `[experts]` (see `streamer.trace.FILE_SHIFT`).
    """

    path: str
    switch: nn.Module
    count: int
    format: ExpertFormat
    starts: tuple[np.ndarray, ...]


def is_switch(module: nn.Module) -> bool:
    return isinstance(module, (SwitchGLU, SwitchMLP))


def projections(switch: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The stacked linear layers of a switch: gate/up/down or fc1/fc2."""
    for name, child in switch.children().items():
        if isinstance(child, (SwitchLinear, QuantizedSwitchLinear)):
            yield name, child


def extras(switch: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of a switch that are not expert weights, e.g. muse_spark's post_expert_norm."""
    held = {name for name, _ in projections(switch)}
    for name, child in switch.children().items():
        if name not in held and isinstance(child, nn.Module) and name != "activation":
            yield name, child


def find_experts(model: nn.Module, path: Path, held: Held) -> list[LayerExperts]:
    """Every MoE layer of `model`, in layer order.

    held: the dtypes that they are held in.
    Raises LayoutError when a tensor cannot be paged from where it lies.
    """
    found = [_describe(p, m, path, held) for p, m in model.named_modules() if is_switch(m)]
    return sorted(found, key=lambda layer: _natural(layer.path))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


def _describe(path: str, switch: nn.Module, root: Path, held: Held) -> LayerExperts:
    tensors, starts, count = [], [], 0
    for projection, linear in projections(switch):
        for kind, array in linear.parameters().items():
            name = f"{path}.{projection}.{kind}"
            if not isinstance(array, mx.array):
                continue
            count = array.shape[0]
            source = source_of(array)
            if source is None:
                raise LayoutError(_refusal(root, f"{name} is not stored as it is used"))
            parts = source.expand(1)
            if parts.starts.ndim > 1:
                raise LayoutError(_refusal(root, f"the rows of {name} are scattered"))
            shape, stored = tuple(array.shape[1:]), array.dtype
            tensors.append(ExpertTensor(projection, kind, shape, stored, held(name, stored)))
            starts.append(parts.starts)
    return LayerExperts(path, switch, count, tuple(tensors), tuple(starts))


def _refusal(root: Path, what: str) -> str:
    name = called(root)
    # not into the hub's cache
    new = f"{name if name == str(root) else name.rpartition('/')[2]}-streamable"
    return (
        f"the experts of {name} cannot be paged in place ({what}); "
        f"convert it once: python -m streamer.convert {quote(str(root))} {quote(new)}"
    )
