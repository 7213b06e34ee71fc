"""MLX's own functions, faster on the CPU: drop-in replacements that fall back to MLX's.

    with kernels.fast.installed():          # or install(), for good
        model(tokens)                       # any mlx-lm model, unchanged

Each takes over for float32 on the CPU where the extension has a kernel of that
shape, and hands everything else to the function it replaces, which is also its
reference. A row's result does not depend on how many rows come with it. Whole
layers of mlx-lm's, in fewer operations, are put in with them: see `kernels.blocks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import mlx_lm.models.gated_delta as gated_delta

from kernels import backend, blocks, latent
from kernels.query_blocks import by_blocks
from kernels.qwen import KEY_WIDTHS, frequencies
from kernels.weights import float32, form_of

# What is replaced: (where, name). Looked up by MLX's layers and mlx-lm's models at each call.
_LONG: tuple[tuple[Any, str], ...] = ((mx.fast, "scaled_dot_product_attention"),)
_PLACES: tuple[tuple[Any, str], ...] = (
    *_LONG,
    (mx, "quantized_matmul"),
    (mx, "gather_qmm"),
    (mx, "dequantize"),
    (mx, "conv1d"),
    (mx, "logsumexp"),
    (mx.fast, "rms_norm"),
    (mx.fast, "rope"),
    (gated_delta, "gated_delta_ops"),
)
_mlx: dict[str, Callable[..., Any]] = {name: getattr(place, name) for place, name in _PLACES}
_replaced: list[tuple[Any, str, Any]] = []  # (where, name, what was there), in order


def install() -> bool:
    """Put the replacements in place for this process; False where the extension does not run.

    Then only attention of long prompts and latent attention are others: see `kernels.query_blocks`
    and `kernels.latent`. Call it once the model's modules are loaded; again, it takes in those
    loaded since.
    """
    works = backend.available()
    wanted = [(place, name, globals()[name]) for place, name in (_PLACES if works else _LONG)]
    for place, name, function in [*wanted, *latent.places(), *(blocks.places() if works else [])]:
        before = vars(place)[name]
        if before is not function:
            _replaced.append((place, name, before))
            setattr(place, name, function)
    return works


def uninstall() -> None:
    """Put back what was there."""
    _restore(0)


def _restore(count: int) -> None:
    while len(_replaced) > count:
        place, name, function = _replaced.pop()
        setattr(place, name, function)


@contextlib.contextmanager
def installed() -> Iterator[bool]:
    """`install()` for the length of a block, unless it was installed before."""
    before = len(_replaced)
    try:
        yield install()
    finally:
        _restore(before)


def keeps_one_state(key_width: int) -> bool:
    """Whether a gated delta net with keys this wide runs without a state for every row."""
    return backend.available() and key_width in KEY_WIDTHS


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
    """x [..., K] times w [N, K] of a layout that the kernels know: [..., N]; or [..., H, M, K]
    times [H, N, K]."""
    if (
        transpose
        and x.dtype == mx.float32
        and not options
        and (form := form_of(mode, group_size, bits))
    ):
        if w.ndim == 2:
            return backend.native().linear(  # type: ignore[union-attr]
                x, w, scales, biases, group_size=form[0], bits=form[1], mode=mode
            )
        if w.ndim == 3 and x.ndim >= 3 and x.shape[-3] == w.shape[0] and x.size:
            y = backend.native().gather_linear(  # type: ignore[union-attr]
                x.reshape(-1, x.shape[-1]), _heads(x.shape[:-1]), (w, scales, biases),
                group_size=form[0], bits=form[1], mode=mode,
            )  # fmt: skip
            return y.reshape(*x.shape[:-1], w.shape[1])
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


@lru_cache(maxsize=16)
def _heads(shape: tuple[int, ...]) -> mx.array:
    """Of rows [..., H, M] in a row, which head's each is."""
    return mx.broadcast_to(mx.arange(shape[-2], dtype=mx.int32)[:, None], shape).reshape(-1)


