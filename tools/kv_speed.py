"""Speed and footprint of attention over codes, on synthetic caches of Qwen3.5-35B-A3B's shapes.

16 query heads over 2 key heads of 256 channels, one layer. Codes, our full precision and MLX's take
turns over the same number of tokens: in float32 on the CPU (ours is kernels.fast's), in bfloat16 on
a GPU, where full precision is MLX's alone. On the CPU the floors are measured in the same rounds:
keys and values have to be read once (a plain sum gives the bandwidth), and each row makes
2 * 16 * 256 multiply-adds a token (independent ones in registers give the rate). A floor is the
larger of the two times; where codes are multiplied as bytes, their rate is that of the instructions
for bytes (DIGITS). Milliseconds, medians; the first round is dropped, and MLX is left out of rounds
once it takes longer than a second. Prints a table and, last,
one JSON line. `--footprint` instead fills caches of 32k tokens and prints what the process holds.

    python -m tools.kv_speed --contexts 8192 32768 --bits 2.5 3.5
    python -m tools.kv_speed --footprint --bits 2.5
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import psutil
from mlx_lm.models.cache import KVCache

from cache.attention import scaled_dot_product_attention
from cache.compressed import CompressedKVCache
from kernels import backend, fast

HEADS, KEY_HEADS, CHANNELS = 16, 2, 256
PASS = 1024
ROWS = (1, 4)
PAUSE = 1.0  # seconds of MLX's attention in one go, at most, where a round can be left out
ROUNDS = 200_000  # of 128 multiply-adds
# Products of bytes for a multiply-add (with AMX two for keys and three for values), of those that
# native.product_rate() makes for one.
DIGITS = {"amx": 2.5 / 4, "avx512vnni": 2 / 3}


def filled(cache: Any, context: int, dtype: mx.Dtype) -> Any:
    """The cache after `context` random tokens, in passes."""
    for at in range(0, context, PASS):
        shape = (1, KEY_HEADS, min(PASS, context - at), CHANNELS)
        cache.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in range(2)))
        if isinstance(cache, CompressedKVCache):
            cache.commit()
        mx.eval([a for a in _arrays(cache.state) if isinstance(a, mx.array)])
        mx.clear_cache()
    return cache


def _arrays(state: Any) -> list[Any]:
    if isinstance(state, list | tuple):
        return [leaf for v in state for leaf in _arrays(v)]
    return [state]


def step(cache: Any, rows: int, dtype: mx.Dtype, ours: bool = True) -> float:
    """Seconds of one pass of `rows` rows, by our kernels or MLX's, taken back afterwards."""
    q = mx.random.normal((1, HEADS, rows, CHANNELS)).astype(dtype)
    k, v = (mx.random.normal((1, KEY_HEADS, rows, CHANNELS)).astype(dtype) for _ in range(2))
    mx.eval(q, k, v)
    mask = cache.make_mask(rows, window_size=None, return_array=False)
    with fast.installed() if ours else contextlib.nullcontext():
        begun = time.perf_counter()
        keys, values = cache.update_and_fetch(k, v)
        mx.eval(scaled_dot_product_attention(q, keys, values, cache, CHANNELS**-0.5, mask))
        taken = time.perf_counter() - begun
    cache.trim(rows)
    return taken


@dataclass
class Floors:
    """What reading and multiplying take here, from the rounds so far."""

    read: list[float] = field(default_factory=list)  # seconds a byte
    multiply: list[float] = field(default_factory=list)  # seconds a multiply-add of floats
    product: list[float] = field(default_factory=list)  # and of codes of up to 4 bits

    def measure(self, x: mx.array) -> None:
        """x: an evaluated float32 array that no cache holds."""
        if (native := backend.native()) is not None and backend.available():
            self.read.append(native.read_seconds(x) / x.nbytes)
            self.multiply.append(1 / native.multiply_rate(ROUNDS))
            digits = DIGITS.get(backend.isa())
            self.product.append(
                digits / native.product_rate(ROUNDS) if digits else self.multiply[-1]
            )

    def ms(self, nbytes: int, multiplies: float, codes: bool = False) -> float | None:
        """The larger of the two, in milliseconds; None on a GPU."""
        if not self.read:
            return None
        each = self.product if codes else self.multiply
        read, multiply = (statistics.median(s[1:] or s) for s in (self.read, each))
        return 1e3 * max(read * nbytes, multiply * multiplies)


