"""The Metal kernels, run on the CPU by the harness, against float64: every format, ragged edges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_harness import emulator

from kernels.experts import Stack
from kernels.metal import check, delta, launch, products

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="there is no C++ compiler")
RNG = np.random.default_rng(3)


def emulated(
    name: str,
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    groups: tuple[int, int],
    threads: int,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """The launcher of these tests."""
    arguments = launch.arguments(inputs, template, groups, threads, outputs)
    return emulator.run(launch.built(name), inputs, arguments)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(RNG.normal(size=shape).astype(np.float32)).astype(dtype)


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def stack(
    *shape: int,
    bits: int = 4,
    group: int = 64,
    mode: str = "affine",
    dtype: mx.Dtype = mx.float32,
) -> tuple[Stack, np.ndarray]:
    """Random weights, quantized, and what they stand for."""
    packed = mx.quantize(normal(*shape, dtype=dtype), group_size=group, bits=bits, mode=mode)
    w, scales, biases = packed if mode == "affine" else (*packed, None)
    up = [None if a is None else a.astype(mx.float32) for a in (scales, biases)]
    if mode != "affine":
        up = [scales, None]
    exact = mx.dequantize(w, *up, group_size=group, bits=bits, mode=mode)
    return Stack(w, scales, biases, group_size=group, bits=bits, mode=mode), wide(exact)


def near(y: mx.array, wanted: np.ndarray, dtype: mx.Dtype) -> None:
    """Within fp32 sums' error, and one rounding where the type is a smaller one."""
    rtol = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert y.dtype == dtype and y.shape == wanted.shape
    np.testing.assert_allclose(wide(y), wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


LINEAR = [  # rows, N, K, bits, group, mode, scales, x
    (1, 37, 64, 4, 32, "affine", mx.float32, mx.float32),
    (2, 18, 320, 4, 64, "affine", mx.bfloat16, mx.float32),
    (3, 5, 384, 8, 128, "affine", mx.float16, mx.float16),
    (5, 33, 96, 3, 32, "affine", mx.bfloat16, mx.bfloat16),
    (8, 9, 192, 5, 64, "affine", mx.float32, mx.bfloat16),
    (16, 21, 128, 6, 32, "affine", mx.bfloat16, mx.float16),
    (4, 16, 256, 2, 64, "affine", mx.float32, mx.float32),
    (7, 11, 288, 4, 32, "mxfp4", mx.float32, mx.bfloat16),
]


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(case: tuple[Any, ...]) -> None:
    M, N, K, bits, group, mode, scales, dtype = case
    weights, exact = stack(N, K, bits=bits, group=group, mode=mode, dtype=scales)
    x = normal(M, K, dtype=dtype)
    assert products.fits(x, weights)
    near(products.linear(emulated, x, weights), wide(x) @ exact.T, dtype)


def test_a_row_gives_the_same_bits_with_any_rows() -> None:
    weights, _ = stack(19, 320)
    x = normal(16, 320)
    together = products.linear(emulated, x, weights)
    for rows in (x[:1], x[:5]):
        y = products.linear(emulated, rows, weights)
        assert mx.array_equal(y, together[: len(rows)])


GATHERED = [  # rows, k, N, K, bits, group, mode, scales, x
    (1, 2, 13, 64, 4, 32, "affine", mx.float32, mx.float32),
    (4, 3, 24, 192, 8, 64, "affine", mx.bfloat16, mx.bfloat16),
    (5, 4, 10, 64, 4, 32, "mxfp4", mx.float32, mx.float16),
]


def chosen(R: int, k: int, S: int) -> mx.array:
    """Distinct slots for each row, one shared by all, some absent, one beyond the pool."""
    slots = np.stack([RNG.permutation(np.arange(1, S))[:k] for _ in range(R)]).astype(np.int32)
    slots[:, 0] = 0
    slots[R // 2, k - 1] = -1
    if R > 2:
        slots[0, k - 1] = S
    return mx.array(slots)


def by_hand(x: np.ndarray, slots: np.ndarray, w: np.ndarray) -> np.ndarray:
    out = np.zeros((*slots.shape, w.shape[1]))
    for r, j in np.ndindex(*slots.shape):
        if 0 <= slots[r, j] < len(w):
            out[r, j] = w[slots[r, j]] @ (x[r] if x.ndim == 2 else x[r, j])
    return out


@pytest.mark.parametrize("case", GATHERED, ids=str)
def test_gathered(case: tuple[Any, ...]) -> None:
    R, k, N, K, bits, group, mode, scales, dtype = case
    weights, exact = stack(6, N, K, bits=bits, group=group, mode=mode, dtype=scales)
    slots = chosen(R, k, 6)
    x = normal(R, K, dtype=dtype)
    y = products.gather_linear(emulated, x, slots, weights)
    near(y, by_hand(wide(x), np.array(slots), exact), dtype)
    each = normal(R, k, K, dtype=dtype)
    y = products.gather_linear(emulated, each, slots, weights)
    near(y, by_hand(wide(each), np.array(slots), exact), dtype)


@pytest.mark.parametrize(("R", "k", "dtype"), [(1, 3, mx.float32), (4, 2, mx.bfloat16)], ids=str)
def test_swiglu(R: int, k: int, dtype: mx.Dtype) -> None:
    (gate, g), (up, u), (down, d) = (
        stack(5, *shape, group=32, dtype=mx.bfloat16) for shape in ((32, 64), (32, 64), (21, 32))
    )
    slots = chosen(R, k, 5)
    x = normal(R, 64, dtype=dtype)
    at = np.array(slots)
    a, b = (by_hand(wide(x), at, w) for w in (g, u))
    wanted = by_hand(a / (1 + np.exp(-a)) * b, at, d)
    near(products.gather_swiglu(emulated, x, slots, gate, up, down), wanted, dtype)


def test_more_than_sixteen_rows_choose_one_expert() -> None:
    weights, exact = stack(2, 6, 32, group=32)
    x = normal(35, 32)
    slots = mx.array([[r % 5 == 0] for r in range(35)]).astype(mx.int32)
    y = products.gather_linear(emulated, x, slots, weights)
    near(y, by_hand(wide(x), np.array(slots), exact), mx.float32)


def rule(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    beta: np.ndarray,
    state: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gated delta steps in float64, a head at a time."""
    y, d, S = np.zeros(v.shape), np.zeros(v.shape), state.copy()
    per = v.shape[2] // k.shape[2]
    for b, t, h in itertools.product(*map(range, v.shape[:3])):
        S[b, h] *= g[b, t, h]
        d[b, t, h] = beta[b, t, h] * (v[b, t, h] - S[b, h] @ k[b, t, h // per])
        S[b, h] += np.outer(d[b, t, h], k[b, t, h // per])
        y[b, t, h] = S[b, h] @ q[b, t, h // per]
    return y, S, d


def heads(B: int, T: int, dtype: mx.Dtype, vector: bool) -> list[mx.array]:
    """q, k, v, g, beta, state of 2 key heads of 64 and 4 value heads of 10."""
    q, k = (normal(B, T, 2, 64, dtype=dtype) / 8 for _ in range(2))
    g = mx.array(RNG.uniform(0.5, 1, (B, T, 4, 64) if vector else (B, T, 4)).astype(np.float32))
    beta = mx.array(RNG.uniform(0, 1, (B, T, 4)).astype(np.float32))
    return [q, k, normal(B, T, 4, 10, dtype=dtype), g, beta, normal(B, 4, 10, 64)]


@pytest.mark.parametrize(
    ("B", "T", "dtype", "vector"),
    [(1, 1, mx.float32, False), (2, 5, mx.bfloat16, False), (1, 3, mx.float32, True)],
    ids=str,
)
def test_delta(B: int, T: int, dtype: mx.Dtype, vector: bool) -> None:
    arrays = heads(B, T, dtype, vector)
    y, after, d = delta.steps(emulated, *arrays)
    wanted = rule(*map(wide, arrays))
    for got, exact, kind in zip(
        (y, after, d), wanted, (dtype, mx.float32, mx.float32), strict=True
    ):
        near(got, exact, kind)
    for got, exact in zip(delta.reference(*arrays), wanted, strict=True):
        near(got.astype(mx.float32), exact, mx.float32)


@pytest.mark.parametrize("vector", [False, True])
def test_a_replay_has_the_bits_of_the_steps(vector: bool) -> None:
    q, k, v, g, beta, state = heads(2, 4, mx.float32, vector)
    _, after, d = delta.steps(emulated, q, k, v, g, beta, state)
    for n in (1, 3, 4):
        replayed = delta.replay(emulated, k, g, d, state, n)
        rows = (a[:, :n] for a in (q, k, v, g, beta))
        assert mx.array_equal(replayed, delta.steps(emulated, *rows, state)[1])
    assert mx.array_equal(replayed, after)
    assert mx.array_equal(delta.replay(emulated, k, g, d, state, 0), state)


def test_what_no_kernel_knows_is_not_taken() -> None:
    weights, _ = stack(4, 64)
    assert products.fits(normal(1, 64), weights)
    assert not products.fits(normal(1, 64).astype(mx.int32), weights)
    assert not products.fits(normal(1, 64), Stack(normal(4, 64)))


def test_the_check_at_load_passes_right_kernels_and_drops_wrong_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "FORMATS", (("affine", 64, 4),))
    assert check.passing(emulated) == {"linear", "experts", "delta", "codes"}

    def wrong(name: str, *rest: Any) -> list[mx.array]:
        if name == "replay":
            raise RuntimeError("no such function\nand more")
        return [y * 1.01 if name == "linear" else y for y in emulated(name, *rest)]

    with pytest.warns(RuntimeWarning) as said:
        assert check.passing(wrong) == {"experts", "codes"}
    assert [str(w.message).split("'")[1] for w in said] == ["linear", "delta"]
    assert "no such function" in str(said[1].message)
