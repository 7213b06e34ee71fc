"""The compressed cache against full precision: every position, masks, trims, verify passes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from cache.attention import install, scaled_dot_product_attention
from cache.compressed import CompressedKVCache
from cache.make import make_cache

H, R, D = 2, 3, 64


def rows(n: int, seed: int, heads: int = H, dimension: int = D) -> mx.array:
    random = np.random.default_rng(seed)
    return mx.array(random.standard_normal((1, heads, n, dimension)).astype(np.float32))


def run(cache: Any, q: mx.array, k: mx.array, v: mx.array, sinks: Any = None) -> mx.array:
    mask = cache.make_mask(q.shape[2], return_array=False, window_size=None)
    keys, values = cache.update_and_fetch(k, v)
    scale = q.shape[-1] ** -0.5
    return scaled_dot_product_attention(q, keys, values, cache, scale, mask, sinks)


def fed(cache: Any, cuts: list[int], seed: int = 0) -> tuple[Any, list[mx.array]]:
    """The cache after passes of so many rows, and what they gave."""
    total = sum(cuts)
    q, k, v = rows(total, seed, H * R), rows(total, seed + 1) + 2, rows(total, seed + 2) + 1
    out, at = [], 0
    for n in cuts:
        part = slice(at, at + n)
        out.append(run(cache, q[:, :, part], k[:, :, part], v[:, :, part]))
        mx.eval(out[-1])
        at += n
    return cache, out


@pytest.mark.parametrize("bits,tolerance", [(2, 0.5), (3.5, 0.2), (8, 0.02)])
@pytest.mark.parametrize("cuts", [[300, 1, 4, 1], [2, 1, 200, 100, 8, 1]])
def test_close_to_full_precision(bits: float, tolerance: float, cuts: list[int]) -> None:
    _, true = fed(KVCache(), cuts)
    cache, out = fed(CompressedKVCache(bits, bits), cuts)
    assert cache.size() == cache.offset == sum(cuts)
    assert cache.keys.coded > 0
    for a, b in zip(out, true, strict=True):
        assert mx.abs(a - b).max() < tolerance


@pytest.mark.parametrize("first", [1, 4, 130, 131, 190, 300])
def test_a_verify_pass_sees_what_plain_decoding_sees(first: int) -> None:
    plain, one = fed(CompressedKVCache(3, 3), [first] + [1] * 40)
    many, out = fed(CompressedKVCache(3, 3), [first] + [8] * 5)
    a, b = mx.concatenate(one, 2), mx.concatenate(out, 2)
    assert mx.abs(a - b).max() < 1e-5
    assert plain.keys.coded == many.keys.coded


def test_chunks_of_a_prompt_leave_the_same_codes() -> None:
    a, _ = fed(CompressedKVCache(3, 3), [400])
    b, _ = fed(CompressedKVCache(3, 3), [150, 100, 150])
    assert a.keys.coded == b.keys.coded == 320
    assert mx.array_equal(a.keys.codes(0, 320).words, b.keys.codes(0, 320).words)


@pytest.mark.parametrize("drop", [1, 7, 60, 150, 399])
def test_trim_then_go_on(drop: int) -> None:
    cache, _ = fed(CompressedKVCache(8, 8), [400])
    true, _ = fed(KVCache(), [400])
    assert cache.is_trimmable() and cache.trim(drop) == true.trim(drop) == drop
    for n in (1, 5, 100, 3):
        q, k, v = rows(n, 50 + n, H * R), rows(n, 51 + n), rows(n, 52 + n)
        assert mx.abs(run(cache, q, k, v) - run(true, q, k, v)).max() < 0.03
    assert cache.offset == true.offset


@pytest.mark.parametrize("left", [[], [2], [4]])
def test_another_text_is_coded_as_in_a_new_cache(left: list[int]) -> None:
    fresh, _ = fed(CompressedKVCache(3, 3), left)
    cache, _ = fed(CompressedKVCache(3, 3), left)
    fed(cache, [300], seed=5)
    assert cache.keys.coded > 0 and cache.trim(300) == 300
    for a, b in zip(fed(fresh, [200, 1], seed=9)[1], fed(cache, [200, 1], seed=9)[1], strict=True):
        assert mx.array_equal(a, b)


def test_rejected_drafts_leave_no_trace() -> None:
    plain, _ = fed(CompressedKVCache(3, 3), [131])
    drafted, _ = fed(CompressedKVCache(3, 3), [131])
    for n in range(30):
        q, k, v = rows(8, n, H * R), rows(8, n + 1), rows(8, n + 2)
        a = run(plain, q[:, :, :1], k[:, :, :1], v[:, :, :1])
        b = run(drafted, q, k, v)[:, :, :1]
        drafted.trim(7)
        assert mx.abs(a - b).max() < 1e-5
    assert plain.keys.coded == drafted.keys.coded == 64


def copied(cache: Any, position: int, total: int, v: mx.array, key: mx.array) -> int:
    """Which position the cache reads when asked for the one with this key; -1 when unsure."""
    q = mx.broadcast_to(key * 40, (1, H, 1, key.shape[-1]))
    keys, _ = cache.keys_and_values()
    got = np.array(keys.attend(q, 1.0, None))[0, 0, 0]
    distance = ((np.array(v)[0, 0, :total] - got) ** 2).mean(1)
    return int(distance.argmin())


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 8])
@pytest.mark.parametrize("dimension", [64, 96, 128])
def test_every_position_is_found(bits: float, dimension: int) -> None:
    total = 1000
    k, v = (rows(total + 8, s, dimension=dimension) for s in (21, 22))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    cache = CompressedKVCache(bits, bits)
    q = rows(total + 8, 23, dimension=dimension)
    for start, end in ((0, 600), (600, 990), (990, 998), (998, 1006)):
        out = run(cache, *(x[:, :, start:end] for x in (q, k, v)))
        mx.eval(out)
    cache.trim(6)
    for position in (0, 3, 4, 5, 63, 64, 67, 68, 69, 511, 700, 931, 932, 935, 936, 998, 999):
        assert copied(cache, position, total, v, k[:, :, position : position + 1]) == position
    cache.trim(300)
    for position in (4, 68, 500, 698, 699):
        assert copied(cache, position, 700, v, k[:, :, position : position + 1]) == position


def test_sinks_and_windows() -> None:
    sinks = mx.array(np.linspace(-1, 3, H * R).astype(np.float32))
    cache, _ = fed(CompressedKVCache(8, 8), [300])
    true, _ = fed(KVCache(), [300])
    for n in (1, 4, 40):
        q, k, v = rows(n, 70 + n, H * R), rows(n, 71 + n) + 2, rows(n, 72 + n) + 1
        assert mx.abs(run(cache, q, k, v, sinks) - run(true, q, k, v, sinks)).max() < 0.02
    for n in (1, 3):
        q, k, v = rows(n, 80 + n, H * R), rows(n, 81 + n), rows(n, 82 + n)
        mask = base.create_causal_mask(n, cache.offset, window_size=90)
        outs = []
        for c in (cache, true):
            view = c.update_and_fetch(k, v)
            outs.append(scaled_dot_product_attention(q, *view, c, 0.125, mask))
        assert mx.abs(outs[0] - outs[1]).max() < 0.02


def test_copies_states_and_files(tmp_path: Any) -> None:
    cache, _ = fed(CompressedKVCache(2.5, 4), [300, 3])
    install()
    make_cache_file = str(tmp_path / "c.safetensors")
    from mlx_lm.models import cache as mlx_cache

    mlx_cache.CompressedKVCache = CompressedKVCache
    save_prompt_cache(make_cache_file, [cache])
    (loaded,) = load_prompt_cache(make_cache_file)
    other = copy.deepcopy(cache)
    step = [rows(1, s, h) for s, h in ((91, H * R), (92, H), (93, H))]
    out = run(cache, *step)
    assert mx.array_equal(run(loaded, *step), out)
    assert mx.array_equal(run(other, *step), out)
    assert other.nbytes == cache.nbytes
    cache.trim(200)
    assert other.offset == 304


def test_bytes_are_counted() -> None:
    cache, _ = fed(CompressedKVCache(3.5, 3.5), [4 + 1024 + 64])
    assert cache.keys.coded == 1024
    row = cache.keys.codec.row_bytes
    assert row == 64 * 3.5 / 8 + 2
    raw = 4 * D * (4 + 64 + 1)  # first, window, mean: float32
    assert cache.nbytes == 2 * H * (1024 * row + raw)


def test_mlx_lm_s_function_is_as_it_was() -> None:
    """Fails when mlx-lm changes what the hook stands in for."""
    from cache import attention

    names = list(inspect.signature(attention._original).parameters)
    assert names == list(inspect.signature(scaled_dot_product_attention).parameters)
    install()
    assert base.scaled_dot_product_attention is scaled_dot_product_attention
    from mlx_lm.models import qwen3_next

    assert qwen3_next.scaled_dot_product_attention is scaled_dot_product_attention


def test_bits_without_a_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="KV bits are of"):
        make_cache(nn.Module(), 5, 5)
