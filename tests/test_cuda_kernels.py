"""The kernels as CUDA: compiled where nvcc exists, run where MLX has a CUDA GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kernels.cuda import launch
from kernels.metal import check
from kernels.metal.launch import KERNELS, text

NVCC = shutil.which("nvcc")
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.uint8: "uint8_t",
}
PRELUDE = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cstdint>\n"


def generated(
    name: str,
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    function: str,
) -> str:
    """A function as MLX's CUDA back end makes one: pointers, then constants, then the source."""
    reads, writes = KERNELS[name]
    pointers = [
        *(f"const {TYPES[a.dtype]}* {n}" for n, a in zip(reads, inputs, strict=True)),
        *(f"{TYPES[t]}* {n}" for n, (_, t) in zip(writes, outputs, strict=True)),
    ]
    constants = [
        f"constexpr int {n} = {v};" if isinstance(v, int) else f"using {n} = {TYPES[v]};"
        for n, v in template
    ]
    lines = ["{", *constants, text(name), "}"]
    return f"__global__ void {function}({', '.join(pointers)})\n" + "\n".join(lines)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_every_kernel_of_the_check_compiles(tmp_path: Path) -> None:
    functions: list[str] = []

    def recorded(
        name: str,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        groups: tuple[int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        function = f"kernel_{len(functions)}"
        functions.append(generated(name, inputs, template, outputs, function))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    for pairs in check.CHECKS.values():
        list(pairs(recorded))
    assert len(functions) > 20
    source = tmp_path / "kernels.cu"
    source.write_text("\n".join([PRELUDE, launch.header(), *functions]))
    assert NVCC is not None
    done = subprocess.run(
        [
            NVCC,
            "-std=c++17",
            "-arch=sm_90",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            "kernels.cubin",
            source,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert len(spilled) == len(functions)
    assert not any(spilled), "sums don't fit the registers"


@pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX has no CUDA GPU here")
def test_every_kernel_is_right_on_this_gpu() -> None:
    assert check.passing(launch.cuda) == set(check.CHECKS)
