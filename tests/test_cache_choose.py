"""Bits by layer: the average is kept, and spread attracts key bits."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from test_cache_models import small

from cache.choose import choose, measure


@pytest.mark.parametrize("average", [2, 2.5, 3, 3.5, 4])
def test_the_average_is_kept(average: float) -> None:
    chosen = choose([0.3, None, 5.0, 1.0, 2.0], average)
    assert chosen[1] is None
    widths = [b for pair in chosen if pair is not None for b in pair]
    assert sum(widths) / len(widths) == pytest.approx(average)


def test_spread_attracts_key_bits() -> None:
    (pair,) = choose([2.0], 3)
    assert pair is not None
    assert pair[0] - pair[1] == math.log2(2.0)
    flat, sharp = choose([0.25, 4.0], 3)
    assert flat is not None and sharp is not None
    assert flat[0] < flat[1] and sharp[0] > sharp[1]
    assert choose([1.0, None], 8) == [(8, 8), None]
    with pytest.raises(ValueError, match="2 or more"):
        choose([1.0], 1)


def test_spread_is_measured_where_caches_are_compressed() -> None:
    model = small("qwen3_next")
    tokens = list(range(60))
    before = measure(model, tokens)
    assert before[:3] == [None] * 3 and before[3] is not None
    attention = model.layers[3].self_attn
    attention.q_norm.weight = attention.q_norm.weight * 3
    after = measure(model, tokens)
    assert after[3] == pytest.approx(3 * before[3], rel=1e-3)
    assert measure(small("deepseek_v3"), tokens) == [1.0, 1.0]
    assert mx.array(before[3]) > 0
