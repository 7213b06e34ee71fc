"""Starts a kernel of this folder: the one place that knows mx.fast.metal_kernel.

A launcher takes a kernel's name, inputs, template arguments and grid, and returns its outputs,
lazily. kernels.cuda.launch has another one with the same sources; tests have one that runs them on
the CPU. Constructing works everywhere, running only on a Mac.

    python -m pytest tests/test_metal_kernels.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import mlx.core as mx

# name: (inputs, outputs) in the order of the kernel's buffers
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("x", "w", "scales", "biases"), ("y",)),
    "experts": (("x", "slots", "wa", "sa", "ba", "wb", "sb", "bb"), ("y",)),
    "delta": (("q", "k", "v", "g", "beta", "state", "sizes"), ("y", "after", "d")),
    "replay": (("k", "g", "d", "state", "sizes"), ("after",)),
    "codes": (
        (
            *("q", "key_words", "key_scales", "key_points"),
            *("value_words", "value_scales", "value_points", "bias", "sizes"),
        ),
        ("y", "top", "total"),
    ),
    "codes_merge": (("sums", "tops", "totals", "sizes"), ("y", "top", "total")),
}


class Launch(Protocol):
    """Runs the kernel `name` over `groups` (x, y) threadgroups of `threads` threads."""

    def __call__(
        self,
        name: str,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        groups: tuple[int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]: ...


@cache
def text(name: str) -> str:
    """The source of that name in this folder."""
    return files(__package__).joinpath(f"{name}.metal").read_text(encoding="utf-8")


@cache
def built(name: str) -> Any:
    """The kernel as MLX's callable; compiled by Metal at its first use of each template."""
    inputs, outputs = KERNELS[name]
    return mx.fast.metal_kernel(
        name=f"streamer_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=text(name),
        header=text("common"),
    )


def arguments(
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    groups: tuple[int, int],
    threads: int,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> dict[str, Any]:
    """A launch in MLX's words, whose grid counts threads."""
    return {
        "inputs": list(inputs),
        "template": list(template),
        "grid": (groups[0] * threads, groups[1], 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [shape for shape, _ in outputs],
        "output_dtypes": [dtype for _, dtype in outputs],
    }


def metal(
    name: str,
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    groups: tuple[int, int],
    threads: int,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """`Launch` on this Mac's GPU."""
    call = arguments(inputs, template, groups, threads, outputs)
    return built(name)(**call, stream=mx.gpu)
