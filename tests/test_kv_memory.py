"""What 32k tokens weigh in a process's footprint: coded caches against bfloat16.

Qwen3.5-35B-A3B's shape, two layers of two key heads of 256. Each kind is filled in a process of
its own, as a prompt fills it, and the footprint is read before and after, holes in malloc's heap
given back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOKENS, LAYERS = 32768, 2
FILL = """
import sys
import mlx.core as mx
from mlx_lm.models.cache import KVCache
from cache.compressed import CompressedKVCache
from streamer.footprint import footprint, return_freed_memory, trim_heap

bits, tokens, layers, dtype = float(sys.argv[1]), *map(int, sys.argv[2:4]), getattr(mx, sys.argv[4])
return_freed_memory()
mx.set_cache_limit(0)

def filled(length):
    caches = [CompressedKVCache(bits, bits) if bits < 16 else KVCache() for _ in range(layers)]
    for start in range(0, length, 512):
        for layer, cache in enumerate(caches):
            mx.random.seed(start + layer)
            k, v = (mx.random.normal((1, 2, 512, 256)).astype(dtype) for _ in "kv")
            cache.update_and_fetch(k, v)
            if bits < 16:
                cache.commit()  # as attention does when it has read
            del k, v
            mx.eval(cache.state)
    return caches

filled(1024)  # codebooks, rotations, threads
trim_heap()
before = footprint()
caches = filled(tokens)
trim_heap()
print(footprint() - before, sum(c.nbytes for c in caches))
"""


def weight(bits: float, dtype: str) -> tuple[int, int]:
    """(growth of the footprint, what the caches say of themselves)"""
    command = [sys.executable, "-c", FILL, str(bits), str(TOKENS), str(LAYERS), dtype]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    grown, said = map(int, done.stdout.split())
    return grown, said


@pytest.fixture(scope="module")
def full() -> int:
    grown, said = weight(16, "bfloat16")
    assert said == TOKENS * LAYERS * 2 * 2 * 256 * 2
    assert 0.98 * said < grown < 1.1 * said
    return grown


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "smaller"), [(3.5, 4.2), (2.5, 5.8)])
def test_codes_weigh_a_fraction(full: int, bits: float, smaller: float, dtype: str) -> None:
    """dtype: of the few tokens that stay as they came."""
    grown, said = weight(bits, dtype)
    print(f"{bits} bits, {dtype}: {full / grown:.2f} times smaller, {grown} bytes")
    assert grown <= full / smaller
    assert said < 1.03 * grown  # nothing is counted that is not there
