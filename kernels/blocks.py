"""mlx-lm's layers in fewer operations: what stands between the products of a block, in one each.

`places` lists what `kernels.fast` puts in: dense linears, routed experts and SwiGLU of every
family, of Qwen3-Next and Qwen3.5 also the gated delta layer and the block of experts. Float32 on
the CPU; what else comes (training, masks, padded batches, other activations) goes to mlx-lm's own
code, which is also the reference. Rows give the same bits whatever comes with them.

    python -m pytest tests/test_kernels_blocks.py
"""

from __future__ import annotations

import math
import operator
import sys
import weakref
from collections.abc import Callable
from functools import cache as memo
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
    "layer": qwen3_5.DecoderLayer.__call__,
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
        (qwen3_5.DecoderLayer, "__call__", layer),
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
    whole = _whole(self, x.size // x.shape[-1], None)
    if whole is not None:
        return whole(x)
    logits, opening = products(x, self.gate, self.shared_expert_gate)
    chosen, scores = native.route(logits, k=self.top_k, normalize=self.norm_topk_prob)
    y = self.switch_mlp(x, chosen)
    return native.combine(y, scores, self.shared_expert(x), opening)


def group(*layers: nn.Module) -> tuple[Any, ...] | None:
    """Weights of layers that are quantized alike, and their form, as one argument of an op."""
    form = alike(*layers)
    return None if form is None else ([arrays(layer) for layer in layers], *form)


# Ops with their weights bound, by the module they are made of; each with the arrays it has.
_kept: dict[int, tuple[weakref.ref[Any], list[Any], Any]] = {}


def kept(owner: nn.Module, key: list[Any], make: Callable[[], Any]) -> Any:
    """make(), or what it gave for this module while the arrays in `key` were the same ones.

    An op whose weights have yet to be evaluated is not kept: it would hold what they come from.
    """
    found = _kept.get(id(owner))
    if found is not None and len(found[1]) == len(key) and all(map(operator.is_, found[1], key)):
        return found[2]
    op = make()
    if op is not None and op.kept:
        number = id(owner)
        _kept[number] = (weakref.ref(owner, lambda _: _kept.pop(number, None)), key, op)
    return op


def _parts(*layers: nn.Module) -> list[Any]:
    """All arrays of layers: an op made of the same ones is the same op."""
    found: list[Any] = []
    for layer in layers:
        found += (layer["weight"], layer.get("scales"), layer.get("biases"))
    return found


def _whole(self: nn.Module, rows: int, norm: nn.Module | None) -> Any:
    """A block of experts as one op, with the norm before it and the sum after it if given.

    None where experts are paged, as what was chosen is read back there, or without a kernel.
    """
    # Items, not attributes: a module looks attributes up in Python.
    switch, shared = self["switch_mlp"], self["shared_expert"]
    if type(switch) is not switch_layers.SwitchGLU or type(shared) is not qwen3_next.Qwen3NextMLP:
        return None
    if type(switch.activation) is not switch_layers.SwiGLU:
        return None
    parts = (
        (self["gate"], self["shared_expert_gate"]),
        (switch["gate_proj"], switch["up_proj"], switch["down_proj"]),
        (shared["gate_proj"], shared["up_proj"], shared["down_proj"]),
    )
    width = self.top_k * parts[1][0]["weight"].shape[-2] + parts[2][0]["weight"].shape[-2]
    if not 0 < rows * width <= FUSED_FLOATS:
        return None
    key = _parts(*parts[0], *parts[1], *parts[2])
    if norm is not None:
        key.append(norm["weight"])

    def make() -> Any:
        groups = [group(*layers) for layers in parts]
        if None in groups:
            return None
        before = None if norm is None else (norm["weight"], norm.eps)
        wide = parts[1][2]["weight"].shape[-2]
        return backend.native().Moe(  # type: ignore[union-attr]
            wide, *groups, k=self.top_k, normalize=self.norm_topk_prob, norm=before
        )

    # By its norm where there is one: the same block has both forms.
    return kept(self if norm is None else norm, key, make)


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
    if _told is not None and _told[0] is q:
        return _told[1:]
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


_told: tuple[mx.array, mx.array, mx.array] | None = None  # q, y and state of a rule that has run


def layer(
    self: nn.Module, x: mx.array, mask: mx.array | None = None, cache: Any | None = None
) -> mx.array:
    """Qwen3.5's DecoderLayer, a half in one operation (three with attention): [B, T, D] alike."""
    if self.training or not x.size or x.ndim != 3 or not float32(x):
        return MLXLM["layer"](self, x, mask, cache)
    half = delta_half if self.is_linear else attention_half
    h = half(self, x, mask, cache)
    block, norm = self["mlp"], self["post_attention_layernorm"]
    if type(block) is qwen3_next.Qwen3NextSparseMoeBlock and block.sharding_group is None:
        whole = _whole(block, x.size // x.shape[-1], norm) if float32(norm["weight"]) else None
        if whole is not None:
            return whole(h)
    return h + block(norm(h))


def delta_half(self: nn.Module, x: mx.array, mask: mx.array | None, cache: Any) -> mx.array:
    """x + linear_attn(input_layernorm(x)) of a decoder layer."""
    net, norm = self["linear_attn"], self["input_layernorm"]
    plain = mask is None and cache is not None and cache.lengths is None
    known = plain and type(net) is qwen3_5.GatedDeltaNet and net.head_k_dim in KEY_WIDTHS
    whole = _whole_delta(net, norm) if known and net.sharding_group is None else None
    if whole is None:
        return x + net(norm(x), mask, cache)
    global _told
    B, T, _ = x.shape
    before, state = cache[0], cache[1]
    if before is None:
        before = mx.zeros((B, net.conv_kernel_size - 1, net.conv_dim))
    if state is None:
        state = mx.zeros((B, net.num_v_heads, net.head_v_dim, net.head_k_dim))
    # Whoever keeps a tape watches the cache, the convolution and the rule: see mtp/rollback.
    taped = type(cache) is not ArraysCache or qwen3_5.gated_delta_update is not gated_delta_update
    h, after, moved, *tape = whole(x, before, state, taped)
    if taped:
        q, k, v, a, b, qkv = tape
        net["conv1d"](mx.concatenate([before, qkv], axis=1))
        _told = q, v, moved
        try:
            _, moved = qwen3_5.gated_delta_update(
                q, k, v, a, b, net["A_log"], net["dt_bias"], state, None
            )
        finally:
            _told = None
    cache[0], cache[1] = after, moved
    cache.advance(T)
    return h


def _whole_delta(net: nn.Module, norm: nn.Module) -> Any:
    """A norm, a gated delta net and the sum with what came in, as one op; None without a kernel."""
    ins = net["in_proj_qkv"], net["in_proj_z"], net["in_proj_b"], net["in_proj_a"]
    out, taps, gain = net["out_proj"], net["conv1d"]["weight"], net["norm"]
    own = [norm["weight"], taps, net["A_log"], net["dt_bias"], gain["weight"]]

    def make() -> Any:
        groups = group(*ins), group(out)
        if None in groups or not float32(*own):
            return None
        return backend.native().DeltaLayer(  # type: ignore[union-attr]
            (norm["weight"], norm.eps),
            *groups,
            taps,
            net["A_log"],
            net["dt_bias"],
            (gain["weight"], gain.eps),
            key_heads=net.num_k_heads,
            key_width=net.head_k_dim,
            value_heads=net.num_v_heads,
        )

    return kept(net, own + _parts(*ins, out), make)


def attention_half(self: nn.Module, x: mx.array, mask: Any, cache: Any) -> mx.array:
    """x + self_attn(input_layernorm(x)) of a decoder layer."""
    net, norm = self["self_attn"], self["input_layernorm"]
    rope = net["rope"]
    ins = outs = None
    if type(net) is qwen3_next.Qwen3NextAttention and type(rope) is nn.RoPE and cache is not None:
        ins = group(net["q_proj"], net["k_proj"], net["v_proj"])
        outs = group(net["o_proj"])
    gains = net["q_norm"], net["k_norm"]
    known = ins is not None and outs is not None and type(cache.offset) is int
    if not known or not float32(norm["weight"], gains[0]["weight"], gains[1]["weight"]):
        return x + net(norm(x), mask, cache)
    native = backend.native()
    assert native is not None
    queries, keys, values, gates = native.attention_inputs(
        x,
        (norm["weight"], norm.eps),
        ins,
        *((gain["weight"], gain.eps) for gain in gains),
        frequencies(rope.dims, rope.base),
        traditional=rope.traditional,
        scale=rope.scale,
        offset=cache.offset,
        heads=net.num_attention_heads,
        key_heads=net.num_key_value_heads,
    )
    keys, values = cache.update_and_fetch(keys, values)
    y = qwen3_next.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=net.scale, mask=mask
    )
    return native.attention_output(x, y, gates, outs)


@memo
def frequencies(dims: int, base: float | None) -> mx.array:
    """Angles per position [dims / 2], rounded as MLX rounds them."""
    half = dims // 2
    found = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base or 1) / half))
    mx.eval(found)
    return found
