"""Prompt caches on disk: what is saved is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from cache import prompt_file
from cache.compressed import CompressedKVCache
from cache.prompt_file import PromptCacheError, load, save


def caches(dtype: mx.Dtype = mx.float32) -> list[Any]:
    x = mx.array(np.random.default_rng(1).standard_normal((1, 2, 300, 64)), dtype)
    states = ArraysCache(2)
    states[0] = mx.ones((1, 3, 8), dtype)
    made = [
        CompressedKVCache(3.5, 2),
        KVCache(),
        RotatingKVCache(max_size=64),
        CacheList(KVCache(), CompressedKVCache(4, 4)),
    ]
    for one in (made[0], made[1], made[2], *made[3].caches):
        one.update_and_fetch(x, x)
    made[0].commit()
    return [*made, states]


def flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in flat(v)]
    return [np.array(value.astype(mx.float32)).tolist() if isinstance(value, mx.array) else value]


def states(cache: list[Any]) -> list[Any]:
    return [
        flat([x.state for x in c.caches] if isinstance(c, CacheList) else c.state) for c in cache
    ]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_every_kind_comes_back(tmp_path: Path, dtype: mx.Dtype) -> None:
    file, saved = tmp_path / "p.safetensors", caches(dtype)
    save(file, saved, [5, 6, 7], "model a")
    cache, tokens = load(file, "model a")
    assert tokens == [5, 6, 7]
    assert [type(c) for c in cache] == [type(c) for c in saved]
    assert states(cache) == states(saved)
    assert cache[0].keys.first.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "p", caches(), [1], "model a")
    with pytest.raises(PromptCacheError, match="another model"):
        load(tmp_path / "p", "model b")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p"
    save(file, caches(), [1], "a")
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(PromptCacheError):
            load(file, "a")


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p"
    save(file, caches(), [1], "a")
    whole = bytearray(file.read_bytes())
    whole[len(whole) - 1000] ^= 4
    file.write_bytes(whole)
    with pytest.raises(PromptCacheError, match="checksum"):
        load(file, "a")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_file, "VERSION", 99)
    save(tmp_path / "p", caches(), [1], "a")
    monkeypatch.undo()
    with pytest.raises(PromptCacheError, match="version 99"):
        load(tmp_path / "p", "a")


def test_other_files_are_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"a": mx.ones((3,))})
    (tmp_path / "t").write_text("hello, this is text")
    header = json.dumps([1, 2]).encode()
    (tmp_path / "j").write_bytes(struct.pack("<Q", len(header)) + header)
    for name in ("w.safetensors", "t", "j", "none"):
        with pytest.raises(PromptCacheError):
            load(tmp_path / name, "a")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p"
    save(file, caches(), [1], "a")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(prompt_file.mx, "save_safetensors", full)
    with pytest.raises(PromptCacheError, match="no space left"):
        save(file, caches(), [2], "a")
    assert load(file, "a")[1] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(PromptCacheError, match="cannot be written"):
        save(tmp_path / "no" / "p", caches(), [2], "a")


def test_unknown_caches_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PromptCacheError, match="object cannot be saved"):
        save(tmp_path / "p", [object()], [1], "a")
