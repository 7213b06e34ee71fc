"""The demo run layer by layer with any of its experts left out, from the states of a kept pass.

    demo = Demo()
    text = demo.text("def ", 48)              # passes, what they chose and what rows start from
    demo.layer(3, x, again(text.before[5][3]), have)

For `tools.ahead_table`. All of its experts are in memory; those that `have` says are not at hand
weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mtp.draft import Drafter
from mtp.hidden import take, watch
from streamer.guess import Router, sources_of
from streamer.loading import load_streamed, open_tokenizer
from streamer.run import DEMO

Have = Callable[[int, np.ndarray], np.ndarray]  # layer, ids [k] -> whether each is at hand
Row = tuple[mx.array, np.ndarray, mx.array, mx.array]  # see `Demo.layer`


@dataclass
class Text:
    """tokens: put in, of each pass; drafts: for the pass after it; chosen[pass][layer]: [k];
    before[pass][layer]: states of the layer's cache; taken: the router's input."""

    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    chosen: list[list[np.ndarray]] = field(default_factory=list)
    before: list[list[Any]] = field(default_factory=list)
    taken: list[list[mx.array]] = field(default_factory=list)
    opened: list[list[mx.array]] = field(default_factory=list)  # the residual there


class Demo:
    """The embedded model, run layer by layer with any of its experts left out."""

    def __init__(self) -> None:
        self.model: Any = load_streamed(DEMO, slots=None, dtype="auto", mtp=True)
        self._inner = self.model.language_model.model
        self.layers = self._inner.layers
        self.head = self.model.streamer.opened.head
        watch(self.head.trunk.norm)
        experts = [e for e in self.model.streamer.opened.layers if e.path.startswith("lang")]
        self.counts = [e.count for e in experts]
        self.total = sum(self.counts)
        self.top_k = self.layers[0].mlp.top_k
        router = sources_of("router", self.model, experts, self.top_k)["router"]
        assert isinstance(router, Router)
        self.router = router

    def text(self, prompt: str, count: int) -> Text:
        """`count` passes after a prompt, greedily."""
        ids = list(open_tokenizer(self.model.streamer.opened).encode(prompt))
        cache = make_prompt_cache(self.model)
        drafter, out, norm = Drafter(self.head, 1), Text(), self.head.trunk.norm
        self.model(mx.array([ids[:-1]]), cache=cache)
        drafter.note(take(norm, self.head.hidden), mx.array(ids[1:]))
        token = ids[-1]
        for _ in range(count):
            draft = drafter.draft(1, lambda logits, _: _best(logits[0, -1]))[0]
            out.tokens.append(token)
            out.drafts.append(draft)
            out.before.append([_held(c) for c in cache])
            x, chosen, taken, opened = self.embed(token), [], [], []
            for at in range(len(self.layers)):
                x, ids_at, normed, residual = self.layer(at, x, cache[at])
                chosen.append(ids_at)
                taken.append(normed)
                opened.append(residual)
            out.chosen.append(chosen)
            out.taken.append(taken)
            out.opened.append(opened)
            hidden = self._inner.norm(x)
            token = _best(self.model.language_model.lm_head(hidden)[0, -1])
            drafter.note(take(norm, self.head.hidden), mx.array([token]))
        out.before.append([_held(c) for c in cache])
        return out

    def embed(self, token: int) -> mx.array:
        return self._inner.embed_tokens(mx.array([[token]]))

    def layer(self, at: int, x: mx.array, cache: Any, have: Have | None = None) -> Row:
        """(output, ids [k], the router's input, residual there) of a row."""
        layer = self.layers[at]
        half = layer.linear_attn if layer.is_linear else layer.self_attn
        h = x + half(layer.input_layernorm(x), None, cache)
        y = layer.post_attention_layernorm(h)
        out, ids = self.experts(at, h, y, have)
        return out, ids, y, h

    def experts(
        self, at: int, h: mx.array, y: mx.array, have: Have | None
    ) -> tuple[mx.array, np.ndarray]:
        block = self.layers[at].mlp
        gates = mx.softmax(block.gate(y), axis=-1, precise=True)
        inds = mx.argpartition(gates, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        scores = mx.take_along_axis(gates, inds, axis=-1)
        if block.norm_topk_prob:
            scores = scores / scores.sum(axis=-1, keepdims=True)
        ids = np.array(inds).reshape(-1)
        if have is not None:
            scores = scores * mx.array(have(at, ids).astype(np.float32))
        routed = (block.switch_mlp(y, inds) * scores[..., None]).sum(axis=-2)
        shared = mx.sigmoid(block.shared_expert_gate(y)) * block.shared_expert(y)
        return h + routed + shared, ids


def _best(logits: mx.array) -> int:
    return int(np.argmax(np.array(logits)))


def _held(cache: Any) -> Any:
    if isinstance(cache, KVCache):
        held = (cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :])
    else:
        held = tuple(cache.cache)
    mx.eval(held)
    return type(cache), held


def again(state: Any) -> Any:
    """A cache that holds what it held."""
    kind, (first, second) = state
    if kind is KVCache:
        cache = KVCache()
        cache.keys, cache.values, cache.offset = first, second, first.shape[2]
        return cache
    cache = ArraysCache(2)
    cache.cache = [first, second]
    return cache
