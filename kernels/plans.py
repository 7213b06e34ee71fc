"""Qwen3.5's model in as few operations as can be: which of its layers make a segment.

Embedding, all layers, the last norm and the head are one operation where every expert is in memory,
for passes of up to `ROWS` rows. Layers that do not fit (other caches, a rehearsal's layers) run one
by one, as `kernels.qwen` has them, with the same bits; so do longer passes. A plan is made once for
a model and used while its modules hold the very arrays that it was made of.

    python -m pytest tests/test_kernels_segments.py
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.base import create_attention_mask, create_ssm_mask
from mlx_lm.models.cache import ArraysCache, KVCache

from . import backend, qwen
from .routed import FUSED_FLOATS, fused_width, paged_moe, whole_moe
from .segments import Pager, Pages, Row, Seen, Tape
from .weights import MLXLM, float32, form_of, group, unchanged

TOKENS = (mx.int32, mx.uint32)
ROWS = 8  # of a sequence, at most
Kinds = tuple[type, ...]  # of the caches, and of the layers
Masks = tuple[Any, Any]  # of gated delta nets, of attention
Run = Callable[[mx.array, Sequence[Any], Masks], mx.array]

# Whoever set it takes rows of passes on its thread back: segments are to say what they did.
tape: tuple[Tape, int] | None = None


def text_model(
    self: nn.Module,
    inputs: mx.array,
    cache: Sequence[Any] | None = None,
    input_embeddings: mx.array | None = None,
) -> mx.array:
    """Qwen3.5's TextModel: tokens [B, T] -> logits [B, T, V]."""
    plain = input_embeddings is None and cache is not None and not self.training
    if plain and inputs.ndim == 2 and inputs.size and inputs.shape[1] <= ROWS:
        assert cache is not None
        plan = _plan(self, cache)
        if plan is not None and plan.takes(inputs):
            return plan(inputs, cache, None if tape is None else tape[0])
    return MLXLM["text"](self, inputs, cache, input_embeddings)


@dataclass(frozen=True)
class Plan:
    """How a model's layers run: in order, each taking what the one before gave."""

    masks: Callable[[mx.array, Sequence[Any]], Masks]
    embed: Callable[[mx.array], mx.array] | None  # None: part of the first run
    runs: list[Row | Pages | Run]
    last: Callable[[mx.array], mx.array] | None  # norm and head, None: part of the last
    top_k: int
    width: int  # of what the experts of a row give in between
    kept: bool  # all weights are there

    @property
    def paged(self) -> bool:
        """Then for one sequence only."""
        return any(isinstance(run, Pages) for run in self.runs)

    def takes(self, tokens: mx.array) -> bool:
        """Whether it is for tokens [B, T]."""
        rows = tokens.size
        if rows * self.width > FUSED_FLOATS:
            return False
        if tokens.shape[0] > 1 and self.paged:
            return False
        pages = (run for run in self.runs if isinstance(run, Pages))
        return all(run.takes(rows * self.top_k) for run in pages)

    def __call__(self, tokens: mx.array, cache: Sequence[Any], tape: Tape | None) -> mx.array:
        x = tokens if tokens.dtype in TOKENS else tokens.astype(mx.int32)
        masks = self.masks(x, cache)
        if self.embed is not None:
            x = self.embed(x)
        for run in self.runs:
            if not isinstance(run, Row | Pages):
                x = run(x, cache, masks)
            elif tape is None:
                x = run([x], cache)[0]
            else:
                x = run.soon([x], cache, tape)[0]
        return x if self.last is None else self.last(x)


