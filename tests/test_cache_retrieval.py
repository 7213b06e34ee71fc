"""Long retrieval: attention that copies the value at one position, for every length and width.

A dropped, doubled or shifted position copies another value. Values are +-1 signs of a random word,
so that the word read back names its position whatever the bits.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from cache.compressed import CompressedKVCache

D = 64


def filled(bits: float, length: int) -> tuple[CompressedKVCache, mx.array, mx.array]:
    random = np.random.default_rng(length)
    keys = random.standard_normal((1, 1, length, D)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    words = random.choice([-1.0, 1.0], (1, 1, length, D)).astype(np.float32)
    cache = CompressedKVCache(bits, bits)
    k, v = mx.array(keys), mx.array(words)
    at = 0
    sizes = [3, 2, 1, 8, 500] + [1000] * (length // 1000 + 1)
    for n in sizes:
        n = min(n, length - at)
        if n:
            append(cache, k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    return cache, k, v


def append(cache: CompressedKVCache, k: mx.array, v: mx.array) -> None:
    cache.update_and_fetch(k, v)
    mx.eval(cache.keys.recent, cache.values.recent)
    cache.commit()


def read(cache: CompressedKVCache, key: mx.array) -> mx.array:
    view, _ = cache.keys_and_values()
    return mx.sign(view.attend(key * 100, 1.0, None))


def check(cache: CompressedKVCache, k: mx.array, v: mx.array, length: int) -> None:
    assert cache.offset == length
    edges = {0, 3, 4, 5, 67, 68, 131, 132, length // 2, length - 65, length - 64, length - 1}
    coded = 4 + cache.keys.coded
    for at in sorted(edges | {coded - 1, min(coded, length - 1)}):
        right = mx.mean(read(cache, k[:, :, at : at + 1]) == v[:, :, at : at + 1])
        assert right > 0.9, at  # another position's word agrees in half


def trial(bits: float, length: int) -> None:
    cache, k, v = filled(bits, length)
    check(cache, k, v, length)
    append(cache, -k[:, :, :7], -v[:, :, :7])  # drafts, all rejected
    cache.trim(7)
    check(cache, k, v, length)
    cache.trim(length // 3)  # into the codes, and written again
    kept = length - length // 3
    check(cache, k, v, kept)
    append(cache, k[:, :, kept:], v[:, :, kept:])
    check(cache, k, v, length)


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 8])
def test_a_thousand(bits: float) -> None:
    trial(bits, 1024)


@pytest.mark.parametrize("bits,length", [(2, 8192), (3.5, 8192)])
def test_eight_thousand(bits: float, length: int) -> None:
    trial(bits, length)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2.5, 3.5])
@pytest.mark.parametrize("length", [32768, 131072])
def test_long(bits: float, length: int) -> None:
    trial(bits, length)
