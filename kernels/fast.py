"""MLX's own functions, faster on the CPU: drop-in replacements that fall back to MLX's.

    with kernels.fast.installed():          # or install(), for good
        model(tokens)                       # any mlx-lm model, unchanged

Each takes over for float32 on the CPU where the extension has a kernel of that
shape, and hands everything else to the function it replaces, which is also its
reference. A row's result does not depend on how many rows come with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm.models.gated_delta as gated_delta

from kernels import backend

# What is replaced: (where, name). Looked up by MLX's layers and mlx-lm's models at each call.
_PLACES: tuple[tuple[Any, str], ...] = (
    (mx, "quantized_matmul"),
    (mx, "gather_qmm"),
    (mx, "conv1d"),
    (mx.fast, "rms_norm"),
    (mx.fast, "scaled_dot_product_attention"),
    (gated_delta, "gated_delta_ops"),
)
_mlx: dict[str, Callable[..., Any]] = {name: getattr(place, name) for place, name in _PLACES}
_KEY_WIDTHS = frozenset({16, 32, 64, 96, 128, 192, 256})  # of gated delta rules
_BITS = frozenset({2, 3, 4, 5, 6, 8})
_GROUPS = frozenset({32, 64, 128})


def install() -> bool:
    """Put the replacements in place for this process; False where there are none."""
    if not backend.available():
        return False
    for place, name in _PLACES:
        setattr(place, name, globals()[name])
    return True


def uninstall() -> None:
    """Put MLX's own functions back."""
    for place, name in _PLACES:
        setattr(place, name, _mlx[name])


@contextlib.contextmanager
def installed() -> Iterator[bool]:
    """`install()` for the length of a block, unless it was installed before."""
    before = [getattr(place, name) for place, name in _PLACES]
    try:
        yield install()
    finally:
        for (place, name), function in zip(_PLACES, before, strict=True):
            setattr(place, name, function)


def keeps_one_state(key_width: int) -> bool:
    """Whether a gated delta net with keys this wide runs without a state for every row."""
    return backend.available() and key_width in _KEY_WIDTHS


def _float32(*arrays: mx.array | None) -> bool:
    return all(a is None or a.dtype == mx.float32 for a in arrays)


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    **options: Any,
) -> mx.array:
    """x [..., K] times w [N, K] of affine or mxfp4 layout: [..., N]."""
    if (
        transpose
        and x.dtype == mx.float32
        and w.ndim == 2
        and not options
        and (form := _form(mode, group_size, bits))
    ):
        return backend.native().linear(  # type: ignore[union-attr]
            x, w, scales, biases, group_size=form[0], bits=form[1], mode=mode
        )
    return _mlx["quantized_matmul"](
        x,
        w,
        scales=scales,
        biases=biases,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=mode,
        **options,
    )


def _form(mode: str, group_size: int | None, bits: int | None) -> tuple[int, int] | None:
    """(group size, bits) where the kernels know the layout."""
    if mode == "mxfp4":
        return (32, 4)
    form = (group_size or 64, bits or 4)
    return form if mode == "affine" and form[0] in _GROUPS and form[1] in _BITS else None


def conv1d(
    x: mx.array,
    weight: mx.array,
    /,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    **options: Any,
) -> mx.array:
    """x [B, L, C], weight [C, taps, C / groups]; the kernel takes depthwise ones."""
    depthwise = groups == x.shape[-1] == weight.shape[0] and weight.shape[-1] == 1
    plain = (stride, padding, dilation) == (1, 0, 1) and not options
    if depthwise and plain and x.shape[1] >= weight.shape[1] and _float32(x, weight):
        return backend.native().depthwise_conv(x, weight)  # type: ignore[union-attr]
    return _mlx["conv1d"](x, weight, stride, padding, dilation, groups, **options)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    """x [..., n] * weight / sqrt(mean(x^2) + eps)."""
    if x.ndim and x.size and not options and _float32(x, weight):
        return backend.native().rms_norm(x, weight, eps=eps)  # type: ignore[union-attr]
    return _mlx["rms_norm"](x, weight, eps, **options)


def scaled_dot_product_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """q [B, H, T, D], k and v [B, Hk, S, D]; mask: None, 'causal', or [T, S] bool or additive."""
    causal = isinstance(mask, str)
    array = mask if isinstance(mask, mx.array) else None
    shared = array is None or array.size == q.shape[2] * k.shape[2]
    if shared and not options and _float32(q, k, v, sinks) and q.shape[2] <= k.shape[2]:
        bias = None
        if array is not None:
            bias = array.reshape(q.shape[2], k.shape[2])
            bias = mx.where(bias, 0.0, -mx.inf) if bias.dtype == mx.bool_ else bias
        if bias is None or bias.dtype == mx.float32:
            return backend.native().attention(  # type: ignore[union-attr]
                q, k, v, scale=scale, causal=causal, bias=bias, sinks=sinks
            )
    return _mlx["scaled_dot_product_attention"](
        q, k, v, scale=scale, mask=mask, sinks=sinks, **options
    )


def gated_delta_ops(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """mlx-lm's gated delta rule: (y [B, T, Hv, Dv], state [B, Hv, Dv, Dk])."""
    if state is None:
        state = mx.zeros((v.shape[0], *v.shape[2:], q.shape[-1]))
    known = mask is None and q.shape[-1] in _KEY_WIDTHS
    if known and _float32(q, k, v, g, beta, state):
        y, state, _ = backend.native().gated_delta(q, k, v, g, beta, state)  # type: ignore[union-attr]
        return y, state
    return _mlx["gated_delta_ops"](q, k, v, g, beta, state, mask)


def gather_qmm(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    **options: Any,
) -> mx.array:
    """x [..., k or 1, 1, K] times w[rhs_indices [..., k]], w [S, N, K]: [..., k, 1, N]."""
    form = _form(mode, group_size, bits)
    if (
        form
        and transpose
        and lhs_indices is None
        and rhs_indices is not None
        and x.dtype == mx.float32
        and x.shape[-2] == 1
        and _rows_of(x, rhs_indices)
    ):
        y = backend.native().gather_linear(  # type: ignore[union-attr]
            x.reshape(-1, x.shape[-1]),
            rhs_indices.reshape(-1).astype(mx.int32),
            (w, scales, biases),
            group_size=form[0],
            bits=form[1],
            mode=mode,
        )
        return y.reshape(*rhs_indices.shape, 1, y.shape[-1])
    return _mlx["gather_qmm"](
        x,
        w,
        scales=scales,
        biases=biases,
        lhs_indices=lhs_indices,
        rhs_indices=rhs_indices,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=mode,
        **options,
    )


def _rows_of(x: mx.array, indices: mx.array) -> bool:
    """Whether x [..., 1, K] has a row for each index, or one for all of the last axis."""
    lead = tuple(x.shape[:-2])
    return lead in (tuple(indices.shape), (*indices.shape[:-1], 1))
