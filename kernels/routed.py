"""Blocks of routed experts in one operation each: SwitchGLU's experts, and Qwen's whole block.

python -m pytest tests/test_kernels_blocks.py
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_next, switch_layers

from . import backend
from .weights import MLXLM, alike, arrays, float32, group, kept, parts, products

FUSED_FLOATS = 1 << 18  # of what gate and up give: more is left to products one after another


def fused(x: mx.array, slots: mx.array | None, layers: tuple[nn.Module, ...]) -> mx.array | None:
    """down(swiglu(gate(x), up(x))) of the experts in `slots`, or None where there is no kernel.

    x [..., D] and slots [..., k], zeros where one is -1: [..., k, D]. Without slots the layers'
    weights have two axes: [..., D].
    """
    gate, up, down = layers
    form = alike(gate, up, down)
    pairs = x.size // x.shape[-1] if slots is None else slots.size
    wide = pairs * gate["weight"].shape[-2] > FUSED_FLOATS
    if form is None or not pairs or wide or not float32(x):
        return None
    return backend.native().gather_swiglu(  # type: ignore[union-attr,no-any-return]
        x,
        slots,
        arrays(gate),
        arrays(up),
        arrays(down),
        group_size=form[0],
        bits=form[1],
        mode=form[2],
    )


def switch(self: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
    """SwitchGLU: x [..., D], indices [..., k] -> [..., k, D]."""
    if type(self.activation) is switch_layers.SwiGLU:
        y = fused(x, indices, (self["gate_proj"], self["up_proj"], self["down_proj"]))
        if y is not None:
            return y
    return MLXLM["switch"](self, x, indices)


def mlp(self: nn.Module, x: mx.array) -> mx.array:
    """Qwen3NextMLP: x [..., D] -> [..., D]."""
    y = fused(x, None, (self["gate_proj"], self["up_proj"], self["down_proj"]))
    return MLXLM["mlp"](self, x) if y is None else y


def moe(self: nn.Module, x: mx.array) -> mx.array:
    """Qwen3NextSparseMoeBlock: x [..., D] -> [..., D]."""
    if self.sharding_group is not None or not float32(x) or not x.size:
        return MLXLM["moe"](self, x)
    native = backend.native()
    assert native is not None
    whole = whole_moe(self, x.size // x.shape[-1], None)
    if whole is not None:
        return whole(x)
    logits, opening = products(x, self.gate, self.shared_expert_gate)
    chosen, scores = native.route(logits, k=self.top_k, normalize=self.norm_topk_prob)
    y = self.switch_mlp(x, chosen)
    return native.combine(y, scores, self.shared_expert(x), opening)


Layers = tuple[tuple[nn.Module, ...], ...]


def _layers_of(self: nn.Module, switch: nn.Module) -> Layers | None:
    """Routers, the experts of `switch` and the shared one, None where they are of other kinds."""
    # Items, not attributes: a module looks attributes up in Python.
    shared = self["shared_expert"]
    if type(switch) is not switch_layers.SwitchGLU or type(shared) is not qwen3_next.Qwen3NextMLP:
        return None
    if type(switch.activation) is not switch_layers.SwiGLU:
        return None
    return (
        (self["gate"], self["shared_expert_gate"]),
        (switch["gate_proj"], switch["up_proj"], switch["down_proj"]),
        (shared["gate_proj"], shared["up_proj"], shared["down_proj"]),
    )


def fused_width(self: nn.Module) -> int:
    """What gate and up give for a row: of its experts and the shared one."""
    # Not the stacks' own weights: a paged switch has none.
    experts = self["switch_mlp"]
    inner = getattr(experts, "pager", None)
    gate = (experts if inner is None else inner.switch)["gate_proj"]
    shared = self["shared_expert"]["gate_proj"]
    return int(self.top_k * gate["weight"].shape[-2] + shared["weight"].shape[-2])


def _made(kind: Any, self: nn.Module, layers: Layers, norm: nn.Module | None) -> Any:
    groups = [group(*some) for some in layers]
    if None in groups:
        return None
    before = None if norm is None else (norm["weight"], norm.eps)
    wide = layers[1][2]["weight"].shape[-2]
    return kind(wide, *groups, k=self.top_k, normalize=self.norm_topk_prob, norm=before)


def whole_moe(self: nn.Module, rows: int, norm: nn.Module | None) -> Any:
    """A block of experts as one op, with the norm before it and the sum after it if given.

    None where experts are paged, as what was chosen is read back there, or without a kernel.
    """
    layers = _layers_of(self, self["switch_mlp"])
    if layers is None:
        return None
    if not 0 < rows * fused_width(self) <= FUSED_FLOATS:
        return None
    key = parts(*layers[0], *layers[1], *layers[2])
    if norm is not None:
        key.append(norm["weight"])
    native = backend.native()
    assert native is not None
    # By its norm where there is one: the same block has both forms.
    owner = self if norm is None else norm
    return kept(owner, key, lambda: _made(native.Moe, self, layers, norm))


def paged_moe(self: nn.Module, switch: nn.Module, norm: nn.Module) -> Any:
    """The halves of a block whose experts lie in the slots of `switch`, for segments; or None."""
    layers = _layers_of(self, switch)
    native = backend.native()
    assert native is not None
    return None if layers is None else _made(native.PagedMoe, self, layers, norm)