def _plan(self: nn.Module, cache: Sequence[Any]) -> Plan | None:
    """The model's plan for such caches, made again where anything of the model has changed."""
    if tape is not None and tape[1] != threading.get_ident():
        return None  # what is replaced meanwhile is another's
    if tape is None and qwen3_5.gated_delta_update is not qwen.gated_delta_update:
        return None  # somebody keeps a tape of layers
    if qwen.keep_half is not None:
        return None  # somebody stands before the layers
    parts = self["model"], self.get("lm_head")
    # By layers too: a rehearsal changes their classes and changes them back.
    kinds = (*map(_kind, cache), *map(type, parts[0]["layers"]))
    plan: Plan | None = unchanged(self, kinds, parts, lambda: _made(self, kinds))
    states = (c for c in cache if isinstance(c, ArraysCache))
    padded = any(c.lengths is not None or c.left_padding is not None for c in states)
    return None if padded else plan


def _kind(cache: Any) -> type:
    """Its class, or what it is while somebody watches it."""
    return getattr(type(cache), "stands_for", type(cache))


def _made(self: nn.Module, kinds: Kinds) -> Plan | None:
    """A plan, None where no two layers would be in one operation."""
    inner = self["model"]
    layers = inner["layers"]
    if inner.pipeline_size != 1 or self.sharding_group is not None:
        return None
    if 2 * len(layers) != len(kinds):
        return None
    parts = [parts_of_layer(*pair) for pair in zip(layers, kinds, strict=False)]
    runs: list[Row | Pages | Run] = []
    at, kept = 0, True
    lm_head = self.get("lm_head")
    embed: Callable[[mx.array], mx.array] | None = inner["embed_tokens"]
    head = inner["embed_tokens"] if lm_head is None else lm_head
    last: Callable[[mx.array], mx.array] | None = _ending(inner, lm_head)
    while at < len(layers):
        end = at
        while end < len(layers) and parts[end] is not None:
            end += 1
        if end == at:
            runs.append(_layer(layers[at], at))
            at += 1
            continue
        first: dict[str, Any] = {}
        last_part: Ending | None = None
        if at == 0 and (words := embedding_of(inner["embed_tokens"])) is not None:
            embed, first = None, {"embedding": words}
        elif at == 0:
            embed = _wide(inner["embed_tokens"])
        if end == len(layers) and (last_part := ending_of(inner["norm"], head, lm_head is None)):
            last = None
        rows = segments_of(layers, parts, range(at, end), first, last_part)
        kept = kept and all(row.kept for row in rows)
        runs.append(rows[0] if rows[0].pager is None else Pages(rows))
        at = end
    if all(not isinstance(run, Row | Pages) for run in runs):
        return None
    masks = _masks(inner, any(not isinstance(run, Row | Pages) for run in runs))
    blocks = [layer["mlp"] for layer, found in zip(layers, parts, strict=True) if found]
    return Plan(
        masks,
        embed,
        runs,
        last,
        max(block.top_k for block in blocks),
        max(map(fused_width, blocks)),
        kept,
    )


@dataclass(frozen=True)
class Ending:
    """The last norm and the head as arguments of an op, and who is told of hidden states.

    hidden: whether the op gives them.
    """

    op: tuple[Any, Any]
    seen: Seen | None
    hidden: bool


def segments_of(
    layers: Sequence[nn.Module],
    parts: Sequence[Any],
    indices: range,
    entry: dict[str, Any],
    ending: Ending | None,
) -> list[Row]:
    """Segments of these layers, each but the last ending with a choice to be looked up.

    entry: what the first begins with.
    """
    native = backend.native()
    assert native is not None
    width = layers[0]["input_layernorm"]["weight"].shape[0]
    rows: list[Row] = []
    ops: list[Any] = []
    held: list[tuple[int, bool]] = []
    begins = dict(entry)
    for i in indices:
        first, second, pager = parts[i]
        held.append((i, layers[i].is_linear))
        ops.append(first)
        if pager is None:
            ops.append(second)
            continue
        rows.append(Row(native.Segment(width, ops, router=second, **begins), held, layers, pager))
        ops, held, begins = [], [], {"chosen": second}
    if ending is not None:
        begins |= {"head": ending.op, "hidden": ending.hidden}
    seen = None if ending is None else ending.seen
    rows.append(Row(native.Segment(width, ops, **begins), held, layers, None, seen))
    return rows


