"""A step of an MTP head in one operation: Qwen3.5's, whose one layer is a decoder layer's.

[norm(embed(token)), norm(h)] -> join -> layer -> norm -> lm_head, as `mtp.head` has it, with the
same bits, where every expert of the layer is in memory; in two where they are paged. All rows leave
keys and values, what follows is of the last row.

    python -m pytest tests/test_kernels_heads.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import KVCache

from . import plans
from .segments import Pages, Row
from .weights import float32, group, unchanged

ROWS = 16  # at most


@dataclass(frozen=True)
class Parts:
    """What a head's step is made of; tied: `words` is the embedding."""

    embedding: Any  # called with tokens
    embed_norm: nn.Module
    hidden_norm: nn.Module
    join: nn.Module
    embedding_first: bool
    block: nn.Module
    norm: nn.Module
    words: nn.Module
    tied: bool


@dataclass(frozen=True)
class _Plan:
    run: Row | Pages
    top_k: int
    kept: bool


def step(
    owner: nn.Module, parts: Parts, tokens: mx.array, hidden: mx.array, cache: list[Any]
) -> tuple[mx.array, mx.array, mx.array] | None:
    """tokens [1, T], hidden [1, T, D] -> logits [1, 1, V], x and norm(x) [1, 1, D] of the last row.

    owner: what has the parts and is none of them. The cache grows by T. None where there is no such
    operation: nothing has happened then.
    """
    if qwen3_5.TextModel.__call__ is not plans.text_model or not float32(hidden):
        return None  # the kernels are not installed
    if len(cache) != 1 or type(cache[0]) is not KVCache or parts.block.training:
        return None
    if tokens.ndim != 2 or tokens.shape[0] != 1 or not 0 < tokens.shape[1] <= ROWS:
        return None
    held = tuple(vars(parts).values())
    plan: _Plan | None = unchanged(owner, "step", held, lambda: _made(parts))
    if plan is None or (isinstance(plan.run, Pages) and not plan.run.takes(plan.top_k)):
        return None
    ids = tokens if tokens.dtype in plans.TOKENS else tokens.astype(mx.int32)
    logits, x, normed = plan.run.soon([ids, hidden], cache)
    return logits, x, normed


def _made(parts: Parts) -> _Plan | None:
    moe = type(parts.block.get("mlp"))
    # or what leaves rows out, which the operation does itself
    if qwen3_next.Qwen3NextSparseMoeBlock not in moe.__mro__[:2]:
        return None
    layer = plans.parts_of_layer(parts.block, KVCache, moe)
    words = plans.embedding_of(parts.embedding)
    norms = [plans.norm_of(norm) for norm in (parts.embed_norm, parts.hidden_norm)]
    kinds = {type(norm) for norm in (parts.embed_norm, parts.hidden_norm, parts.norm)}
    join, ending = _join(parts.join), plans.ending_of(parts.norm, parts.words, parts.tied)
    if ending is None or kinds != {nn.RMSNorm} or None in (layer, words, *norms, join):
        return None
    entry = {"embedding": words, "join": (*norms, join, not parts.embedding_first)}
    rows = plans.segments_of(
        [parts.block], [layer], range(1), entry | {"last": True}, replace(ending, hidden=True)
    )
    run = rows[0] if rows[0].pager is None else Pages(rows)
    return _Plan(run, parts.block["mlp"].top_k, all(row.kept for row in rows))


def _join(join: nn.Module) -> Any:
    if type(join) is nn.Linear:
        weight = join["weight"]
        return None if "bias" in join or not float32(weight) else ([(weight, None, None)], 0, 0, "")
    return group(join)
