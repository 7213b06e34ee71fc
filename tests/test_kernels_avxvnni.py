"""The products with AVX-VNNI on any CPU with AVX2: its two instructions are emulated, exactly.

The kernel's own source is compiled with STREAMER_EMULATE_VNNI beside AVX2's. To run all else so,
build the extension with CXXFLAGS=-DSTREAMER_EMULATE_VNNI and set STREAMER_ISA=avxvnni.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_kernels_linear import close, quantized, rows

from kernels import backend

CPU = Path(__file__).resolve().parents[1] / "kernels" / "cpu"
HARNESS = """
#include <cstdlib>
#include "rows.h"
using namespace streamer;

namespace streamer {
const Rows& rows_avx2() { // of formats that are not tested here
  static const Rows none{};
  return none;
}
}

static float* room(int64_t floats) {
  return static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
}

extern "C" void multiply(
    int vnni, int bits, int group, int half, int levels, int N, int K, int M, const void* w,
    const void* scales, const void* biases, const float* x, float* y, int begin, int end) {
  const Rows& kernel = vnni ? *rows_avxvnni() : rows_maddubs();
  const Scale scale = half ? Scale::f16 : Scale::f32;
  Matrix A{w, scales, biases, N, K, bits, group, Format::affine, scale};
  if (levels) A.levels = true, A.biases = nullptr;
  const float* from[max_rows];
  float* to[max_rows];
  for (int m = 0; m < M; ++m) from[m] = x + int64_t(m) * K, to[m] = y + int64_t(m) * N;
  float *packed = room(kernel.packed(A, M)), *scratch = room(kernel.scratch(A));
  kernel.pack(A, M, from, packed);
  kernel.run(A, M, packed, scratch, to, begin, end);
  std::free(packed);
  std::free(scratch);
}
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    module = backend.native()
    if platform.machine() != "x86_64" or module is None or "avx2" not in module.isas():
        pytest.skip("no AVX2 here")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler")
    folder = tmp_path_factory.mktemp("avxvnni")
    (folder / "harness.cpp").write_text(HARNESS)
    sources = [folder / "harness.cpp", CPU / "rows_avxvnni.cpp", CPU / "rows_maddubs.cpp"]
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-ffp-contract=off", "-DSTREAMER_EMULATE_VNNI"]
    flags += ["-mavx2", "-mfma", "-mf16c", "-mbmi2", f"-I{CPU}"]
    made = folder / "harness.so"
    subprocess.run([compiler, *flags, "-shared", *sources, "-o", made], check=True)
    return ctypes.CDLL(str(made))


def multiply(
    harness: ctypes.CDLL,
    isa: str,
    bits: int,
    group: int,
    weights: tuple[Any, ...],
    x: np.ndarray,
    begin: int = 0,
    end: int | None = None,
    levels: bool = False,
) -> np.ndarray:
    """Outputs [begin, end) of rows x times the weights, of mxfp4's levels or not; NaN elsewhere."""
    w, scales, biases = (np.array(part) for part in weights)
    x, (M, K), N = np.ascontiguousarray(x), x.shape, w.shape[0]
    y = np.full((M, N), np.nan, np.float32)
    arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (w, scales, biases, x, y)]
    half, stop = int(scales.dtype == np.float16), N if end is None else end
    numbers = (int(isa == "avxvnni"), bits, group, half, int(levels), N, K, M)
    harness.multiply(*numbers, *arrays, begin, stop)
    return y


SHAPES = [(1, 32), (5, 96), (8, 64), (37, 192), (130, 1056), (13, 4224)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_right_and_alike_in_any_company(
    bits: int, group: int, dtype: mx.Dtype, harness: ctypes.CDLL
) -> None:
    for N, K in [(n, k) for n, k in SHAPES if k % group == 0]:
        weights, exact = quantized((N, K), "affine", bits, group, dtype)
        x = rows(8, K)
        x[5, ::7] *= 1e6
        x[6] *= np.exp2(np.arange(K) % 64 - 32).astype(np.float32)
        x[7] = np.float32(254 / 128)  # every digit at its end
        y = multiply(harness, "avxvnni", bits, group, weights, x)
        close(mx.array(y), x, exact)
        for M in range(1, 8):
            assert np.array_equal(multiply(harness, "avxvnni", bits, group, weights, x[:M]), y[:M])
        part = multiply(harness, "avxvnni", bits, group, weights, x, N // 3, N - N // 4)
        assert np.array_equal(part[:, N // 3 : N - N // 4], y[:, N // 3 : N - N // 4])
        assert np.isnan(part[:, : N // 3]).all() and np.isnan(part[:, N - N // 4 :]).all()
        if bits == 4:
            assert np.array_equal(multiply(harness, "avx2", bits, group, weights, x), y)


def test_levels_of_mxfp4(harness: ctypes.CDLL) -> None:
    for N, K in SHAPES:
        (w, exponents, _), exact = quantized((N, K), "mxfp4", 4, 32, mx.float32)
        scales = np.exp2(np.array(exponents).astype(np.float32) - 128)
        weights = (w, scales, scales)
        x = rows(8, K)
        x[7] = np.float32(254 / 128)  # every digit at its end
        y = multiply(harness, "avxvnni", 4, 32, weights, x, levels=True)
        close(mx.array(y), x, exact)
        assert np.array_equal(multiply(harness, "avx2", 4, 32, weights, x, levels=True), y)
        assert np.array_equal(multiply(harness, "avx2", 4, 32, weights, x[:1], levels=True), y[:1])


def test_not_numbers_stay_in_their_row(harness: ctypes.CDLL) -> None:
    for bits in (4, 8):
        weights, _ = quantized((37, 192), "affine", bits, 64, mx.float32)
        x = rows(3, 192)
        clean = multiply(harness, "avxvnni", bits, 64, weights, x)
        x[1, 7] = np.nan
        y = multiply(harness, "avxvnni", bits, 64, weights, x)
        assert np.isnan(y[1]).all() and np.array_equal(y[::2], clean[::2])


def test_it_is_offered_where_the_cpu_has_it() -> None:
    module, listed = backend.native(), Path("/proc/cpuinfo")
    if module is None or platform.machine() != "x86_64" or not listed.exists():
        pytest.skip("not to be told here")
    if "avxvnni" in module.isas():
        assert "avx_vnni" in listed.read_text().split()
        assert module.isas().index("avxvnni") < module.isas().index("avx2")
