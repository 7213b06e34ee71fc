"""kernels.linear against float64, with the extension, each instruction set, and without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kernels import backend
from kernels.linear import linear, reference

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(1, 32), (5, 96), (8, 64), (37, 192), (130, 1056), (13, 4224)]
FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
TYPES = (mx.float32, mx.bfloat16, mx.float16)
extension = pytest.mark.skipif(not backend.available(), reason="the extension is not in use")


def quantized(shape: tuple[int, ...], mode: str, bits: int, group: int, dtype: mx.Dtype, seed=0):
    """Weights of unlike scale by row, quantized, and the same as float64."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=shape) * rng.uniform(0.1, 4, size=(*shape[:-1], 1)) + 0.3
    parts = mx.quantize(
        mx.array(dense.astype(np.float32)).astype(dtype), group_size=group, bits=bits, mode=mode
    )
    w, scales, biases = parts[0], parts[1], parts[2] if len(parts) > 2 else None
    wide = [p if p is None or p.dtype == mx.uint8 else p.astype(mx.float32) for p in parts[1:]]
    exact = mx.dequantize(w, *wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    return (w, scales, biases), np.array(exact).astype(np.float64)


def close(y: mx.array, x: np.ndarray, w: np.ndarray, rtol: float = 1e-5) -> None:
    """Each value within `rtol` of the size of its own sum, as float64 has it."""
    x = x.astype(np.float64)
    size = np.maximum(np.abs(x @ w.T), np.sqrt((x**2) @ (w**2).T))
    assert np.all(np.abs(np.array(y).astype(np.float64) - x @ w.T) <= rtol * size)


def rows(M: int, K: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(M, K)).astype(np.float32)


def poison() -> None:
    """Freed buffers full of NaN, for outputs to be made in."""
    for size in (1, 37, 130, 1300, 4224):
        mx.eval(mx.full((size,), mx.nan))


@pytest.mark.parametrize("mode,bits,group", FORMATS)
def test_products_are_right_and_rows_are_alike_in_any_company(mode, bits, group) -> None:
    for (N, K), dtype in [(s, t) for s in SHAPES for t in TYPES]:
        if K % group or (mode != "affine" and dtype != mx.float32):
            continue
        weights, exact = quantized((N, K), mode, bits, group, dtype)
        x = rows(17, K)
        settings = {"group_size": group, "bits": bits, "mode": mode}
        poison()
        y = linear(mx.array(x), *weights, **settings)
        close(y, x, exact)
        for M in (1, 2, 3, 4, 5, 6, 7, 8, 11):
            poison()
            assert mx.array_equal(linear(mx.array(x[:M]), *weights, **settings), y[:M])


@extension
@pytest.mark.parametrize("mode,bits,group", [("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_every_code_of_minifloats_at_every_scale(mode, bits, group) -> None:
    """A row for each pair, full of one code: its sum is exact, or as MLX's no number."""
    codes = np.arange(256) if bits == 8 else np.arange(16) * 17
    bytes_ = np.repeat(codes.astype(np.uint8)[:, None], group * bits // 8, 1)
    w = mx.array(np.tile(bytes_, (256, 1)).view(np.uint32))
    s = mx.array(np.repeat(np.arange(256, dtype=np.uint8), len(codes))[:, None])
    exact = group * mx.dequantize(w, s, mode=mode, dtype=mx.float32)[:, 0]
    y = linear(mx.ones((1, group)), w, s, None, group_size=group, bits=bits, mode=mode)[0]
    assert mx.array_equal(y, exact, equal_nan=True)
    assert mx.isnan(y).any().item() and mx.isfinite(y).sum().item() > 0.9 * y.size


@extension
def test_every_code_of_mxfp4_at_every_scale() -> None:
    """As above; in fixed point a scale of 2^-127 by a unit of x is less than a float can be."""
    e = np.arange(2, 255, dtype=np.uint8)
    w = mx.array(np.tile(np.repeat(np.arange(16, dtype=np.uint32) * 0x11111111, 4), len(e)))
    w, s = w.reshape(-1, 4), mx.array(np.repeat(e, 16)[:, None])
    exact = 32 * mx.dequantize(w, s, mode="mxfp4", dtype=mx.float32)[:, 0]
    y = linear(mx.ones((1, 32)), w, s, None, group_size=32, bits=4, mode="mxfp4")[0]
    assert mx.array_equal(y, exact)


@extension
@pytest.mark.parametrize("mode,bits,group", FORMATS)
def test_x_with_a_mean(mode, bits, group) -> None:
    weights, exact = quantized((130, 8192), mode, bits, group, mx.float32)
    x = rows(8, 8192) + 1
    y = linear(mx.array(x), *weights, group_size=group, bits=bits, mode=mode)
    # AVX2 counts nibbles from zero: their sums are large and cancel at the end (docs/LOG.md)
    from_zero = backend.isa() in ("avx2", "avxvnni") and bits < 5 and mode == "affine"
    close(y, x, exact, rtol=3e-5 if from_zero else 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_dense_products(dtype: mx.Dtype) -> None:
    for N, K in [(1, 1), (3, 7), (19, 77), (64, 256), (130, 1500)]:
        w = mx.array(rows(N, K, 2)).astype(dtype)
        x = rows(9, K)
        y = linear(mx.array(x), w)
        close(y, x, np.array(w.astype(mx.float32)).astype(np.float64))
        if backend.available():
            assert all(mx.array_equal(linear(mx.array(x[:M]), w), y[:M]) for M in (1, 3, 8))


@extension
@pytest.mark.parametrize("bits,group", [f[1:] for f in FORMATS if f[0] == "affine"])
@pytest.mark.parametrize("dtype", TYPES[1:])
def test_narrow_scales_give_the_bits_of_widened_ones(bits, group, dtype) -> None:
    native = backend.native()
    for N, K in [(5, 128), (37, 384), (130, 1152)]:
        (w, s, b), _ = quantized((N, K), "affine", bits, group, dtype)
        wide = (w, s.astype(mx.float32), b.astype(mx.float32))
        form = {"group_size": group, "bits": bits, "mode": "affine"}
        for M in (1, 2, 3, 5, 8, 11):
            x = mx.array(rows(M, K))
            y = linear(x, *wide, **form)
            assert mx.array_equal(linear(x, w, s, b, **form), y)
            assert all(mx.array_equal(y, z) for z in native.linears(x, [(w, s, b), wide], **form))


def test_the_reference_is_the_same_product() -> None:
    weights, _ = quantized((37, 192), "affine", 4, 64, mx.bfloat16)
    x = mx.array(rows(5, 192))
    assert mx.allclose(linear(x, *weights), reference(x, *weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(192,), (2, 3, 192), (0, 192), (1, 40, 192)])
def test_leading_axes_and_any_strides(shape: tuple[int, ...]) -> None:
    weights, exact = quantized((37, 192), "affine", 4, 64, mx.float32)
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    y = linear(mx.array(x), *weights)
    assert y.shape == (*shape[:-1], 37)
    close(y.reshape(-1, 37), x.reshape(-1, 192), exact)
    strided = mx.array(np.ascontiguousarray(x.T)).T
    assert mx.array_equal(linear(strided, *weights), y)
    part = tuple(None if p is None else p[5:20] for p in weights)
    assert mx.array_equal(linear(mx.array(x), *part), y[..., 5:20])
    every = tuple(None if p is None else p[::2] for p in weights)
    assert mx.array_equal(linear(mx.array(x), *every), y[..., ::2])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_activations_are_summed_in_fp32(dtype: mx.Dtype) -> None:
    weights, exact = quantized((37, 4224), "affine", 4, 64, dtype)
    x = mx.array(rows(3, 4224)).astype(dtype)
    y = linear(x, *weights)
    assert y.dtype == dtype
    wide = np.array(x.astype(mx.float32))
    close(y.astype(mx.float32), wide, exact, rtol=2**-8 if dtype == mx.bfloat16 else 2**-11)


def test_not_numbers_stay_in_their_row() -> None:
    weights, _ = quantized((37, 192), "affine", 4, 64, mx.float32)
    x = rows(3, 192)
    clean = linear(mx.array(x), *weights)
    x[1, 7] = np.nan
    y = linear(mx.array(x), *weights)
    assert mx.all(mx.isnan(y[1])) and mx.array_equal(y[::2], clean[::2])


@pytest.mark.parametrize("bits", [4, 8])
def test_x_of_any_size(bits: int) -> None:
    weights, exact = quantized((37, 192), "affine", bits, 64, mx.float32)
    most = np.nextafter(np.float32(2), np.float32(0))
    x = rows(8, 192)
    x[0], x[1] = most, np.where(x[1] < 0, -most, most)
    x[2] *= np.float32(1e33)
    x[3] *= np.float32(1e-25)
    x[4] = 0
    x[5, ::7] *= 1e6
    x[6] *= np.exp2(np.arange(192) % 64 - 32).astype(np.float32)
    x[7] = np.float32(254 / 128)  # every digit at its end
    y = linear(mx.array(x), *weights, bits=bits)
    close(y, x, exact)
    assert not mx.any(y[4])


@extension
def test_what_does_not_fit_is_refused() -> None:
    (w, s, b), _ = quantized((8, 64), "affine", 4, 64, mx.float32)
    x = mx.zeros((1, 64))
    for arguments in [
        (mx.zeros((1, 128)), w, s, b), (x, w[:4], s, b), (x, w, s, b[:4]),
        (x, w, s, None), (x, w, s, b.astype(mx.float16)), (x, w.astype(mx.int32), s, b),
        (x, mx.zeros((8, 32))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="linear: "):
            linear(*arguments)
    with pytest.raises(ValueError):
        linear(x, w, s, b, group_size=48)


@extension
def test_thread_counts_change_no_bit() -> None:
    weights, _ = quantized((1300, 1056), "affine", 4, 32, mx.bfloat16)
    x = mx.array(rows(8, 1056))
    before = backend.threads()
    try:
        backend.set_threads(1)
        one = linear(x, *weights, group_size=32)
        mx.eval(one)
        for count in (2, 3, 5):
            backend.set_threads(count)
            assert backend.threads() == count
            for _ in range(20):
                assert mx.array_equal(linear(x, *weights, group_size=32), one)
    finally:
        backend.set_threads(before)


@extension
def test_it_is_lazy_and_compiles() -> None:
    weights, _ = quantized((37, 192), "affine", 4, 64, mx.float32)
    x = mx.array(rows(4, 192))
    layers = mx.compile(lambda x: mx.tanh(linear(mx.sin(x), *weights)) + 1)
    assert mx.allclose(layers(x), mx.tanh(linear(mx.sin(x), *weights)) + 1)
    assert mx.array_equal(layers(x), layers(x))


def rerun(**environment: str) -> None:
    if "KERNELS_RERUN" in os.environ:
        pytest.skip("already a rerun")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         *(str(Path(__file__).with_name(f"test_kernels_{part}.py"))
           for part in ("experts", "blocks", "segments", "fast"))],
        cwd=ROOT,
        env={**os.environ, **environment, "KERNELS_RERUN": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@extension
@pytest.mark.parametrize(
    "name",
    ["amx", "avx512vnni", "avx512", "avxvnni", "avx2", "i8mm", "dotprod", "neon", "portable"],
)
def test_other_instruction_sets(name: str) -> None:
    module = backend.native()
    if module is None or name not in module.isas():
        pytest.skip(f"no {name} here")
    rerun(STREAMER_ISA=name)


def test_without_the_extension() -> None:
    rerun(STREAMER_KERNELS="off")


def test_the_forced_instruction_set_is_the_one_in_use() -> None:
    wanted = os.environ.get("STREAMER_ISA")
    if os.environ.get("STREAMER_KERNELS") == "off":
        assert backend.isa() == "mlx" and not backend.available()
    elif wanted and backend.available():
        assert backend.isa() == wanted