def dequantize(
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    **options: Any,
) -> mx.array:
    """Affine weights [..., K * bits / 32] with scales and biases in float32: [..., K]."""
    form = form_of(mode, group_size, bits)
    plain = biases is not None and not any(option is not None for option in options.values())
    if form and mode == "affine" and plain and w.size and float32(scales, biases):
        return backend.native().dequantize(  # type: ignore[union-attr]
            w, scales, biases, group_size=form[0], bits=form[1]
        )
    return _mlx["dequantize"](
        w, scales, biases, group_size=group_size, bits=bits, mode=mode, **options
    )


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
    if depthwise and plain and x.shape[1] >= weight.shape[1] and float32(x, weight):
        return backend.native().depthwise_conv(x, weight)  # type: ignore[union-attr]
    return _mlx["conv1d"](x, weight, stride, padding, dilation, groups, **options)


def logsumexp(
    a: mx.array, /, axis: int | Sequence[int] | None = None, keepdims: bool = False, **options: Any
) -> mx.array:
    """Of a [..., n] over one axis; the kernel takes the last."""
    last = a.ndim > 0 and (axis == -1 or axis == a.ndim - 1)
    if last and a.size and not options and float32(a):
        return backend.native().logsumexp(a, keepdims)  # type: ignore[union-attr]
    return _mlx["logsumexp"](a, axis, keepdims, **options)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    """x [..., n] * weight / sqrt(mean(x^2) + eps)."""
    if x.ndim and x.size and not options and float32(x, weight):
        return backend.native().rms_norm(x, weight, eps=eps)  # type: ignore[union-attr]
    return _mlx["rms_norm"](x, weight, eps, **options)


def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """x [..., L, D] with its first `dims` rotated by positions offset, offset + 1..."""
    if isinstance(offset, int) and not options and x.size and float32(x, freqs):
        inverse = frequencies(dims, base) if freqs is None else mx.reciprocal(freqs)
        return backend.native().rope(  # type: ignore[union-attr]
            x, inverse, traditional=traditional, scale=scale, offset=offset
        )
    return _mlx["rope"](
        x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs,
        **options,
    )  # fmt: skip


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
    """q [B, H, T, D], k and v [B, Hk, S, D]; mask: None, 'causal', or bool or additive, [T, S] or
    [B, H, T, S]."""
    if isinstance(k, latent.Heads):
        again = partial(scaled_dot_product_attention, sinks=sinks)
        return latent.attend(again, q, k, v, scale=scale, mask=mask, **options)  # type: ignore[arg-type]
    causal = isinstance(mask, str)
    array = mask if isinstance(mask, mx.array) else None
    shared = array is None or array.size == q.shape[2] * k.shape[2]
    own = array is not None and array.shape == (*q.shape[:3], k.shape[2])
    fits = (shared or own) and not options and q.shape[2] <= k.shape[2]
    if fits and float32(q, k, v, sinks) and backend.available():
        bias = None
        if array is not None:
            bias = array.reshape(q.shape[2], k.shape[2]) if shared else array
            bias = mx.where(bias, 0.0, -mx.inf) if bias.dtype == mx.bool_ else bias
        if bias is None or bias.dtype == mx.float32:
            return backend.native().attention(  # type: ignore[union-attr]
                q, k, v, scale=scale, causal=causal, bias=bias, sinks=sinks
            )
    mlx = _mlx["scaled_dot_product_attention"]
    return by_blocks(mlx, q, k, v, scale=scale, mask=mask, sinks=sinks, **options)


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
    known = mask is None and q.shape[-1] in KEY_WIDTHS
    if known and float32(q, k, v, g, beta, state):
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
    form = form_of(mode, group_size, bits)
    if (
        form
        and transpose
        and lhs_indices is None
        and rhs_indices is not None
        and options.get("global_scale") is None
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
