"""The CPU kernels against stock MLX and against what this machine can do, interleaved.

    python -m kernels.bench                 # shapes of Qwen3.5-35B-A3B, minutes
    python -m kernels.bench --quick         # fewer rounds, a short head; under a minute

A product of M rows must read every weight once and must make M * N * K multiply-adds. What the
machine can do of both is measured in every round, just before the kernel, with the kernel's number
of threads working at once: a plain sum over an array that no cache holds for the memory, fused
multiply-adds in registers for the CPU. The larger of the two times is the floor, `share` the median
over rounds of floor / time. Where the kernels multiply bytes (VNNI), `own` is the same with their
instructions' rate, which is the higher one, in the place of fused multiply-adds.

Weights come from memory, not from a cache: copies of COLD bytes in all take turns, and the experts
are larger than that. Like a loaded model's they lie on huge pages where the system has them.
Products are evaluated several at once, GRAPH bytes of weights or more, as those of a decode step
are: what waking the threads costs is shared, as there. Stock MLX runs in float32, its fastest type,
and only at one row: it takes every further row from the start. Medians; the first round is
dropped. Beside other work a figure means little: the floors' quartiles tell.

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

from . import backend, fast, pages
from .weights import MLXLM

ROWS = (1, 2, 4, 8)
COLD = 128 << 20  # bytes that take turns: several times what the last cache holds
READ = 128 << 20  # bytes read for the bandwidth
ROUNDS = 500_000  # of 128 multiply-adds
GRAPH = 32 << 20  # bytes of weights that one evaluation reads at least
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


@dataclass(frozen=True)
class Floors:
    """What the machine does in a second, all threads at work: of this round."""

    bandwidth: float  # bytes read
    multiplies: float  # fused multiply-adds
    products: float  # multiply-adds by the kernels' own instructions


@dataclass
class Measured:
    """One product at M rows, a value a round."""

    name: str
    rows: int
    multiplies: int
    floors: list[Floors] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)

    def result(self, alone: Measured) -> dict[str, Any]:
        """Medians without the first round; alone: the same product at one row."""
        memory = [n / f.bandwidth for n, f in zip(self.bytes, self.floors, strict=True)]
        adds = [self.multiplies / f.multiplies for f in self.floors]
        own = [self.multiplies / f.products for f in self.floors]
        stock = settled(self.stock) if self.stock else None
        seconds = settled(self.seconds)
        return {
            "name": self.name,
            "rows": self.rows,
            "ms": 1e3 * seconds,
            "gb_per_second": settled([n / s for n, s in zip(self.bytes, self.seconds, strict=True)])
            / 1e9,
            "floor": "memory" if settled(memory) >= settled(adds) else "multiply-adds",
            "share": self._share(memory, adds),
            "own_share": self._share(memory, own),
            "to_one_row": settled(ratios(self.seconds, alone.seconds)),
            "stock_ms": stock and 1e3 * stock,
            "times_stock": stock and stock / seconds,
        }

    def _share(self, memory: list[float], other: list[float]) -> float:
        floors = [max(pair) for pair in zip(memory, other, strict=True)]
        return settled(ratios(floors, self.seconds))


def settled(values: list[float]) -> float:
    """The median without the first round."""
    return statistics.median(values[1:] or values)


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Round by round: what disturbs a round disturbs both."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: list[float]) -> str:
    """The median in units of 1e9, and between what quartiles it lies."""
    low, middle, high = statistics.quantiles(values[1:], n=4) if len(values) > 2 else 3 * values[:1]
    return f"{middle / 1e9:.1f} ({low / 1e9:.1f}-{high / 1e9:.1f})"


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
    for part in parts:
        pages.move(part)
    return parts


def clocked(calls: list[Callable[[], mx.array]]) -> float:
    """Seconds from building the graph to having the results, for each."""
    began = time.perf_counter()
    mx.eval([call() for call in calls])
    return (time.perf_counter() - began) / len(calls)


def measure(products: list[Linear | Routed], rounds: int) -> list[Measured]:
    """All products at all rows, in turns with what the machine can do."""
    native = backend.native()
    assert native is not None
    out = [Measured(p.name, m, m * p.multiplies) for p in products for m in ROWS]
    array = mx.zeros(READ // 4)
    mx.eval(array)
    pages.move(array)
    for i in range(rounds + 1):
        todo: Iterator[Measured] = iter(out)
        for product in products:
            for m in ROWS:
                here = next(todo)
                floors = Floors(
                    array.nbytes / native.read_seconds(array),
                    native.multiply_rate(ROUNDS),
                    native.product_rate(ROUNDS),
                )
                calls, nbytes = product.prepare(m, stock=False)
                here.floors.append(floors)
                here.seconds.append(clocked(calls))
                here.bytes.append(nbytes)
                slow = bool(here.stock) and here.stock[0] > PAUSE
                if m == 1 and (i < 2 or not slow):
                    here.stock.append(clocked(product.prepare(m, stock=True)[0]))
    return out


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="kernels.bench", description="Measure the CPU kernels.")
    p.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), default=4)
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
    measured = measure(products, rounds)
    singles = {m.name: m for m in measured if m.rows == 1}
    results = [m.result(singles[m.name]) for m in measured]
    floors = [f for m in measured for f in m.floors]
    print(f"{backend.describe()}; {args.bits} bits, groups of 64, float32 scales; {rounds} rounds")
    print(
        f"weights from memory ({COLD >> 20} MB take turns), {GRAPH >> 20} MB an evaluation; "
        f"with {backend.threads()} threads at once, medians and quartiles: "
        f"memory {spread([f.bandwidth for f in floors])} GB/s, "
        f"multiply-adds {spread([f.multiplies for f in floors])} G/s fused, "
        f"{spread([f.products for f in floors])} G/s by the kernels' instructions"
    )
    print(
        f"{'':18}{'rows':>5}{'ms':>9}{'GB/s':>7}{'share':>7}{'own':>6}{'T/T(1)':>8}"
        f"{'stock ms':>10}{'x':>6}"
    )
    for r in results:
        stock = f"{r['stock_ms']:10.1f}{r['times_stock']:6.0f}" if r["stock_ms"] else ""
        print(
            f"{r['name']:18}{r['rows']:5}{r['ms']:9.3f}{r['gb_per_second']:7.1f}"
            f"{r['share']:7.2f}{r['own_share']:6.2f}{r['to_one_row']:8.2f}{stock}"
        )
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "isa": backend.isa(),
                "threads": backend.threads(),
                "bits": args.bits,
                "memory_gb_per_second": settled([f.bandwidth for f in floors]) / 1e9,
                "multiply_adds_per_second": settled([f.multiplies for f in floors]),
                "own_multiply_adds_per_second": settled([f.products for f in floors]),
                "weights_from": "memory",
                "results": results,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