def measured(
    context: int, bits: list[float], repeats: int, dtype: mx.Dtype, floors: Floors
) -> list[dict[str, Any]]:
    """The runs of one context, each of a number of rows: see `speed`."""
    full = filled(KVCache(), context, dtype)
    codes = {b: filled(CompressedKVCache(b, b), context, dtype) for b in bits}
    ways: dict[Any, tuple[Any, bool]] = {b: (cache, True) for b, cache in codes.items()}
    if backend.available():
        ways["full"] = full, True
    ways["mlx"] = full, False
    times: dict[tuple[Any, int], list[float]] = {}
    for turn in range(repeats + 1):
        floors.measure(full.keys)
        for rows, (name, (cache, ours)) in itertools.product(ROWS, ways.items()):
            before = times.setdefault((name, rows), [])
            if name == "mlx" and turn > 1 and before[-1] > PAUSE:
                continue
            before.append(step(cache, rows, dtype, ours))
    ms = {key: 1e3 * statistics.median(found[1:] or found) for key, found in times.items()}
    runs = []
    for rows in ROWS:
        multiplies = 2 * HEADS * CHANNELS * context * rows
        run: dict[str, Any] = {"context": context, "rows": rows, "mlx_ms": ms["mlx", rows]}
        run["full_ms"] = ms.get(("full", rows))
        run["full_floor_ms"] = floors.ms(2 * KEY_HEADS * context * CHANNELS * 4, multiplies)
        for b, cache in codes.items():
            stored = 2 * KEY_HEADS * cache.keys.coded * cache.keys.codec.row_bytes
            digits = 2 if b == 8 and backend.isa() not in ("avx2", "avxvnni") else 1
            floor = floors.ms(stored, multiplies * digits, codes=True)
            runs.append(
                {**run, "bits": b, "codes_ms": ms[b, rows], "codes_floor_ms": floor}
                | {"codes_to_one_row": ms[b, rows] / ms[b, 1]}
            )
    return runs


def speed(contexts: list[int], bits: list[float], repeats: int, dtype: mx.Dtype) -> None:
    """Print the table and its JSON line."""
    print(backend.describe())
    print(
        "context rows bits   MLX ms  full ms  floor  codes ms  floor  full/codes  T(rows)/T(1)",
        flush=True,
    )
    found = []
    floors = Floors()
    for context in contexts:
        for run in measured(context, bits, repeats, dtype, floors):
            full = run["full_ms"] or run["mlx_ms"]
            print(
                f"{context:7} {run['rows']:4} {run['bits']:4g} {run['mlx_ms']:8.1f} {full:8.2f} "
                f"{run['full_floor_ms'] or 0:6.2f} {run['codes_ms']:9.2f} "
                f"{run['codes_floor_ms'] or 0:6.2f} {full / run['codes_ms']:11.2f} "
                f"{run['codes_to_one_row']:13.2f}",
                flush=True,
            )
            found.append(run)
        mx.clear_cache()
    print(json.dumps({"kernels": backend.isa(), "threads": backend.threads(), "runs": found}))


def _release() -> None:
    """Hand back what passes have freed: MLX's cache, and malloc's heap where it is glibc's."""
    mx.clear_cache()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def footprint(bits: float, context: int = 32768, layers: int = 3) -> None:
    """Print what caches of `layers` layers add to the process, against bfloat16."""
    process = psutil.Process(os.getpid())
    filled(CompressedKVCache(bits, bits), 4 * PASS, mx.bfloat16)
    _release()
    before = process.memory_full_info().uss
    held = [filled(CompressedKVCache(bits, bits), context, mx.bfloat16) for _ in range(layers)]
    _release()
    grown = process.memory_full_info().uss - before
    plain = layers * context * KEY_HEADS * CHANNELS * 2 * 2
    counted = sum(c.nbytes for c in held)
    print(
        f"{bits} bits, {layers} layers of {context} tokens: the process grew by {grown / 1e6:.1f} "
        f"MB, nbytes is {counted / 1e6:.1f} MB, bfloat16 would be {plain / 1e6:.1f} MB: "
        f"{plain / grown:.2f} times smaller"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5, 2.5])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--footprint", action="store_true")
    args = parser.parse_args(argv)
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    if args.footprint:
        for bits in args.bits:
            footprint(bits)
        return
    speed(args.contexts, args.bits, args.repeats, dtype)


if __name__ == "__main__":
    main()
