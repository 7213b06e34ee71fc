"""Checks this machine's GPU kernels against plain MLX and times them; ends in one JSON line.

Metal on a Mac, CUDA elsewhere. Times are medians of interleaved runs of 20 launches each, one
synchronisation a run; bytes are those of the packed weights. "stock" is MLX's own product of the
same arrays in bf16 on the GPU, null where it has none. Exits with 1 where a kernel is wrong.

    python -m tools.check_gpu
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from kernels.codes import CodedSide
from kernels.cuda.launch import cuda
from kernels.experts import Stack
from kernels.metal import codes, delta, products
from kernels.metal.check import CHECKS, coded_side, error, passing, stack
from kernels.metal.launch import Launch, metal

LAUNCHES, ROUNDS = 20, 7
Made = Callable[[], Any]


def seconds(make: Made) -> float:
    """Time of one launch, of LAUNCHES that nothing waits between."""
    begun = time.perf_counter()
    mx.eval([make() for _ in range(LAUNCHES)])
    return (time.perf_counter() - begun) / LAUNCHES


def medians(ours: Made, stock: Made) -> tuple[float, float | None]:
    """Both times in microseconds, interleaved, the first of each dropped."""
    try:
        mx.eval(stock())
    except (RuntimeError, ValueError):
        return statistics.median(seconds(ours) for _ in range(ROUNDS)) * 1e6, None
    pairs = [(seconds(ours), seconds(stock)) for _ in range(ROUNDS + 1)][1:]
    a, b = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
    return a, b


def told(what: str, M: int, nbytes: int, ours: Made, stock: Made) -> dict[str, Any]:
    """One line of the table, printed and returned."""
    mx.eval(ours())
    mine, theirs = medians(ours, stock)
    print(f"{what:28} {M:3} rows {mine:9.1f} us {nbytes / mine / 1e3:8.1f} GB/s  stock {theirs}")
    return {"op": what, "rows": M, "us": mine, "gb_per_s": nbytes / mine / 1e3, "stock_us": theirs}


def size(stack: Stack) -> int:
    """Bytes of its arrays."""
    return sum(a.nbytes for a in stack.arrays if a is not None)


def timings(launch: Launch) -> list[dict[str, Any]]:
    """Products of Qwen3.5-35B-A3B's shapes and its gated delta layer."""
    lines = []
    weights = stack("affine", 64, 4, 8192, 2048)
    experts = [stack("affine", 64, 4, 64, *s) for s in ((512, 2048), (512, 2048), (2048, 512))]
    for M in (1, 2, 4, 8, 16):
        x = mx.random.normal((M, 2048)).astype(mx.bfloat16)
        lines.append(
            told(
                "linear 8192x2048",
                M,
                size(weights),
                lambda x=x: products.linear(launch, x, weights),  # type: ignore[misc]
                lambda x=x: mx.quantized_matmul(x, *weights.arrays),  # type: ignore[misc, arg-type]
            )
        )
        slots = mx.stack([mx.random.permutation(64)[:8] for _ in range(M)])
        used = len(set(slots.reshape(-1).tolist()))  # type: ignore[arg-type]
        lines.append(
            told(
                "experts 8 of 64, 512x2048",
                M,
                sum(map(size, experts)) * used // 64,
                lambda x=x, s=slots: products.gather_swiglu(launch, x, s, *experts),  # type: ignore[misc]
                lambda x=x, s=slots: gathered(x, s, experts),  # type: ignore[misc]
            )
        )
        q, k, v = (mx.random.normal((1, M, h, 128)) / 11 for h in (16, 16, 32))
        g, beta = mx.random.uniform(0.5, 1, (1, M, 32)), mx.random.uniform(0, 1, (1, M, 32))
        arrays = (q, k, v, g, beta, mx.zeros((1, 32, 128, 128)))
        lines.append(
            told(
                "gated delta, 32 heads of 128",
                M,
                2 * arrays[-1].nbytes,
                lambda a=arrays: delta.steps(launch, *a),  # type: ignore[misc]
                lambda a=arrays: delta.reference(*a),  # type: ignore[misc]
            )
        )
    return lines + [line for tokens in (8192, 131072) for line in attention(launch, tokens)]


def attention(launch: Launch, tokens: int) -> list[dict[str, Any]]:
    """Over `tokens` codes of 3.5 bits, 16 query and 2 key heads of 256, beside MLX's in bf16."""
    lines = []
    side: CodedSide = coded_side(7, 2, 256, tokens)
    k = mx.random.normal((1, 2, tokens, 256)).astype(mx.bfloat16)
    mx.eval(side.words, side.scales, k)
    for M in (1, 4, 8):
        q = mx.random.normal((1, 2, 8 * M, 256)) / 16
        rows = q.reshape(1, 16, M, 256).astype(mx.bfloat16)
        lines.append(
            told(
                f"codes of 3.5 bits, {tokens}",
                M,
                2 * (side.words.nbytes + side.scales.nbytes),
                lambda q=q, M=M: codes.over_codes(  # type: ignore[misc]
                    launch, q, side, side, rows=M, coded=tokens
                ),
                lambda q=rows: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0),  # type: ignore[misc]
            )
        )
    return lines


def gathered(x: mx.array, slots: mx.array, experts: list[Stack]) -> mx.array:
    """SwiGLU by MLX's gathered products, as mlx-lm has it."""
    gate, up, down = experts

    def product(x: mx.array, stack: Stack) -> mx.array:
        return mx.gather_qmm(x, *stack.arrays, rhs_indices=slots, transpose=True)  # type: ignore[arg-type]

    wide = x[:, None, None, :]
    g = product(wide, gate)
    return product(g * mx.sigmoid(g) * product(wide, up), down)


def main() -> int:
    """Prints what passed, a table and the JSON line."""
    launch = metal if mx.metal.is_available() else cuda if mx.cuda.is_available() else None
    if launch is None:
        print("MLX has no GPU here.", file=sys.stderr)
        return 2
    mx.random.seed(0)
    good = passing(launch)
    errors = {name: error(CHECKS[name](launch)) for name in sorted(good)}
    lines = timings(launch) if good == set(CHECKS) else []
    print(json.dumps({"passed": sorted(good), "errors": errors, "timings": lines}))
    return int(good != set(CHECKS))


if __name__ == "__main__":
    sys.exit(main())
