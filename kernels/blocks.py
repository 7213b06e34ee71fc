"""mlx-lm's layers in fewer operations: what stands between the products of a block, in one each.

`places` lists what `kernels.fast` puts in: dense linears, routed experts and SwiGLU of every
family, of Qwen3-Next and Qwen3.5 also the gated delta layer and the block of experts. Float32 on
the CPU; what else comes (training, masks, padded batches, other activations) goes to mlx-lm's own
code, which is also the reference. Rows give the same bits whatever comes with them.

    python -m pytest tests/test_kernels_blocks.py
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, gated_delta, qwen3_5, qwen3_next, switch_layers
from mlx_lm.models.cache import ArraysCache

from . import backend

MLXLM = {
    "linear": nn.Linear.__call__,
    "swiglu": activations.swiglu,
    "gated_delta_update": gated_delta.gated_delta_update,
    "switch": switch_layers.SwitchGLU.__call__,
    "mlp": qwen3_next.Qwen3NextMLP.__call__,
    "moe": qwen3_next.Qwen3NextSparseMoeBlock.__call__,
    "norm": qwen3_next.Qwen3NextRMSNormGated.__call__,
    "delta": qwen3_5.GatedDeltaNet.__call__,
}
FUSED_FLOATS = 1 << 18  # of what gate and up give: more is left to products one after another
KEY_WIDTHS = frozenset({16, 32, 64, 96, 128, 192, 256})  # of gated delta rules
BITS = frozenset({2, 3, 4, 5, 6, 8})
GROUPS = frozenset({32, 64, 128})

Arrays = tuple[mx.array, mx.array, mx.array | None]
Form = tuple[int, int, str]  # group size, bits, mode


def places() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of all that is replaced, in the modules loaded so far."""
    found: list[tuple[Any, str, Any]] = [
        (nn.Linear, "__call__", linear),
        (switch_layers.SwitchGLU, "__call__", switch),
        (qwen3_next.Qwen3NextMLP, "__call__", mlp),
        (qwen3_next.Qwen3NextSparseMoeBlock, "__call__", moe),
        (qwen3_next.Qwen3NextRMSNormGated, "__call__", norm),
        (qwen3_5.GatedDeltaNet, "__call__", delta),
    ]
    # Families import these two by name.
    by_name = {"swiglu": swiglu, "gated_delta_update": gated_delta_update}
    for path, module in list(sys.modules.items()):
        if path.startswith("mlx_lm.models."):
            for name, function in by_name.items():
                if vars(module).get(name) in (MLXLM[name], function):
                    found.append((module, name, function))
    return found


def float32(*arrays: mx.array | None) -> bool:
    """Whether all are float32 (or not there)."""
    for a in arrays:  # noqa: SIM110 - a generator takes twice as long, for every operation
        if a is not None and a.dtype != mx.float32:
            return False
    return True


def form_of(mode: str, group_size: int | None, bits: int | None) -> Form | None:
    """(group size, bits, mode) where the kernels know the layout."""
    if mode == "mxfp4":
        return (32, 4, mode)
    group_size, bits = group_size or 64, bits or 4
    known = mode == "affine" and group_size in GROUPS and bits in BITS
    return (group_size, bits, mode) if known else None


def alike(*layers: nn.Module) -> Form | None:
    """The form of quantized layers without biases, if all have the same one."""
    first = layers[0]
    if "scales" not in first:
        return None
    mode, group_size, bits = first.mode, first.group_size, first.bits
    for layer in layers:
        if "scales" not in layer or "bias" in layer or "global_scale" in layer:
            return None
        if layer.bits != bits or layer.group_size != group_size or layer.mode != mode:
            return None
    return form_of(mode, group_size, bits)


def arrays(layer: nn.Module) -> Arrays:
    """What a product reads of a quantized layer."""
    return layer["weight"], layer["scales"], layer.get("biases")


