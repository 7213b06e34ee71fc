"""Long retrieval: attention that copies the value at one position, for every kind of cache.

A dropped, doubled or shifted position copies another value. Values are +-1 signs of a random word,
so that the word read back names its position and head whatever the bits: two key heads with words
of their own (a latent is one), two query heads each. Attention over codes, by one row and by up to
sixteen, reads the edges and a sample of all regions, up to 8k tokens at the end every position; a
prompt's pass reads the history decoded, there every position is looked at, at every length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from cache.attention import View, scaled_dot_product_attention
from cache.compressed import CompressedKVCache
from cache.prompt_file import Prefix, load, save

D, P = 64, 8  # channels of keys and values, and of a latent's position part
WINDOW = 512
GROUP = 2  # query heads of a key head
SAMPLE = 160  # positions beside the edges, spread over the context
ALL = 8192  # tokens of which every one is read
KINDS = ["coded", "latent", "full", "window", "list"]


def made(kind: str, bits: float) -> Any:
    if kind in ("coded", "latent"):
        return CompressedKVCache(bits, bits, kind == "latent")
    if kind == "list":
        return CacheList(KVCache(), CompressedKVCache(bits, bits))
    return RotatingKVCache(max_size=WINDOW) if kind == "window" else KVCache()


class Trial:
    """A cache, and all that was ever to be put into it: keys and words [1, heads, length, D]."""

    def __init__(self, kind: str, bits: float, length: int):
        random = np.random.default_rng(length)
        self.kind, self.length = kind, 0
        self.random = np.random.default_rng(7)
        shape = (1, 1 if kind == "latent" else 2, length, D)
        words = random.choice(np.array([-1, 1], np.float32), shape)
        self.words = mx.array(words)
        if kind == "latent":  # keys and values in one
            self.keys = self.words / D**0.5
            self.places = mx.array(random.standard_normal((1, 1, length, P)).astype(np.float32))
        else:
            keys = random.standard_normal(shape).astype(np.float32)
            self.keys = mx.array(keys / np.linalg.norm(keys, axis=-1, keepdims=True))
        self.outer = made(kind, bits)

    @property
    def cache(self) -> Any:
        return self.outer.caches[1] if self.kind == "list" else self.outer

    def append(self, count: int, sign: float = 1) -> Any:
        """The next `count` tokens; those of another sign are drafts. Returns what may be read."""
        part = slice(self.length, self.length + count)
        values = self.places if self.kind == "latent" else self.words
        keys, values = sign * self.keys[:, :, part], sign * values[:, :, part]
        self.length += count
        if self.kind == "latent" and count > 500:  # which would decode the history each time
            self.cache.keys.append(keys)
            self.cache.values.append(values)
            self.cache.offset += count
            self.cache.commit()
            return True
        got = self.cache.update_and_fetch(keys, values)
        if count > 16 and self.kind in ("coded", "list"):
            self.cache.commit()  # as attention does when it has read
        return got

    def fill(self, length: int) -> None:
        for n in (3, 2, 1, 8, 500):
            if self.length + n <= length:
                mx.eval(self.append(n) and self.cache.state)
        while self.length < length:
            mx.eval(self.append(min(1000, length - self.length)) and self.cache.state)

    def trim(self, count: int) -> None:
        if self.kind == "window":  # as mtp.rollback cuts the rows of the last pass
            end = self.cache.keys.shape[2] - count
            self.cache.keys = self.cache.keys[..., :end, :]
            self.cache.values = self.cache.values[..., :end, :]
            self.cache.offset, self.cache._idx = self.cache.offset - count, end
        else:
            assert self.outer.trim(count) == count
        self.length -= count

    def check(self, every: bool = False) -> None:
        """Edges of every region and a sample between them, or every position, by attention."""
        assert self.cache.offset == self.length
        n = self.length
        edges = {0, 3, 4, 5, 67, 68, 131, 132, n // 2, n - 65, n - 64, n - 1}
        if isinstance(self.cache, CompressedKVCache):
            edges |= {3 + self.cache.keys.coded, min(4 + self.cache.keys.coded, n - 1)}
        # one of each of as many stretches, so that no span is passed over
        starts = np.arange(SAMPLE) * n // SAMPLE
        sample = starts + self.random.integers(0, max(1, n // SAMPLE), SAMPLE)
        asked = np.arange(n) if every else np.array(sorted(edges | set(sample.tolist())))
        if self.kind == "window":
            asked = asked[asked >= n - WINDOW]
        self.right(np.array(sorted(edges))[-1:])
        for at in range(0, len(asked), 16):
            self.right(asked[at : at + 16])

    def right(self, at: np.ndarray) -> None:
        """Rows that ask for these positions get their words."""
        got = self.read(mx.take(self.keys, mx.array(at), axis=2))
        self.compare(got, at)

    def compare(self, got: mx.array, at: np.ndarray) -> None:
        """got [1, heads, rows, D]: each row's word; another position's would agree in half."""
        wanted = mx.repeat(mx.take(self.words, mx.array(at), axis=2), GROUP, axis=1)
        right = np.array(mx.mean(got == wanted, axis=-1))
        assert right.mean(axis=(0, 1)).min() > 0.9 and right.min() > 0.8, at[
            right.min((0, 1)) <= 0.8
        ]

    def read(self, keys: mx.array) -> mx.array:
        """Signs that rows of queries keys [1, heads, rows, D] read."""
        read = self.cache.keys_and_values()
        queries = mx.repeat(keys * 100, GROUP, axis=1)
        return mx.sign(scaled_dot_product_attention(queries, *read, self.cache, 1.0, None))

    def check_all(self) -> None:
        """Every position, decoded as a prompt's pass reads them."""
        if not isinstance(self.cache, CompressedKVCache):
            return
        sides = [self.cache.keys] if self.kind == "latent" else [self.cache.values]
        for side in sides:
            got = mx.sign(side.dense())
            assert got.shape[2] == self.length
            right = mx.mean(got == self.words[:, :, : self.length], axis=-1)
            assert right.min() > 0.7 and right.mean() > 0.93
        if self.kind == "latent":
            assert mx.array_equal(self.cache.values.dense(), self.places[:, :, : self.length])

    def check_rows(self) -> None:
        """Four rows of a verify pass, each of which asks for a position of its own."""
        if self.kind not in ("coded", "list"):
            return
        view = self.append(4, -1)[0]
        assert isinstance(view, View)
        asked = np.array([5, self.length // 3, self.length - 5, self.length - 5])
        rows = mx.take(self.keys, mx.array(asked), axis=2)
        got = mx.sign(view.attend(mx.repeat(rows * 100, GROUP, axis=1), 1.0, "causal"))
        self.compare(got, asked)
        self.trim(4)


def run(kind: str, bits: float, length: int, tmp_path: Path) -> None:
    trial = Trial(kind, bits, length)
    trial.fill(length - 20)
    trial.append(7)
    trial.check()
    trial.append(8, -1)  # drafts, all rejected
    trial.trim(8)
    trial.check()
    trial.check_rows()
    trial.append(2)
    trial.check_all()
    save(tmp_path / "p", Prefix([trial.outer], []), {})
    trial.outer = load(tmp_path / "p", {}).cache[0]
    trial.check()
    if kind != "window":
        trial.trim(length // 3)  # into the codes, and written again
        trial.check()
    trial.fill(length)
    trial.check(every=length <= ALL)
    trial.check_all()


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 8])
@pytest.mark.parametrize("kind", ["coded", "latent"])
def test_a_thousand(kind: str, bits: float, tmp_path: Path) -> None:
    run(kind, bits, 1024, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_thousand(kind: str, tmp_path: Path) -> None:
    run(kind, 2.5, 8192, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [32768, 131072])
def test_long(kind: str, length: int, tmp_path: Path) -> None:
    run(kind, 3.5, length, tmp_path)
