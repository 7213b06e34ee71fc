"""Qwen3.5's decoder layers in a row as one operation: a step of one token in as few as can be.

Embedding, all layers, the last norm and the head are one operation where every expert is in memory.
Where experts are paged a segment ends with what a router chose and the next begins with those
experts, computed at once and not by MLX's graph, since the choice is read back anyway. Layers that
do not fit (other caches, a tape, a rehearsal's layers) run one by one, as `kernels.qwen` has them,
with the same bits; so do passes over several tokens. An operation is made once for a model and used
while its modules hold the very arrays that it was made of.

    python -m pytest tests/test_kernels_segments.py
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.base import create_attention_mask, create_ssm_mask
from mlx_lm.models.cache import ArraysCache, KVCache

from . import backend, qwen
from .routed import paged_moe, whole_moe
from .weights import MLXLM, float32, form_of, group

TOKENS = (mx.int32, mx.uint32)
Kinds = tuple[type, ...]  # of the caches, and of the layers
Masks = tuple[Any, Any]  # of gated delta nets, of attention
Run = Callable[[mx.array, Sequence[Any], Masks], mx.array]
Arrivals = Sequence[tuple[Sequence[int], Any]]  # pairs of row and choice, the ticket of their reads


class Pager(Protocol):
    """What stands behind a switch whose experts are paged: `switch.pager`, where it has one."""

    switch: nn.Module  # mlx-lm's, over slots

    def fetch(self, ids: mx.array, x: mx.array) -> tuple[mx.array, Arrivals]:
        """For experts [1, 1, k] of the router's x, evaluated: slots, int32, those being read."""

    def arrived(self, waited: float) -> None:
        """What was fetched has been used; seconds waited for it. Raises where a read failed."""

    def idle(self) -> bool:
        """Whether to rehearse what follows while that which was fetched is still being read."""

    def guess(self, ids: mx.array) -> mx.array:
        """Rehearsed ids: their slots, int32, -1 where one is absent; its read may be begun."""

    def goes_on(self) -> bool:
        """Whether to rehearse one more."""


def text_model(
    self: nn.Module,
    inputs: mx.array,
    cache: Sequence[Any] | None = None,
    input_embeddings: mx.array | None = None,
) -> mx.array:
    """Qwen3.5's TextModel: tokens [B, T] -> logits [B, T, V]."""
    plain = input_embeddings is None and cache is not None and not self.training
    if plain and inputs.ndim == 2 and inputs.shape[1] == 1 and inputs.size:
        assert cache is not None
        plan = _plan(self, cache)
        if plan is not None and (inputs.size == 1 or not plan.paged):
            return plan(inputs, cache)
    return MLXLM["text"](self, inputs, cache, input_embeddings)


@dataclass(frozen=True)
class Plan:
    """How a model's layers run: in order, each taking what the one before gave."""

    masks: Callable[[mx.array, Sequence[Any]], Masks]
    embed: Callable[[mx.array], mx.array] | None  # None: part of the first run
    runs: list[Run]
    last: Callable[[mx.array], mx.array] | None  # norm and head, None: part of the last
    paged: bool  # then for one row only
    kept: bool  # all weights are there

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        x = tokens if tokens.dtype in TOKENS else tokens.astype(mx.int32)
        masks = self.masks(x, cache)
        if self.embed is not None:
            x = self.embed(x)
        for run in self.runs:
            x = run(x, cache, masks)
        return x if self.last is None else self.last(x)


@dataclass(frozen=True)
class _Kept:
    """A plan, or that there is none, and what it was made of."""

    parts: tuple[Any, ...]
    unchanged: Any
    plan: Plan | None

    def holds(self, parts: tuple[Any, ...]) -> bool:
        return all(map(operator.is_, self.parts, parts)) and self.unchanged.holds()


_plans: dict[int, tuple[weakref.ref[Any], dict[Kinds, _Kept]]] = {}


