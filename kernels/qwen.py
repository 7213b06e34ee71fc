"""Qwen3-Next's and Qwen3.5's layers in fewer operations: a half of a decoder layer in one.

Float32 on the CPU; what else comes (training, masks, padded batches, other activations) goes to
mlx-lm's own code, which is also the reference. Rows give the same bits whatever comes with them.

    python -m pytest tests/test_kernels_blocks.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache as memo
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache

from . import backend
from .routed import whole_moe
from .weights import MLXLM, float32, group, kept, parts, products

KEY_WIDTHS = frozenset({16, 32, 64, 96, 128, 192, 256})  # of gated delta rules


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


# Stands before the first halves of layers while whoever set it may run a layer twice.
keep_half: Callable[..., mx.array] | None = None


def layer(
    self: nn.Module, x: mx.array, mask: mx.array | None = None, cache: Any | None = None
) -> mx.array:
    """Qwen3.5's DecoderLayer, a half in one operation (three with attention): [B, T, D] alike."""
    if float32(self["input_layernorm"]["weight"]):
        x = x.astype(mx.float32)  # what adding to it would make of it
    if self.training or not x.size or x.ndim != 3 or not float32(x):
        return MLXLM["layer"](self, x, mask, cache)
    half = delta_half if self.is_linear else attention_half
    keep = keep_half
    h = half(self, x, mask, cache) if keep is None else keep(half, self, x, mask, cache)
    block, norm = self["mlp"], self["post_attention_layernorm"]
    if type(block) is qwen3_next.Qwen3NextSparseMoeBlock and block.sharding_group is None:
        whole = whole_moe(block, x.size // x.shape[-1], norm) if float32(norm["weight"]) else None
        if whole is not None:
            return whole(h)
    return h + block(norm(h))


def delta_half(self: nn.Module, x: mx.array, mask: mx.array | None, cache: Any) -> mx.array:
    """x + linear_attn(input_layernorm(x)) of a decoder layer."""
    net, norm = self["linear_attn"], self["input_layernorm"]
    plain = mask is None and cache is not None and cache.lengths is None
    known = plain and type(net) is qwen3_5.GatedDeltaNet and net.head_k_dim in KEY_WIDTHS
    whole = whole_delta(net, norm) if known and net.sharding_group is None else None
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


def whole_delta(net: nn.Module, norm: nn.Module) -> Any:
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

    return kept(net, own + parts(*ins, out), make)


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


def whole_attention(net: nn.Module, norm: nn.Module) -> Any:
    """A norm, gated attention and the sum with what came in, for a segment; or None.

    For an mlx-lm KVCache and a causal mask, or none where there is one row.
    """
    rope = net["rope"]
    if type(net) is not qwen3_next.Qwen3NextAttention or type(rope) is not nn.RoPE:
        return None
    ins, out = (net["q_proj"], net["k_proj"], net["v_proj"]), net["o_proj"]
    gains = net["q_norm"], net["k_norm"]
    own = [norm["weight"], *(gain["weight"] for gain in gains)]

    def make() -> Any:
        groups = group(*ins), group(out)
        if None in groups or not float32(*own):
            return None
        return backend.native().AttentionLayer(  # type: ignore[union-attr]
            (norm["weight"], norm.eps),
            groups[0],
            *((gain["weight"], gain.eps) for gain in gains),
            frequencies(rope.dims, rope.base),
            groups[1],
            traditional=rope.traditional,
            rope_scale=rope.scale,
            scale=net.scale,
            heads=net.num_attention_heads,
            key_heads=net.num_key_value_heads,
        )

    return kept(net, own + parts(*ins, out), make)


@memo
def frequencies(dims: int, base: float | None) -> mx.array:
    """Angles per position [dims / 2], rounded as MLX rounds them."""
    half = dims // 2
    found = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base or 1) / half))
    mx.eval(found)
    return found
