"""Speed and footprint of attention over codes, on synthetic caches of Qwen3.5-35B-A3B's shapes.

16 query heads over 2 key heads of 256 channels. Full precision is the same back end's fused
attention: kernels.fast's in float32 on the CPU (MLX's with STREAMER_KERNELS=off), MLX's in bfloat16
on a GPU. On the CPU attention over codes is bound by multiply-adds (2 * 16 * 256 a token and row)
and by unpacking (2 * 2 * 256 a token, whatever the rows), not by the bytes of the codes, which are
printed as GB/s. Runs are interleaved; medians of seconds on the clock, a JSON line ends the output.
`--footprint` instead fills one cache of 32k tokens and prints what the process holds for it.

    python -m tools.kv_speed --contexts 8192 --bits 3.5
    python -m tools.kv_speed --footprint --bits 2.5
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import psutil
from mlx_lm.models.cache import KVCache

from cache.attention import scaled_dot_product_attention
from cache.compressed import CompressedKVCache
from kernels import backend, fast

HEADS, KEY_HEADS, CHANNELS = 16, 2, 256
PASS = 1024


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


def step(cache: Any, rows: int, dtype: mx.Dtype) -> float:
    """Seconds of one pass of `rows` rows, which is taken back afterwards."""
    q = mx.random.normal((1, HEADS, rows, CHANNELS)).astype(dtype)
    k, v = (mx.random.normal((1, KEY_HEADS, rows, CHANNELS)).astype(dtype) for _ in range(2))
    mx.eval(q, k, v)
    mask = cache.make_mask(rows, window_size=None, return_array=False)
    begun = time.perf_counter()
    keys, values = cache.update_and_fetch(k, v)
    mx.eval(scaled_dot_product_attention(q, keys, values, cache, CHANNELS**-0.5, mask))
    taken = time.perf_counter() - begun
    cache.trim(rows)
    return taken


def speed(contexts: list[int], bits: float, repeats: int, dtype: mx.Dtype) -> None:
    """Print the table and its JSON line."""
    found = []
    print(backend.describe())
    print("context rows  full ms  codes ms  full/codes  T(rows)/T(1)  codes GB/s")
    for context in contexts:
        full = filled(KVCache(), context, dtype)
        codes = filled(CompressedKVCache(bits, bits), context, dtype)
        stored = 2 * codes.keys.coded * KEY_HEADS * codes.keys.codec.row_bytes
        times: dict[tuple[str, int], list[float]] = {}
        for turn in range(repeats + 1):
            for rows in (1, 4):
                for name, cache in (("full", full), ("codes", codes)):
                    seconds = step(cache, rows, dtype)
                    if turn:  # the first warms up
                        times.setdefault((name, rows), []).append(seconds)
        ms = {key: statistics.median(values) * 1e3 for key, values in times.items()}
        for rows in (1, 4):
            a, b = ms["full", rows], ms["codes", rows]
            print(
                f"{context:7} {rows:4} {a:8.1f} {b:9.1f} {a / b:11.2f} "
                f"{b / ms['codes', 1]:13.2f} {stored / b / 1e6:11.2f}",
                flush=True,
            )
            found.append({"context": context, "rows": rows, "full_ms": a, "codes_ms": b})
    print(json.dumps({"bits": bits, "kernels": backend.isa(), "runs": found}))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--footprint", action="store_true")
    args = parser.parse_args()
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    if args.footprint:
        footprint(args.bits)
        return
    with fast.installed():
        speed(args.contexts, args.bits, args.repeats, dtype)


if __name__ == "__main__":
    main()