def _plan(self: nn.Module, cache: Sequence[Any]) -> Plan | None:
    """The model's plan for such caches, made again where anything of the model has changed."""
    if qwen3_5.gated_delta_update is not qwen.gated_delta_update:
        return None  # somebody keeps a tape
    if qwen.keep_half is not None:
        return None  # somebody stands before the layers
    number = id(self)
    if number not in _plans:
        _plans[number] = weakref.ref(self, lambda _: _plans.pop(number, None)), {}
    parts = self["model"], self.get("lm_head")
    # By layers too: a rehearsal changes their classes and changes them back.
    plans, kinds = _plans[number][1], (*map(type, cache), *map(type, parts[0]["layers"]))
    held = plans.get(kinds)
    if held is None or not held.holds(parts):
        plan = _made(self, kinds)
        if plan is not None and not plan.kept:  # it would hold what its weights come from
            return None
        containers = [c for part in parts if part is not None for c in _containers(part)]
        unchanged = backend.native().Unchanged(containers)  # type: ignore[union-attr]
        held = plans[kinds] = _Kept(parts, unchanged, plan)
    padded = any(
        c.lengths is not None or c.left_padding is not None for c in cache if type(c) is ArraysCache
    )
    return None if padded else held.plan


def _containers(found: Any) -> Iterator[Any]:
    """All modules, dictionaries and lists in `found`."""
    if isinstance(found, dict | list):
        yield found
        for value in found.values() if isinstance(found, dict) else found:
            yield from _containers(value)


def _made(self: nn.Module, kinds: Kinds) -> Plan | None:
    """A plan, None where no two layers would be in one operation."""
    inner = self["model"]
    layers = inner["layers"]
    if inner.pipeline_size != 1 or self.sharding_group is not None:
        return None
    if 2 * len(layers) != len(kinds):
        return None
    parts = [_parts_of_layer(*pair) for pair in zip(layers, kinds, strict=False)]
    runs: list[Run] = []
    at, kept = 0, True
    lm_head = self.get("lm_head")
    embed: Callable[[mx.array], mx.array] | None = inner["embed_tokens"]
    last: Callable[[mx.array], mx.array] | None = _ending(inner, lm_head)
    while at < len(layers):
        end = at
        while end < len(layers) and parts[end] is not None:
            end += 1
        if end == at:
            runs.append(_layer(layers[at], at))
            at += 1
            continue
        first = last_part = None
        if at == 0 and (first := _embedding(inner["embed_tokens"])) is not None:
            embed = None
        if end == len(layers) and (last_part := _head(inner, lm_head)) is not None:
            last = None
        rows = _rows(layers, parts, range(at, end), first, last_part)
        kept = kept and all(row.kept for row in rows)
        runs.append(rows[0] if rows[0].pager is None else Pages(rows))
        at = end
    if all(not isinstance(run, Row | Pages) for run in runs):
        return None
    paged = any(isinstance(run, Pages) for run in runs)
    masks = _masks(inner, any(not isinstance(run, Row | Pages) for run in runs))
    return Plan(masks, embed, runs, last, paged, kept)


def _rows(
    layers: Sequence[nn.Module], parts: Sequence[Any], indices: range, embedding: Any, head: Any
) -> list[Row]:
    """Segments of these layers, each but the last ending with a choice to be read back."""
    native = backend.native()
    assert native is not None
    width = layers[0]["input_layernorm"]["weight"].shape[0]
    rows: list[Row] = []
    ops: list[Any] = []
    held: list[tuple[int, bool]] = []
    options: dict[str, Any] = {} if embedding is None else {"embedding": embedding}
    for i in indices:
        first, second, pager = parts[i]
        held.append((i, layers[i].is_linear))
        ops.append(first)
        if pager is None:
            ops.append(second)
            continue
        rows.append(Row(native.Segment(width, ops, router=second, **options), held, layers, pager))
        ops, held, options = [], [], {"chosen": second}
    if head is not None:
        options["head"] = head
    rows.append(Row(native.Segment(width, ops, **options), held, layers, None))
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