def products(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """layer(x) for each, in one operation where they are quantized alike."""
    form = alike(*layers)
    if form is None:
        return [layer(x) for layer in layers]
    return backend.native().linears(  # type: ignore[union-attr,no-any-return]
        x, [arrays(layer) for layer in layers], group_size=form[0], bits=form[1], mode=form[2]
    )


def linear(self: nn.Module, x: mx.array) -> mx.array:
    """A dense nn.Linear: x [..., K] -> [..., N]."""
    weight = self["weight"]
    if self.training or not x.size or not x.ndim or not float32(x, weight):
        return MLXLM["linear"](self, x)
    y = backend.native().linear(x, weight)  # type: ignore[union-attr]
    return y + self["bias"] if "bias" in self else y


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    if gate.shape == x.shape and gate.size and float32(gate, x):
        return backend.native().swiglu(gate, x)  # type: ignore[union-attr,no-any-return]
    return MLXLM["swiglu"](gate, x)


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
    groups = _groups(self, x.size // x.shape[-1])
    if groups is not None:
        return native.moe(x, *groups, k=self.top_k, normalize=self.norm_topk_prob)
    logits, opening = products(x, self.gate, self.shared_expert_gate)
    chosen, scores = native.route(logits, k=self.top_k, normalize=self.norm_topk_prob)
    y = self.switch_mlp(x, chosen)
    return native.combine(y, scores, self.shared_expert(x), opening)


def _groups(self: nn.Module, rows: int) -> list[tuple[Any, ...]] | None:
    """Weights and form of the routers, experts and shared expert, if one operation takes them all.

    Not where experts are paged: what was chosen is read back there.
    """
    # Items, not attributes: a module looks attributes up in Python.
    switch, shared = self["switch_mlp"], self["shared_expert"]
    if type(switch) is not switch_layers.SwitchGLU or type(shared) is not qwen3_next.Qwen3NextMLP:
        return None
    if type(switch.activation) is not switch_layers.SwiGLU:
        return None
    groups: list[tuple[Any, ...]] = []
    for layers in (
        (self["gate"], self["shared_expert_gate"]),
        (switch["gate_proj"], switch["up_proj"], switch["down_proj"]),
        (shared["gate_proj"], shared["up_proj"], shared["down_proj"]),
    ):
        form = alike(*layers)
        if form is None:
            return None
        groups.append(([arrays(layer) for layer in layers], *form))
    experts, shared_width = (layer["gate_proj"]["weight"].shape[-2] for layer in (switch, shared))
    width = self.top_k * experts + shared_width
    return groups if 0 < rows * width <= FUSED_FLOATS else None


def norm(self: nn.Module, hidden_states: mx.array, gate: mx.array | None = None) -> mx.array:
    """Qwen3NextRMSNormGated: rms_norm(hidden_states) * silu(gate)."""
    x = hidden_states
    if gate is None or gate.shape != x.shape or not x.size or not float32(x, gate, self.weight):
        return MLXLM["norm"](self, hidden_states, gate)
    return backend.native().gated_norm(x, gate, self.weight, eps=self.eps)  # type: ignore[union-attr]


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """mlx-lm's gated delta rule from its projections: (y [B, T, Hv, Dv], state)."""
    if state is None:
        state = mx.zeros((v.shape[0], *v.shape[2:], q.shape[-1]))
    plain = mask is None and lower_bound is None and not allow_neg_eigval
    known = a.ndim == 3 and A_log.ndim == 1 and q.shape[-1] in KEY_WIDTHS
    if plain and known and use_kernel and float32(q, k, v, a, b, A_log, dt_bias, state):
        return backend.native().delta_update(q, k, v, a, b, A_log, dt_bias, state)  # type: ignore[union-attr,return-value]
    return MLXLM["gated_delta_update"](
        q, k, v, a, b, A_log, dt_bias, state, mask,
        use_kernel=use_kernel, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip


def delta(
    self: nn.Module, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None
) -> mx.array:
    """Qwen3.5's GatedDeltaNet: inputs [B, T, D] -> [B, T, D]."""
    plain = mask is None and cache is not None and cache.lengths is None and not self.training
    known = plain and self.head_k_dim in KEY_WIDTHS and self.sharding_group is None
    taps = self["conv1d"]["weight"]
    if not known or not inputs.size or not float32(inputs, taps):
        return MLXLM["delta"](self, inputs, mask, cache)
    assert cache is not None
    native = backend.native()
    assert native is not None
    B, T, _ = inputs.shape
    qkv, z, b, a = products(
        inputs, self["in_proj_qkv"], self["in_proj_z"], self["in_proj_b"], self["in_proj_a"]
    )
    before = cache[0]
    if before is None:
        before = mx.zeros((B, self.conv_kernel_size - 1, self.conv_dim))
    if type(cache) is not ArraysCache:
        # One that keeps a tape finds the window by the call of the convolution.
        self.conv1d(mx.concatenate([before, qkv], axis=1))
    q, k, v, cache[0] = native.delta_inputs(
        qkv,
        before,
        taps,
        key_heads=self.num_k_heads,
        key_width=self.head_k_dim,
        value_heads=self.num_v_heads,
        eps=1e-6,
    )
    # Looked up where mlx-lm does, for those who replace it there.
    out, cache[1] = qwen3_5.gated_delta_update(
        q, k, v, a, b, self["A_log"], self["dt_bias"], cache[1], None
    )
    cache.advance(T)
    out = self["norm"](out, z.reshape(out.shape))
    return self["out_proj"](out.reshape(B, T, -1))
