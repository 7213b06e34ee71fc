"""kernels.experts against float64: unions, absent slots, every format."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_kernels_linear import FORMATS, TYPES, quantized, rows

from kernels import backend
from kernels.experts import Stack, gather_linear, gather_swiglu

S = 6
extension = pytest.mark.skipif(not backend.available(), reason="the extension is not in use")


def stack(N: int, K: int, mode: str, bits: int, group: int, dtype: mx.Dtype, seed: int):
    (w, scales, biases), exact = quantized((S, N, K), mode, bits, group, dtype, seed)
    return Stack(w, scales, biases, group_size=group, bits=bits, mode=mode), exact


def chosen(R: int, k: int, seed: int = 5) -> np.ndarray:
    """Slots of R rows, some absent, some shared by many rows, one never chosen."""
    slots = np.random.default_rng(seed).integers(-1, S - 1, size=(R, k)).astype(np.int32)
    slots[R // 2 :, 0] = 2
    return slots


def by_hand(x: np.ndarray, slots: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Products in float64; x [R, K] or [R, k, K]."""
    out = np.zeros((*slots.shape, w.shape[1]))
    for r, k in np.ndindex(*slots.shape):
        if slots[r, k] >= 0:
            out[r, k] = w[slots[r, k]] @ (x[r] if x.ndim == 2 else x[r, k]).astype(np.float64)
    return out


def near(y: mx.array, wanted: np.ndarray, rtol: float = 1e-5) -> None:
    assert np.abs(np.array(y) - wanted).max() <= rtol * np.abs(wanted).max()


@pytest.mark.parametrize("mode,bits,group", FORMATS)
def test_gathered_products(mode: str, bits: int, group: int) -> None:
    for dtype in TYPES if mode == "affine" else (mx.float32,):
        weights, exact = stack(37, 256, mode, bits, group, dtype, 3)
        x, slots = rows(11, 256), chosen(11, 3)
        y = gather_linear(mx.array(x), mx.array(slots), weights)
        near(y, by_hand(x, slots, exact))
        paired = np.random.default_rng(2).normal(size=(11, 3, 256)).astype(np.float32)
        near(
            gather_linear(mx.array(paired), mx.array(slots), weights), by_hand(paired, slots, exact)
        )
        assert not np.array(y)[slots < 0].any()


def widened(narrow: Stack) -> Stack:
    """The same experts with float32 scales and biases."""
    assert narrow.scales is not None and narrow.biases is not None
    wide = [part.astype(mx.float32) for part in (narrow.scales, narrow.biases)]
    return dataclasses.replace(narrow, scales=wide[0], biases=wide[1])


@extension
@pytest.mark.parametrize("bits,group", [f[1:] for f in FORMATS if f[0] == "affine"])
@pytest.mark.parametrize("dtype", TYPES[1:])
def test_narrow_scales_give_the_bits_of_widened_ones(bits: int, group: int, dtype: Any) -> None:
    gate, up = (stack(128, 256, "affine", bits, group, dtype, seed)[0] for seed in (1, 2))
    down = stack(96, 128, "affine", bits, group, dtype, 3)[0]
    for R in (1, 3, 9):
        x, slots = mx.array(rows(R, 256)), mx.array(chosen(R, 3))
        wide = gather_linear(x, slots, widened(gate))
        assert mx.array_equal(gather_linear(x, slots, gate), wide)
        wide = gather_swiglu(x, slots, *map(widened, (gate, up, down)))
        assert mx.array_equal(gather_swiglu(x, slots, gate, up, down), wide)


def test_a_pair_is_alike_in_any_company() -> None:
    weights, _ = stack(37, 256, "affine", 4, 64, mx.bfloat16, 3)
    x, slots = mx.array(rows(20, 256)), mx.array(chosen(20, 4))
    whole = gather_linear(x, slots, weights)
    for R in (1, 2, 7, 9):
        assert mx.array_equal(gather_linear(x[:R], slots[:R], weights), whole[:R])


def test_dense_stacks_and_biases() -> None:
    w, bias = rows(S * 37, 100, 4).reshape(S, 37, 100), rows(S, 37, 6)
    x, slots = rows(5, 100), chosen(5, 2)
    y = gather_linear(mx.array(x), mx.array(slots), Stack(mx.array(w), bias=mx.array(bias)))
    wanted = by_hand(x, slots, w.astype(np.float64))
    near(y, np.where(slots[..., None] >= 0, wanted + bias[np.maximum(slots, 0)], 0))


@pytest.mark.parametrize("R", [1, 2, 4, 8, 21])
@pytest.mark.parametrize("bits", [4, 8])
def test_swiglu_experts(R: int, bits: int) -> None:
    gate, g = stack(96, 128, "affine", bits, 32, mx.bfloat16, 1)
    up, u = stack(96, 128, "affine", bits, 32, mx.bfloat16, 2)
    down, d = stack(128, 96, "affine", bits, 32, mx.bfloat16, 3)
    x, slots = rows(R, 128) / 8, chosen(R, 4)
    y = gather_swiglu(mx.array(x), mx.array(slots), gate, up, down)
    raised = by_hand(x, slots, g)
    hidden = raised / (1 + np.exp(-raised)) * by_hand(x, slots, u)
    near(y, by_hand(hidden, slots, d))
    if backend.available():
        again = gather_swiglu(mx.array(x[-1:]), mx.array(slots[-1:]), gate, up, down)
        assert mx.array_equal(again, y[-1:])


@extension
def test_silu_over_its_whole_range() -> None:
    x = np.concatenate([np.linspace(-120, 120, 4801), [0.0, -0.0, 1e-30, 1e10]]).astype(np.float32)
    one = Stack(mx.ones((1, 1, 1)))
    y = np.array(
        gather_swiglu(mx.array(x[:, None]), mx.zeros((x.size, 1), mx.int32), one, one, one)
    )
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = wide / (1 + np.exp(-wide)) * wide
    assert np.all(np.abs(y[:, 0, 0] - wanted) <= 1e-6 * np.abs(wanted) + 1e-30)


def test_absent_everywhere_and_no_rows() -> None:
    gate, _ = stack(64, 64, "affine", 4, 64, mx.float32, 1)
    none = mx.full((3, 2), -1)
    assert not mx.any(gather_swiglu(mx.array(rows(3, 64)), none, gate, gate, gate))
    empty = gather_linear(mx.zeros((0, 64)), mx.zeros((0, 2), mx.int32), gate)
    assert empty.shape == (0, 2, 64)