def _ending(inner: nn.Module, lm_head: nn.Module | None) -> Callable[[mx.array], mx.array]:
    head = inner["embed_tokens"].as_linear if lm_head is None else lm_head
    return lambda x: head(inner["norm"](x))


def _masks(inner: nn.Module, alone: bool) -> Callable[[mx.array, Sequence[Any]], Masks]:
    """What the model makes for layers that run alone."""

    def made(x: mx.array, cache: Sequence[Any]) -> Masks:
        return (
            create_ssm_mask(x, cache[inner.ssm_idx]),
            create_attention_mask(x, cache[inner.fa_idx]),
        )

    return made if alone else lambda x, cache: (None, None)


def _wide(embedding: nn.Module) -> Callable[[mx.array], mx.array]:
    """Rows as ops take them: MLX's are bfloat16, which is exact, where scales are bytes."""
    return lambda tokens: embedding(tokens).astype(mx.float32)


def _layer(layer: nn.Module, index: int) -> Run:
    return lambda x, cache, masks: layer(x, masks[not layer.is_linear], cache[index])


def embedding_of(embedding: nn.Module) -> Any:
    """What an op looks tokens up in, None where it cannot."""
    if type(embedding) is nn.Embedding:
        weight = embedding["weight"]
        return ([(weight, None, None)], 0, 32, "") if float32(weight) else None
    if not isinstance(embedding, nn.QuantizedEmbedding) or embedding.mode != "affine":
        return None
    arrays = embedding["weight"], embedding["scales"], embedding["biases"]
    gives = getattr(type(embedding), "gives", None)  # where rows are wider than scales
    form = form_of(embedding.mode, embedding.group_size, embedding.bits)
    wide = float32(*arrays[1:]) if gives is None else gives == mx.float32
    return ([arrays], *form) if form and wide else None


def norm_of(norm: nn.Module) -> Any:
    """A norm as an argument of an op, None where there is no kernel."""
    return (norm["weight"], norm.eps) if float32(norm["weight"]) else None


def ending_of(norm: nn.Module, head: nn.Module, tied: bool) -> Ending | None:
    """The last norm and the head (tied: an embedding), None where there is no kernel.

    A norm of a class that has `seen` is told what it would have taken and given.
    """
    seen = getattr(norm, "seen", None)
    kind = type(norm) if seen is None else type(norm).__mro__[1]
    plain = type(head) is nn.QuantizedLinear
    if tied:
        plain = getattr(type(head), "as_linear", None) is nn.QuantizedEmbedding.as_linear
    if kind is not nn.RMSNorm or not plain:
        return None
    own, found = norm_of(norm), group(head)
    if own is None or found is None:
        return None
    return Ending((own, found), seen, seen is not None)


def parts_of_layer(
    layer: nn.Module, kind: type, moe: Any = qwen3_next.Qwen3NextSparseMoeBlock
) -> tuple[Any, Any, Pager | None] | None:
    """The ops of a layer's halves and who pages its experts, None where it must run on its own.

    kind: of its cache; moe: of its block of experts.
    """
    if type(layer) is not qwen3_5.DecoderLayer:
        return None
    block, norm = layer["mlp"], layer["post_attention_layernorm"]
    if type(block) not in (moe,) or block.sharding_group is not None:
        return None
    if not float32(norm["weight"]):
        return None
    first = None
    if layer.is_linear and kind is ArraysCache:
        net = layer["linear_attn"]
        if type(net) is qwen3_5.GatedDeltaNet and net.head_k_dim in qwen.KEY_WIDTHS:
            first = qwen.whole_delta(net, layer["input_layernorm"])
        if net.sharding_group is not None:
            return None
    elif not layer.is_linear and kind is KVCache:
        first = qwen.whole_attention(layer["self_attn"], layer["input_layernorm"])
    pager = getattr(block["switch_mlp"], "pager", None)
    second = whole_moe(block, 1, norm) if pager is None else paged_moe(block, pager.switch, norm)
    return None if first is None or second is None else (first, second, pager)
