"""Tries each kernel on this GPU against plain MLX; one that differs is dropped, with a warning.

Kernels are compiled by the user's own driver, for a GPU that no test of ours has seen. `passing`
names those that may run here; kernels.gpu asks it, when a model is loaded.

    python -m kernels.gpu
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from kernels.codes import CodedSide
from kernels.experts import Stack, gather_reference, swiglu_reference
from kernels.linear import reference

from . import codes, delta, products
from .launch import Launch

Pair = tuple[mx.array, mx.array]
Format = tuple[str, int, int]  # mode, group size, bits
FORMATS: tuple[Format, ...] = (
    ("affine", 64, 4),
    ("affine", 32, 8),
    ("affine", 128, 6),
    ("mxfp4", 32, 4),
)


def on_cpu(fallback: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What the fallback makes of it where MLX knows every format: not so on every GPU."""
    with mx.stream(mx.cpu):
        return fallback(*arguments, **named)


def stack(mode: str, group: int, bits: int, *shape: int) -> Stack:
    """Random weights of that format, with bf16 scales where they are floats."""
    weights = mx.random.normal(shape).astype(mx.bfloat16)
    packed = mx.quantize(weights, group_size=group, bits=bits, mode=mode, stream=mx.cpu)
    biases = packed[2] if mode == "affine" else None
    return Stack(packed[0], packed[1], biases, group_size=group, bits=bits, mode=mode)


def linear_reference(x: mx.array, stack: Stack) -> mx.array:
    """products.linear by MLX alone."""
    w, scales, biases = stack.arrays
    form = {"group_size": stack.group_size, "bits": stack.bits}
    return reference(x, w, scales, biases, **form, mode=stack.mode)


def linears(launch: Launch, formats: Iterable[Format] = FORMATS) -> Iterable[Pair]:
    """Products of 1, 3 and 16 rows, and what MLX makes of them."""
    for mode, group, bits in formats:
        weights = stack(mode, group, bits, 75, 384)
        for M in (1, 3, 16):
            x = mx.random.normal((M, 384))
            yield (
                products.linear(launch, x, weights),
                on_cpu(linear_reference, x, weights),
            )


def experts(launch: Launch, formats: Iterable[Format] = FORMATS) -> Iterable[Pair]:
    """Gathered products and SwiGLU over 5 slots, some absent."""
    slots = mx.array([[0, 3], [3, -1], [4, 0], [1, 3]])
    for mode, group, bits in formats:
        gate, up = (stack(mode, group, bits, 5, 128, 256) for _ in range(2))
        down = stack(mode, group, bits, 5, 75, 128)
        x = mx.random.normal((4, 256))
        yield (
            products.gather_linear(launch, x, slots, up),
            on_cpu(gather_reference, x, slots, up),
        )
        yield (
            products.gather_swiglu(launch, x, slots, gate, up, down),
            on_cpu(swiglu_reference, x, slots, gate, up, down),
        )


def deltas(launch: Launch, formats: Iterable[Format] = FORMATS) -> Iterable[Pair]:
    """Five steps of two heads, and replays of three and of all five."""
    q, k = (mx.random.normal((1, 5, 2, 128)) / 128**0.5 for _ in range(2))
    v, state = mx.random.normal((1, 5, 4, 30)), mx.random.normal((1, 4, 30, 128))
    g, beta = mx.random.uniform(0.5, 1, (1, 5, 4)), mx.random.uniform(0, 1, (1, 5, 4))
    y, after, d = delta.steps(launch, q, k, v, g, beta, state)
    yield from zip((y, after, d), on_cpu(delta.reference, q, k, v, g, beta, state), strict=True)
    yield delta.replay(launch, k, g, d, state, 5), after
    first = (a[:, :3] for a in (q, k, v, g, beta))
    yield delta.replay(launch, k, g, d, state, 3), on_cpu(delta.reference, *first, state)[1]


def coded_side(bits: int, channels: int, D: int, tokens: int = 310) -> CodedSide:
    """Random codes of two heads of D channels, in indices of so many bits, each for `channels`."""
    none = mx.zeros((1, 2, 0, 1))
    words = mx.random.randint(0, 256, (1, 2, tokens, -(-(D // channels * bits) // 32) * 4))
    words = words.astype(mx.uint8).view(mx.uint32)
    scales = mx.random.uniform(0.5, 1, (1, 2, tokens, 1)).astype(mx.float16)
    points = mx.random.normal((1 << bits, channels))
    return CodedSide(none, none, words, scales, none, none, points, mx.zeros((1, 2, 1, D)))


def over_codes(launch: Launch, formats: Iterable[Format] = FORMATS) -> Iterable[Pair]:
    """Sums over 300 codes and over 100, tops and totals, for 1 and 12 rows a head."""
    for width, rows, coded in ((4, 1, 300), (5, 12, 300), (7, 12, 100), (8, 1, 300)):
        keys, values = coded_side(width, 2, 128), coded_side(8, 1, 96)
        rotated, bias = mx.random.normal((1, 2, rows, 128)) / 8, mx.random.normal((rows, coded))
        form: dict[str, Any] = {"rows": rows, "coded": coded, "bias": bias}
        found = codes.over_codes(launch, rotated, keys, values, **form)
        wanted = on_cpu(codes.reference, rotated, keys, values, **form)
        yield from zip(found, wanted, strict=True)


CHECKS: dict[str, Callable[..., Iterable[Pair]]] = {
    "linear": linears,
    "experts": experts,
    "delta": deltas,
    "codes": over_codes,
}


def error(pairs: Iterable[Pair]) -> float:
    """The largest difference, relative to the largest value; infinite where one isn't finite."""
    worst = 0.0
    for got, wanted in pairs:
        scale = mx.abs(wanted).max().item() or 1.0
        off = mx.abs(got.astype(mx.float32) - wanted).max().item()
        assert isinstance(off, float) and isinstance(scale, float)
        worst = max(worst, off / scale) if off == off else float("inf")
    return worst


def passing(
    launch: Launch,
    names: Iterable[str] = CHECKS,
    formats: Iterable[Format] = FORMATS,
    tolerance: float = 1e-4,
) -> frozenset[str]:
    """The checks within `tolerance` of the fallback on the CPU; warns of the others.

    formats: of weights, that products are tried with.
    """
    good = set()
    for name in names:
        try:
            off = error(CHECKS[name](launch, formats))
            why = f"its results are off by {off:.1e}"
        except (RuntimeError, ValueError) as failed:
            off, why = float("inf"), (str(failed).strip().splitlines() or ["unknown error"])[0]
        if off <= tolerance:
            good.add(name)
        else:
            warnings.warn(
                f"The GPU kernel '{name}' is off, MLX's own runs instead: {why}.",
                RuntimeWarning,
                stacklevel=2,
            )
    return frozenset(good)
