"""Attention of a long prompt by blocks of queries: what one call gives, in bounded memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kernels import fast, query_blocks
from kernels.query_blocks import by_blocks, rows_at_once

pytestmark = pytest.mark.smoke
MLX = fast._mlx["scaled_dot_product_attention"]


def close(got: mx.array, want: mx.array, tolerance: float) -> bool:
    a, b = (np.array(y.astype(mx.float32)) for y in (got, want))
    return bool(np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b)))


def rows(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("queries", [9, 16, 61])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive", "heads", "one"])
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_are_one_call(
    queries: int, kind: str, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, heads = 70, 4
    q, k, v = (rows(1, n, t, 16, seed=n + t) for n, t in ((heads, queries), (2, keys), (2, keys)))
    mask = {
        "none": None,
        "causal": "causal",
        "bool": rows(queries, keys) > 0,
        "additive": rows(queries, keys),
        "heads": rows(1, heads, queries, keys),
        "one": rows(1, keys) > 0,
    }[kind]
    options = {"sinks": rows(heads, seed=9)} if sinks else {}
    want = MLX(q, k, v, scale=0.25, mask=mask, **options)
    monkeypatch.setattr(query_blocks, "SCORES", 1)  # blocks of eight
    asked: list[int] = []

    def counted(q: mx.array, *rest: mx.array, **options: object) -> mx.array:
        asked.append(q.shape[2])
        return MLX(q, *rest, **options)

    got = by_blocks(counted, q, k, v, scale=0.25, mask=mask, **options)
    assert max(asked) == 8 and sum(asked) == queries
    assert close(got, want, 1e-5)


def test_scores_are_bounded() -> None:
    q, k = rows(1, 8, 1024, 32), rows(1, 8, 4096, 32, seed=1)
    mx.eval(q, k)
    assert rows_at_once(8, 4096, query_blocks.SCORES) < 1024
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(by_blocks(MLX, q, k, k, scale=0.1, mask="causal"))
    held = mx.get_peak_memory() - before
    assert held < 1.2 * query_blocks.SCORES + 3 * q.nbytes
    assert held < 8 * 1024 * 4096 * 4  # of all queries' once


def test_it_stands_in_where_the_extension_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As installed, without the extension, in half precision too."""
    q, k = rows(1, 2, 20, 16), rows(1, 2, 20, 16, seed=1)
    half = [a.astype(mx.bfloat16) for a in (q, k, k)]
    want = [MLX(*a, scale=0.25, mask="causal") for a in ((q, k, k), half)]
    monkeypatch.setattr(query_blocks, "SCORES", 1)
    monkeypatch.setattr(fast.backend, "available", lambda: False)
    for arrays, expected in zip(((q, k, k), half), want, strict=True):
        got = mx.fast.scaled_dot_product_attention(*arrays, scale=0.25, mask="causal")
        assert got.dtype == expected.dtype and close(got, expected, 1e-2)


def test_heads_that_gpus_have_a_kernel_for_go_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(q: mx.array, *rest: mx.array, **options: object) -> mx.array:
        asked.append(q.shape[2])
        return q

    monkeypatch.setattr(query_blocks, "SCORES", 1)
    monkeypatch.setattr(query_blocks, "is_fused", lambda width: width in query_blocks.FUSED)
    for width in (64, 256):
        q = mx.zeros((1, 1, 20, width))
        by_blocks(counted, q, q, q, scale=1.0)
    assert asked == [20, 8, 8, 4]
