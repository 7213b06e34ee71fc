"""The CPU kernels against stock MLX and against what this machine can do, interleaved.

    python -m kernels.bench                 # shapes of Qwen3.5-35B-A3B, minutes
    python -m kernels.bench --quick         # fewer rounds, a short head; under a minute

A product of M rows must read every weight once and must make M * N * K multiply-adds. Both are
measured in the same rounds as the kernels: a plain sum over an array that no cache holds gives the
memory's bandwidth, independent multiply-adds in registers the CPU's rate. The larger of the two
times is the floor, `share` is floor / time. Weights come from memory, not from a cache: enough
copies take turns, and small products are evaluated several at once, as those of a decode step are.
Stock MLX runs in float32, its fastest type, and only at one row: it takes
every further row from the start. Medians; the first round is dropped.

Prints a table and, last, one JSON line. Limits: affine weights, random; the rows of a routed
product choose independently, which is the largest union.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import mlx.core as mx
import numpy as np

from . import backend, fast
from .blocks import MLXLM

ROWS = (1, 2, 4, 8)
COLD = 96 << 20  # bytes that take turns: more than the last cache holds
READ = 64 << 20  # floats read for the bandwidth
ROUNDS = 1_000_000  # of 128 multiply-adds
GRAPH = 8 << 20  # bytes of weights that one evaluation reads at least
PAUSE = 0.3  # seconds of stock MLX in one go, at most, where a round can be left out
SHAPES = (  # of Qwen3.5-35B-A3B: name, N, K
    ("gated delta qkv", 8192, 2048),
    ("gated delta out", 2048, 4096),
    ("attention k or v", 512, 2048),
    ("shared expert up", 512, 2048),
    ("head", 248_320, 2048),
)
EXPERTS = (256, 8, 512, 2048)  # experts, chosen per row, their width, the model's

Weight = tuple[mx.array, mx.array, mx.array]


@dataclass
class Measured:
    """One product at M rows."""

    name: str
    rows: int
    multiplies: int
    bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)

    def result(self, bandwidth: float, rate: float) -> dict[str, Any]:
        """Milliseconds, GB/s and the share of the floor, from medians without the first round."""
        seconds, nbytes = (statistics.median(x[1:] or x) for x in (self.seconds, self.bytes))
        floor = max(nbytes / bandwidth, self.multiplies / rate)
        stock = statistics.median(self.stock[1:] or self.stock) if self.stock else None
        return {
            "name": self.name,
            "rows": self.rows,
            "ms": 1e3 * seconds,
            "gb_per_second": nbytes / seconds / 1e9,
            "floor": "memory" if nbytes / bandwidth >= self.multiplies / rate else "multiply-adds",
            "share": floor / seconds,
            "stock_ms": stock and 1e3 * stock,
            "times_stock": stock and stock / seconds,
        }


class Linear:
    """Products of M rows with one of several like weights, in turn."""

    def __init__(self, name: str, n: int, k: int, bits: int):
        self.name, self._k, self._bits = name, k, bits
        self.multiplies = n * k
        each = n * k * bits // 8
        self._weights = [weight((n, k), bits) for _ in range(max(2, -(-COLD // each)))]
        self._turns = cycle(self._weights)
        self._bytes = sum(part.nbytes for part in self._weights[0])

    def prepare(self, rows: int, stock: bool) -> tuple[list[Callable[[], mx.array]], int]:
        """The next products, and the bytes of weights that each reads."""
        x = mx.random.normal((rows, self._k))
        mx.eval(x)
        call = fast._mlx["quantized_matmul"] if stock else fast.quantized_matmul
        form: dict[str, Any] = {"transpose": True, "group_size": 64, "bits": self._bits}
        count = 1 if stock else -(-GRAPH // self._bytes)
        return [partial(call, x, *next(self._turns), **form) for _ in range(count)], self._bytes


class Routed:
    """Gate, up, activation and down of the experts that M rows chose."""

    def __init__(self, name: str, experts: int, chosen: int, width: int, model: int, bits: int):
        self.name, self._bits = name, bits
        self._experts, self._chosen, self._model = experts, chosen, model
        self.multiplies = 3 * chosen * width * model
        self._gate, self._up = (weight((experts, width, model), bits) for _ in range(2))
        self._down = weight((experts, model, width), bits)
        self._each = sum(p.nbytes for w in (self._gate, self._up, self._down) for p in w) // experts
        self._random = np.random.default_rng(0)

    def prepare(self, rows: int, stock: bool) -> tuple[list[Callable[[], mx.array]], int]:
        """The next product alone, and the bytes of the distinct experts that it reads."""
        picks = [self._random.permutation(self._experts)[: self._chosen] for _ in range(rows)]
        slots, x = mx.array(np.stack(picks).astype(np.int32)), mx.random.normal((rows, self._model))
        mx.eval(slots, x)
        nbytes = self._each * len(np.unique(picks))
        form: dict[str, Any] = {"group_size": 64, "bits": self._bits, "mode": "affine"}
        if not stock:
            native = backend.native()
            assert native is not None
            weights = (self._gate, self._up, self._down)
            return [lambda: native.gather_swiglu(x, slots, *weights, **form)], nbytes

        def layer() -> mx.array:
            def product(x: mx.array, w: Weight) -> mx.array:
                return fast._mlx["gather_qmm"](x, *w, rhs_indices=slots, **form)

            wide = x[:, None, None]
            hidden = MLXLM["swiglu"](product(wide, self._gate), product(wide, self._up))
            return product(hidden, self._down)

        return [layer], nbytes


def weight(shape: tuple[int, ...], bits: int) -> Weight:
    """Random quantized weights [..., N, K] in groups of 64, scales of float32."""
    *lead, k = shape
    packed = mx.random.randint(0, 2**31 - 1, (*lead, k * bits // 32), dtype=mx.int32)
    parts = (
        packed.astype(mx.uint32),
        mx.random.uniform(0.01, 0.02, (*lead, k // 64)),
        mx.random.uniform(-0.1, 0.1, (*lead, k // 64)),
    )
    mx.eval(parts)
    return parts


def clocked(calls: list[Callable[[], mx.array]]) -> float:
    """Seconds from building the graph to having the results, for each."""
    began = time.perf_counter()
    mx.eval([call() for call in calls])
    return (time.perf_counter() - began) / len(calls)


def measure(products: list[Linear | Routed], rounds: int) -> tuple[list[Measured], float, float]:
    """All products at all rows, the memory's bytes and the CPU's multiply-adds per second."""
    native = backend.native()
    assert native is not None
    out = [Measured(p.name, m, m * p.multiplies) for p in products for m in ROWS]
    array = mx.zeros(READ // 4)
    mx.eval(array)
    reads: list[float] = []
    adds: list[float] = []
    for i in range(rounds + 1):
        todo: Iterator[Measured] = iter(out)
        for product in products:
            reads.append(array.nbytes / native.read_seconds(array))
            adds.append(128 * ROUNDS * backend.threads() / native.multiply_seconds(ROUNDS))
            for m in ROWS:
                here = next(todo)
                calls, nbytes = product.prepare(m, stock=False)
                here.seconds.append(clocked(calls))
                here.bytes.append(nbytes)
                slow = bool(here.stock) and here.stock[0] > PAUSE
                if m == 1 and (i < 2 or not slow):
                    here.stock.append(clocked(product.prepare(m, stock=True)[0]))
    return out, statistics.median(reads), statistics.median(adds)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="kernels.bench", description="Measure the CPU kernels.")
    p.add_argument("--bits", type=int, choices=(4, 8), default=4)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--quick", action="store_true", help="5 rounds, few experts and a short head")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not backend.available():
        print("kernels.bench: the extension does not run here", file=sys.stderr)
        return 2
    rounds = 5 if args.quick else max(1, args.rounds)
    experts, chosen, width, model = EXPERTS
    products: list[Linear | Routed] = [
        Linear(name, n // 16 if args.quick and n > 65_536 else n, k, args.bits)
        for name, n, k in SHAPES
    ]
    experts = min(experts, 64) if args.quick else experts
    products.append(Routed("experts", experts, chosen, width, model, args.bits))
    measured, bandwidth, rate = measure(products, rounds)
    results = [m.result(bandwidth, rate) for m in measured]
    print(f"{backend.describe()}; {args.bits} bits, groups of 64, float32 scales; {rounds} rounds")
    print(f"memory {bandwidth / 1e9:.1f} GB/s, multiply-adds {rate / 1e9:.0f} G/s")
    print(
        f"{'':18}{'rows':>5}{'ms':>9}{'GB/s':>7}{'share':>7}{'T/T(1)':>8}{'stock ms':>10}{'x':>6}"
    )
    first = 0.0
    for r in results:
        first = r["ms"] if r["rows"] == 1 else first
        r["to_one_row"] = r["ms"] / first
        stock = f"{r['stock_ms']:10.1f}{r['times_stock']:6.0f}" if r["stock_ms"] else ""
        print(
            f"{r['name']:18}{r['rows']:5}{r['ms']:9.3f}{r['gb_per_second']:7.1f}"
            f"{r['share']:7.2f}{r['to_one_row']:8.2f}{stock}"
        )
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "isa": backend.isa(),
                "threads": backend.threads(),
                "bits": args.bits,
                "memory_gb_per_second": bandwidth / 1e9,
                "multiply_adds_per_second": rate,
                "results": results,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
