"""The harness that runs Metal kernels on the CPU: right kernels run, planted mistakes don't."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_harness import emulator

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="there is no C++ compiler")

REVERSE = """
    threadgroup float kept[64];
    uint i = thread_position_in_threadgroup.x;
    uint base = threadgroup_position_in_grid.x * 64;
    kept[i] = x[base + i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[base + i] = kept[63 - i];
"""


def run(body: str, x: mx.array, threads: int = 64, **options: Any) -> mx.array:
    """One output like x, or as options say, from a kernel of x."""
    built = mx.fast.metal_kernel(
        name="tried", input_names=["x"], output_names=["y"], source=body, header=""
    )
    arguments = {
        "grid": (x.size, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
        **options,
    }
    return emulator.run(built, [x], arguments)[0]


def test_threads_meet_at_a_barrier() -> None:
    x = mx.arange(128, dtype=mx.float32)
    y = run(REVERSE, x)
    assert y.tolist() == x.reshape(2, 64)[:, ::-1].reshape(-1).tolist()


def test_lanes_exchange() -> None:
    x = mx.random.normal((64,))
    y = run(
        """
        uint i = thread_position_in_grid.x;
        y[i] = simd_sum(x[i]) + simd_max(x[i]) + simd_shuffle_xor(x[i], 1)
             + simd_shuffle(x[i], 5);
        """,
        x,
    )
    lanes = np.array(x).reshape(2, 32)
    wanted = lanes.sum(1, keepdims=True) + lanes.max(1, keepdims=True) + lanes[:, 5:6]
    wanted = wanted + lanes.reshape(2, 16, 2)[:, :, ::-1].reshape(2, 32)
    np.testing.assert_allclose(np.array(y).reshape(2, 32), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_floats_round_as_mlx_does(dtype: mx.Dtype) -> None:
    x = mx.random.normal((64,)).astype(dtype)
    y = run("uint i = thread_position_in_grid.x; y[i] = T(float(x[i]) * 1.7f);", x,
            template=[("T", dtype)])  # fmt: skip
    assert mx.array_equal(y, (x.astype(mx.float32) * 1.7).astype(dtype))


def test_a_small_input_lies_in_constant_memory() -> None:
    y = run("y[thread_position_in_grid.x] = x[1];", mx.array([1.0, 2.0]), 32,
            grid=(32, 1, 1), output_shapes=[(32,)])  # fmt: skip
    assert y.tolist() == [2.0] * 32


MISTAKES = {
    "a missing barrier": (
        REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
        "read before it is written",
    ),
    "a race on memory that was written before": (
        REVERSE.replace("y[base", "kept[i] = 1.0f; y[base"),
        "race: threadgroup kept[",
    ),
    "two writers of threadgroup memory": (REVERSE.replace("kept[i] =", "kept[0] ="), "race"),
    "a read of threadgroup memory that nobody wrote": (
        REVERSE.replace("kept[i] = x[base + i];", ""),
        "read before it is written",
    ),
    "threadgroup memory out of bounds": (REVERSE.replace("63 - i", "64 - i"), "out of bounds"),
    "an input out of bounds": ("y[thread_position_in_grid.x] = "
                               "x[thread_position_in_grid.x + 1];", "x[128] is out of bounds"),
    "an output out of bounds": ("y[thread_position_in_grid.x + 1] = 0.0f;",
                                "y[128] is out of bounds"),
    "a negative index": ("y[thread_position_in_grid.x] = "
                         "x[int(thread_position_in_grid.x) - 1];", "x[-1] is out of bounds"),
    "two writers of an output": ("y[thread_position_in_grid.x / 2] = 0.0f;",
                                 "belongs to another thread"),
    "an output left out": ("uint i = thread_position_in_grid.x; if (i != 70) y[i] = 0.0f;",
                           "y[70] was never written"),
    "a barrier not met by all": (
        "if (thread_position_in_threadgroup.x < 40) threadgroup_barrier(mem_flags::mem_none);"
        "y[thread_position_in_grid.x] = 0.0f;",
        "divergent barrier",
    ),
    "two barriers taken for one": (
        """
        if (thread_position_in_threadgroup.x < 32) {
          threadgroup_barrier(mem_flags::mem_none);
        } else {
          threadgroup_barrier(mem_flags::mem_none);
        }
        y[thread_position_in_grid.x] = 0.0f;
        """,
        "divergent barrier",
    ),
    "a sum that some lanes don't join": (
        "float v = 0; if (thread_index_in_simdgroup < 31) v = simd_sum(1.0f);"
        "y[thread_position_in_grid.x] = v;",
        "divergent simdgroup",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    body, message = MISTAKES[mistake]
    with pytest.raises(emulator.Caught) as caught:
        run(body, mx.arange(128, dtype=mx.float32))
    assert message in str(caught.value)


def test_a_large_threadgroup_is_caught() -> None:
    with pytest.raises(emulator.Caught, match="more than 896"):
        run("y[thread_position_in_grid.x] = 0.0f;", mx.zeros((1024,)), threads=1024)
