"""Gated delta steps on the GPU, with a tape from which any number of them can be kept.

The tape is the steps' own k and g and what the kernel returns besides: d = beta * (v - S k), what
each step added along k. `replay` repeats the updates with the same roundings, so the state that it
gives after n rows has the bits that n steps alone give. Key widths are multiples of 32.

    python -m pytest tests/test_metal_kernels.py
"""

from __future__ import annotations

import mlx.core as mx

from .launch import Launch

SIMDGROUPS = 4


def fits(k: mx.array) -> bool:
    """Whether the kernels know keys [B, T, Hk, Dk] of this width."""
    return k.shape[-1] % 32 == 0 and k.shape[-1] <= 256


def steps(
    launch: Launch,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], g [B, T, Hv] or [B, T, Hv, Dk], beta [B, T, Hv],
    state [B, Hv, Dv, Dk]: y [B, T, Hv, Dv] in q's dtype, the state after, and d [B, T, Hv, Dv];
    both float32.
    """
    B, T, Hk, Dk = k.shape
    Hv, Dv = v.shape[-2:]
    y, after, d = launch(
        "delta",
        [q, k, v, g, beta, state.astype(mx.float32), mx.array([T], mx.int32)],
        [
            ("T", q.dtype),
            *(("HK", Hk), ("HV", Hv), ("DK", Dk), ("DV", Dv)),
            *(("VECTOR", int(g.ndim == 4)), ("SIMDGROUPS", SIMDGROUPS)),
        ],
        (-(-Dv // SIMDGROUPS), B * Hv),
        32 * SIMDGROUPS,
        [(v.shape, q.dtype), (state.shape, mx.float32), (v.shape, mx.float32)],
    )
    return y, after, d


def replay(
    launch: Launch, k: mx.array, g: mx.array, d: mx.array, state: mx.array, keep: int
) -> mx.array:
    """The state [B, Hv, Dv, Dk], float32, after the first `keep` rows of a tape begun at `state`.

    k, g and state as they went into `steps`, d as it came out; keep is 0 to T.
    """
    B, T, Hk, Dk = k.shape
    Hv, Dv = d.shape[-2:]
    if keep == 0:
        return state.astype(mx.float32)
    (after,) = launch(
        "replay",
        [k, g, d, state.astype(mx.float32), mx.array([T, keep], mx.int32)],
        [
            *(("HK", Hk), ("HV", Hv), ("DK", Dk), ("DV", Dv)),
            *(("VECTOR", int(g.ndim == 4)), ("SIMDGROUPS", SIMDGROUPS)),
        ],
        (-(-Dv // SIMDGROUPS), B * Hv),
        32 * SIMDGROUPS,
        [(state.shape, mx.float32)],
    )
    return after


def reference(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """`steps` by MLX alone."""
    repeats = v.shape[-2] // k.shape[-2]
    q, k = (mx.repeat(a.astype(mx.float32), repeats, axis=2) for a in (q, k))
    state = state.astype(mx.float32)
    decay = g[..., None, None] if g.ndim == 3 else g[..., None, :]
    ys, ds = [], []
    for t in range(k.shape[1]):
        state = state * decay[:, t]
        memory = (state * k[:, t, :, None, :]).sum(-1)
        ds.append((v[:, t] - memory) * beta[:, t, :, None])
        state = state + k[:, t, :, None, :] * ds[-1][..., None]
        ys.append((state * q[:, t, :, None, :]).sum(-1))
    return mx.stack(ys, 1), state, mx.stack(ds, 1)
