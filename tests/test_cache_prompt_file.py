"""Prompt caches on disk: what is saved is what is read, and nothing else is accepted."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from cache import prompt_file
from cache.compressed import CompressedKVCache
from cache.prompt_file import Prefix, PromptCacheError, load, peek, save


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


A, B = {"model": "a", "number of KV bits": "4"}, {"model": "b", "number of KV bits": "4"}


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
    save(file, Prefix(saved, [5, 6, 7], {"messages": ["\u00e9"]}), A)
    prefix = load(file, A)
    cache = prefix.cache
    assert prefix.tokens == peek(file, A).tokens == [5, 6, 7]
    assert prefix.notes == peek(file, A).notes == {"messages": ["\u00e9"]}
    assert prefix.drafting is None
    assert [type(c) for c in cache] == [type(c) for c in saved]
    assert states(cache) == states(saved)
    assert cache[0].keys.first.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "p", Prefix(caches(), [1]), A)
    for read in (load, peek):
        with pytest.raises(PromptCacheError, match="another model: a, where this one is b"):
            read(tmp_path / "p", B)
        with pytest.raises(PromptCacheError, match="another number of KV bits: 4"):
            read(tmp_path / "p", {**A, "number of KV bits": "16"})
    assert peek(tmp_path / "p", {"model": "a"}).belongs == A


def test_a_drafter_comes_back(tmp_path: Path) -> None:
    hidden, tokens = mx.ones((1, 3, 8)), mx.array([4, 5, 6])
    state = [7, [[hidden, tokens]], [None, hidden[:, :1]]]
    save(tmp_path / "p", Prefix(caches(), [1], None, (caches()[1:2], state), "head"), A)
    prefix = load(tmp_path / "p", A)
    assert prefix.drafter == "head" and prefix.drafting
    assert states(prefix.drafting[0]) == states(caches()[1:2])
    assert flat(prefix.drafting[1]) == flat(state)


def test_nothing_is_held_twice(tmp_path: Path) -> None:
    """Arrays with gaps between their rows are written a few rows at a time."""
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 2, 1000, 2048)), mx.ones((1, 2, 1000, 2048)))
    cache.keys = cache.keys[..., :999, :]
    cache.values = cache.values[..., :999, :]
    cache.offset = 999
    mx.eval(cache.state)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    save(tmp_path / "p", Prefix([cache], [1]), A)
    assert mx.get_peak_memory() - before < 3 * prompt_file.PIECE < cache.nbytes / 2
    (loaded,) = load(tmp_path / "p", A).cache
    assert mx.array_equal(loaded.keys, cache.keys)


def test_mlx_reads_the_file(tmp_path: Path) -> None:
    save(tmp_path / "p.safetensors", Prefix(caches(), [1]), A)
    arrays = mx.load(str(tmp_path / "p.safetensors"))
    assert isinstance(arrays, dict) and len(arrays) > 10


def test_every_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p"
    save(file, Prefix(caches(), [1]), A)
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(PromptCacheError, match="cut short"):
            load(file, A)
    file.write_bytes(whole + b"more")
    with pytest.raises(PromptCacheError, match="too long"):
        load(file, A)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p"
    save(file, Prefix(caches(), [1]), A)
    whole = file.read_bytes()
    for at in (len(whole) - 1000, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(PromptCacheError, match="checksum"):
            load(file, A)
    file.write_bytes(whole.replace(b'\\"tokens\\": [1]', b'\\"tokens\\": [2]'))
    with pytest.raises(PromptCacheError, match="checksum"):
        load(file, A)
    file.write_bytes(whole)
    assert load(file, A).tokens == [1]


def test_a_damaged_table_of_arrays_is_refused(tmp_path: Path) -> None:
    file, cache = tmp_path / "p", KVCache()
    cache.update_and_fetch(mx.zeros((1, 2, 256, 8)), mx.ones((1, 2, 256, 8)))
    save(file, Prefix([cache], [1]), A)
    whole = file.read_bytes()
    keys, values, aside = b'"array.0"', b'"array.1"', b'"array.2"'
    for damaged in (
        whole.replace(b'"F32"', b'"I32"', 1),
        whole.replace(b"[1, 2, 256, 8]", b"[2, 1, 256, 8]", 1),
        whole.replace(keys, aside).replace(values, keys).replace(aside, values),
    ):
        assert damaged != whole
        file.write_bytes(damaged)
        with pytest.raises(PromptCacheError, match="checksum"):
            load(file, A)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_file, "VERSION", 99)
    save(tmp_path / "p", Prefix(caches(), [1]), A)
    monkeypatch.undo()
    with pytest.raises(PromptCacheError, match="version 99"):
        load(tmp_path / "p", A)


def test_other_files_are_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"a": mx.ones((3,))})
    (tmp_path / "t").write_text("hello, this is text")
    for name, header in (("j", b"[1, 2]"), ("n", b"[" * 100_000)):
        (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header)
    for name in ("w.safetensors", "t", "j", "n", "none"):
        with pytest.raises(PromptCacheError):
            load(tmp_path / name, A)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p"
    save(file, Prefix(caches(), [1]), A)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(prompt_file, "_write", full)
    with pytest.raises(PromptCacheError, match="no space left"):
        save(file, Prefix(caches(), [2]), A)
    assert load(file, A).tokens == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(PromptCacheError, match="cannot be written"):
        save(tmp_path / "no" / "p", Prefix(caches(), [2]), A)


def test_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "p").symlink_to("far/p")
    save(tmp_path / "p", Prefix(caches(), [1]), A)
    assert (tmp_path / "p").is_symlink() and load(tmp_path / "far" / "p", A).tokens == [1]
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["p"]


def test_unknown_caches_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PromptCacheError, match="object cannot be saved"):
        save(tmp_path / "p", Prefix([object()], [1]), A)
