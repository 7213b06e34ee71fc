"""Attention of a long prompt, a block of queries at a time.

    by_blocks(mx.fast.scaled_dot_product_attention, q, k, v, scale=scale, mask="causal")

Where MLX has no fused kernel (on the CPU, and on GPUs for wide heads) it makes the scores of all
queries at once, up to three times over: 16 heads, 2,048 queries and 8,192 keys take 3.2 GB. A
query's row does not depend on others, so what is computed here is the same, with scores of
`SCORES` bytes at most, and of a causal mask's keys only those that a block may see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

SCORES = 96 << 20  # bytes of scores at once, copies included
FUSED = (64, 80, 128)  # widths of heads for which GPUs have a kernel that makes none
COPIES = 3  # of the scores, float32


def by_blocks(
    attention: Callable[..., mx.array],
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    **options: Any,
) -> mx.array:
    """q [B, H, T, D], k and v [B, Hk, S, D] -> [B, H, T, Dv], by `attention` of fewer queries.

    mask: None, 'causal', or bool or additive, broadcast to [B, H, T, S]. Blocks are evaluated.
    """
    queries, keys = q.shape[2], k.shape[2]
    rows = rows_at_once(q.shape[0] * q.shape[1], keys, SCORES)
    if queries <= rows or (is_fused(q.shape[3]) and q.shape[3] == v.shape[3]):
        return attention(q, k, v, scale=scale, mask=mask, **options)
    outputs = []
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        seen, part = keys, mask
        if isinstance(mask, str):  # the last query sees all keys
            seen = keys - queries + last
        elif mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            part = mask[..., first:last, :]
        outputs.append(
            attention(
                q[:, :, first:last], k[:, :, :seen], v[:, :, :seen],
                scale=scale, mask=part, **options,
            )
        )  # fmt: skip
        mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=2)


def rows_at_once(heads: int, keys: int, scores: int) -> int:
    """Queries whose scores, of `heads` in all, are within `scores` bytes; eight at least."""
    return max(8, scores // (4 * COPIES * heads * max(1, keys)) // 8 * 8)


def is_fused(width: int) -> bool:
    """Whether MLX makes no scores of many queries of heads this wide on the default device."""
    return width in FUSED and mx.default_device() == mx.gpu