def _layer(layer: nn.Module, index: int) -> Run:
    return lambda x, cache, masks: layer(x, masks[not layer.is_linear], cache[index])


def _embedding(embedding: nn.Module) -> Any:
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


def _head(inner: nn.Module, lm_head: nn.Module | None) -> Any:
    """The last norm and the head, None where somebody watches the norm or there is no kernel."""
    norm = inner["norm"]
    head = inner["embed_tokens"] if lm_head is None else lm_head
    plain = type(head) is nn.QuantizedLinear
    if lm_head is None:
        plain = getattr(type(head), "as_linear", None) is nn.QuantizedEmbedding.as_linear
    if type(norm) is not nn.RMSNorm or not plain or not float32(norm["weight"]):
        return None
    found = group(head)
    return None if found is None else ((norm["weight"], norm.eps), found)


def _parts_of_layer(layer: nn.Module, kind: type) -> tuple[Any, Any, Pager | None] | None:
    """The ops of a layer's halves and who pages its experts, None where it must run on its own."""
    if type(layer) is not qwen3_5.DecoderLayer:
        return None
    block, norm = layer["mlp"], layer["post_attention_layernorm"]
    if type(block) is not qwen3_next.Qwen3NextSparseMoeBlock or block.sharding_group is not None:
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


class Row:
    """A segment of layers and the states that it takes and gives."""

    def __init__(
        self,
        op: Any,
        layers: list[tuple[int, bool]],
        modules: Sequence[nn.Module],
        pager: Pager | None,
    ):
        """layers: (index, whether it is a gated delta net) of each; pager: of what it ends with."""
        self._op, self._layers, self.pager = op, layers, pager
        nets = {i: modules[i]["linear_attn"] for i, linear in layers if linear}
        self._shapes = {
            i: (
                (net.conv_kernel_size - 1, net.conv_dim),
                (net.num_v_heads, net.head_v_dim, net.head_k_dim),
            )
            for i, net in nets.items()
        }
        attention = {i: modules[i]["self_attn"] for i, linear in layers if not linear}
        self._heads = {i: (net.num_key_value_heads, net.head_dim) for i, net in attention.items()}

    @property
    def kept(self) -> bool:
        return self._op.kept

    def __call__(self, x: mx.array, cache: Sequence[Any], masks: Masks) -> mx.array:
        states = self._states(x.shape, cache)
        return self._taken(self._op([x], *states), states, x.shape[1], cache)[0]

    def now(
        self, inputs: list[mx.array], cache: Sequence[Any], arrivals: Arrivals
    ) -> tuple[list[mx.array], float]:
        """What the op gives before the states, evaluated, and the seconds it waited for reads."""
        states = self._states(inputs[0].shape, cache)
        out, waited = self._op.now(inputs, *states, arrivals)
        return self._taken(out, states, inputs[0].shape[1], cache), waited

    def peek(self, inputs: list[mx.array], cache: Sequence[Any]) -> list[mx.array]:
        """What the op gives before the states, evaluated; the caches hold what they held."""
        states = self._states(inputs[0].shape, cache)
        out, _ = self._op.now(inputs, *states, ())
        return out[: len(out) - len(states[0])]  # type: ignore[no-any-return]

    def _states(
        self, shape: Sequence[int], cache: Sequence[Any]
    ) -> tuple[list[mx.array], int, list[bool]]:
        """What the caches hold, tokens in them, and which may be written where they lie."""
        batch, rows = shape[0], shape[1]
        states: list[mx.array] = []
        fresh: list[bool] = []
        offset = 0
        for i, linear in self._layers:
            one = cache[i]
            if linear:
                for slot, state in enumerate(one.cache):
                    if state is None:
                        state = mx.zeros((batch, *self._shapes[i][slot]))
                    states.append(state)
                fresh += (False, False)
            else:
                offset = one.offset
                _make_room(one, batch, rows, *self._heads[i])
                goes_on = _appended(one).goes_on(one.keys, one.values, offset)
                states += (one.keys, one.values)
                fresh += (goes_on, goes_on)
        return states, offset, fresh

    def _taken(
        self, out: list[mx.array], given: tuple[Any, int, Any], rows: int, cache: Sequence[Any]
    ) -> list[mx.array]:
        """Put the states into the caches; the others."""
        at = len(out) - len(given[0])
        states = iter(out[at:])
        for i, linear in self._layers:
            one, first, second = cache[i], next(states), next(states)
            if linear:
                one.cache[0], one.cache[1] = first, second
            else:
                one.keys, one.values, one.offset = first, second, given[1] + rows
                _appended(one).set(first, second, one.offset)
        return out[:at]


