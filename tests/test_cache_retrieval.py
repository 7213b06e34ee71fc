"""Long retrieval: attention that copies the value at one position, for every kind of cache.

A dropped, doubled or shifted position copies another value. Values are +-1 signs of a random word,
so that the word read back names its position whatever the bits. One row and verify rows read the
codes; a prompt's pass reads them decoded, there every position is looked at.
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
KINDS = ["coded", "latent", "full", "window", "list"]


def made(kind: str, bits: float) -> Any:
    if kind in ("coded", "latent"):
        return CompressedKVCache(bits, bits, kind == "latent")
    if kind == "list":
        return CacheList(KVCache(), CompressedKVCache(bits, bits))
    return RotatingKVCache(max_size=WINDOW) if kind == "window" else KVCache()


class Trial:
    """A cache, and all that was ever to be put into it: keys and words [1, 1, length, D]."""

    def __init__(self, kind: str, bits: float, length: int):
        random = np.random.default_rng(length)
        self.kind, self.length = kind, 0
        words = random.choice(np.array([-1, 1], np.float32), (1, 1, length, D))
        self.words = mx.array(words)
        if kind == "latent":  # keys and values in one
            self.keys = self.words / D**0.5
            self.places = mx.array(random.standard_normal((1, 1, length, P)).astype(np.float32))
        else:
            keys = random.standard_normal((1, 1, length, D)).astype(np.float32)
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

    def check(self) -> None:
        """Edges of every region, by one row each; of long reads every position."""
        assert self.cache.offset == self.length
        n = self.length
        edges = {0, 3, 4, 5, 67, 68, 131, 132, n // 2, n - 65, n - 64, n - 1}
        if isinstance(self.cache, CompressedKVCache):
            edges |= {3 + self.cache.keys.coded, min(4 + self.cache.keys.coded, n - 1)}
        for at in sorted(edges):
            if self.kind == "window" and at < n - WINDOW:
                continue
            right = mx.mean(self.read(self.keys[:, :, at : at + 1]) == self.words[:, :, at])
            assert right > 0.9, at  # another position's word agrees in half

    def read(self, key: mx.array) -> mx.array:
        keys, values = self.cache.keys_and_values()
        got = scaled_dot_product_attention(key * 100, keys, values, self.cache, 1.0, None)
        return mx.sign(got)[:, :, 0]

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
        asked = [5, self.length // 3, self.length - 5, self.length - 5]
        rows = mx.concatenate([self.keys[:, :, at : at + 1] for at in asked], axis=2)
        got = mx.sign(view.attend(rows * 100, 1.0, "causal"))
        for row, at in enumerate(asked):
            assert mx.mean(got[:, :, row] == self.words[:, :, at]) > 0.9
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
    trial.check()
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
