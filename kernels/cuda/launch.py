"""Starts the kernels of kernels/metal through mx.fast.cuda_kernel, on MLX's CUDA back end.

python -m kernels.gpu
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from kernels.metal.launch import KERNELS, arguments, text


@cache
def header() -> str:
    """The dialect, then what all kernels share."""
    dialect = files(__package__).joinpath("dialect.cuh").read_text(encoding="utf-8")
    return f"{dialect}\n{text('common')}"


@cache
def built(name: str, types: str) -> Any:
    """The kernel for inputs of these types: MLX tells modules apart by name and template only."""
    inputs, outputs = KERNELS[name]
    return mx.fast.cuda_kernel(
        name=f"streamer_{name}_{types}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=text(name),
        header=header(),
    )


def cuda(
    name: str,
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    groups: tuple[int, int],
    threads: int,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """kernels.metal.launch.Launch on the CUDA GPU."""
    types = "_".join(str(array.dtype).rpartition(".")[2] for array in inputs)
    call = arguments(inputs, template, groups, threads, outputs)
    return built(name, types)(**call, stream=mx.gpu)