class Pages:
    """Segments with a read-back after each but the last."""

    def __init__(self, rows: list[Row]):
        self._rows = rows

    def __call__(self, x: mx.array, cache: Sequence[Any], masks: Masks) -> mx.array:
        inputs: list[mx.array] = [x]
        arrivals: Arrivals = ()
        before: Pager | None = None
        rehearsed: tuple[int, list[mx.array]] = (0, [])
        for at, row in enumerate(self._rows, 1):
            out, waited = row.now(inputs, cache, arrivals)
            if before is not None:
                before.arrived(waited)
            before = row.pager
            if before is not None:
                stream, normed, ids, scores, opening = out
                slots, arrivals = before.fetch(ids, normed)
                inputs = [stream, normed, slots, scores, opening]
                if arrivals and max(at, rehearsed[0]) + 1 < len(self._rows) and before.idle():
                    if rehearsed[0] <= at:
                        rehearsed = at, _without(inputs, arrivals)
                    rehearsed = self._rehearse(before, *rehearsed, cache)
        return out[0]

    def _rehearse(
        self, waiting: Pager, at: int, inputs: list[mx.array], cache: Sequence[Any]
    ) -> tuple[int, list[mx.array]]:
        """Run segments from `at` on with the experts at hand, for as long as `waiting` does.

        Returns the first that was not run, and what it would take.
        """
        while at + 1 < len(self._rows):
            row = self._rows[at]
            stream, normed, ids, scores, opening = row.peek(inputs, cache)
            assert row.pager is not None
            inputs, at = [stream, normed, row.pager.guess(ids), scores, opening], at + 1
            if not waiting.goes_on():
                break
        return at, inputs


def _without(inputs: list[mx.array], arrivals: Arrivals) -> list[mx.array]:
    """What a segment takes, without the experts that are still being read."""
    slots = np.array(inputs[2])
    for pairs, _ in arrivals:
        slots.reshape(-1)[list(pairs)] = -1
    return [*inputs[:2], mx.array(slots), *inputs[3:]]


def _make_room(cache: KVCache, batch: int, rows: int, heads: int, width: int) -> None:
    """As KVCache grows: by whole steps, cut to what is there first."""
    keys, offset = cache.keys, cache.offset
    if keys is not None and offset + rows <= keys.shape[2]:
        return
    more = mx.zeros((batch, heads, -(-rows // cache.step) * cache.step, width))
    if keys is None:
        cache.keys = cache.values = more
        return
    cache.keys = mx.concatenate([keys[..., :offset, :], more], axis=2)
    cache.values = mx.concatenate([cache.values[..., :offset, :], more], axis=2)


_written: dict[int, tuple[weakref.ref[Any], Any]] = {}  # by cache


def _appended(cache: KVCache) -> Any:
    """What was appended to this cache last."""
    number = id(cache)
    found = _written.get(number)
    if found is None or found[0]() is not cache:
        gone = weakref.ref(cache, lambda ref: _forget(number, ref))
        found = _written[number] = gone, backend.native().Appended()  # type: ignore[union-attr]
    return found[1]


def _forget(number: int, ref: weakref.ref[Any]) -> None:
    if number in _written and _written[number][0] is ref:
        del _written[number]
