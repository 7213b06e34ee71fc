"""A drafter with no keys and values of its own: its layers read those of the trunk's caches.

    [embed(token t+1), h_t] -> join -> layers over the trunk's KV -> norm -> words
                                                                  -> back -> h of the next draft

Gemma 4's assistant. It stands where a `Head` stands: `mtp.draft.Drafter` gives it hidden
states and tokens, and its own cache is empty, so that nothing is to be trimmed or
rebuilt. Every draft of a block is made from the same position, that of the last token,
which the trunk has not run yet; so the rows it reads are all verified. The caches are
those of the trunk's last pass: several sequences that take turns on one model
draft badly, never wrongly.

    python -m streamer.head --model PATH      # of a Gemma 4 with mtp.safetensors beside it
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache as memo
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .head import Head, Leave, Trunk

FULL, SLIDING = "full_attention", "sliding_attention"
_CACHES = "_mtp_caches"

KeysValues = tuple[Any, Any]


class AssistantUnit(nn.Module):
    """The drafter's parameters.

    join: 2D -> d; blocks: decoder layers without k and v; back: d -> D; words: [V, d],
    embedding of the tokens that are chosen from, used as the lm_head alone. Where the
    tokens lie in clusters (E2B, E4B), `centroids` scores them, d -> clusters, and `order`
    [V] holds the tokens of one after the other: only those of the best `CLUSTERS` are scored.
    """

    CLUSTERS = 32  # centroid_intermediate_top_k of every published assistant

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        backbone: int,
        width: int,
        vocabulary: int,
        clusters: int = 0,
    ):
        """backbone: D of the trunk; width: d; clusters: 0 where there are none."""
        super().__init__()
        self.join = nn.Linear(2 * backbone, width, bias=False)
        self.blocks = list(blocks)
        self.norm = norm
        self.back = nn.Linear(width, backbone, bias=False)
        self.words = nn.Embedding(vocabulary, width)
        if clusters:
            self.centroids = nn.Linear(width, clusters, bias=False)
            self.order = mx.zeros((vocabulary,), dtype=mx.int64)

    def make_cache(self) -> list[Any]:
        return []

    def __call__(
        self, embedded: mx.array, hidden: mx.array, shared: dict[str, KeysValues], position: int
    ) -> mx.array:
        """[B, 1, D] twice -> [B, 1, d] after `norm`. shared: keys and values by type of layer."""
        x = self.join(mx.concatenate([embedded, hidden], axis=-1))
        at = mx.array(position)
        for block in self.blocks:
            x, _, _ = block(x, None, None, shared_kv=shared[block.layer_type], offset=at)
        return self.norm(x)

    def logits(self, normed: mx.array) -> mx.array:
        """[B, 1, d] -> [B, 1, V]; tokens of other clusters get one less than the least."""
        if "centroids" not in self:
            return self.words.as_linear(normed)
        clusters = self.order.reshape(self.centroids.weight.shape[0], -1)
        scores = self.centroids(normed)
        best = mx.argpartition(-scores, min(self.CLUSTERS, len(clusters)) - 1, axis=-1)
        tokens = clusters[best[..., : self.CLUSTERS]].reshape(*normed.shape[:-1], -1)
        scored = (self.words(tokens) @ normed[..., None])[..., 0]
        others = mx.full((*normed.shape[:-1], self.order.size), scored.min() - 1, scored.dtype)
        return mx.put_along_axis(others, tokens, scored, axis=-1)


class Assistant(Head):
    """An `AssistantUnit` where the engine expects a head."""

    def __init__(self, trunk: Trunk, unit: AssistantUnit):
        units: list[Any] = [unit]
        super().__init__(trunk, units, "post_norm")
        watch(trunk.inner)

    def __call__(
        self,
        hidden: mx.array,
        tokens: mx.array,
        cache: list[Any],
        step: int = 0,
        *,
        last: bool = False,
        leave: Leave = "all",
    ) -> tuple[mx.array, mx.array]:
        """As `Head`'s, of the last row alone whatever is asked for: [B, 1, V] and [B, 1, D].

        hidden: of the last row that the trunk's caches hold; tokens: the one after it.
        """
        unit: Any = self.units[0]
        inner = self.trunk.inner
        seen = read(inner)
        if seen is None:  # any draft will do: it is verified
            return mx.zeros((*tokens[:, -1:].shape, unit.words.weight.shape[0])), hidden[:, -1:]
        shared, position = seen
        embedded = self.trunk.embed(tokens[:, -1:]) * inner.embed_scale
        normed = unit(embedded, hidden[:, -1:], shared, position)
        return unit.logits(normed), unit.back(normed)


def watch(inner: nn.Module) -> None:
    """From now on mlx-lm's Gemma 4 text model remembers the caches of its last pass."""
    if not hasattr(inner, _CACHES):
        inner.__dict__[_CACHES] = {}  # past nn.Module: no parameter
        inner.__class__ = _watched(type(inner))


def read(inner: Any) -> tuple[dict[str, KeysValues], int] | None:
    """What the last layer of either type that has a cache holds, and how many rows were run.

    Keys and values [B, H, T, D]; of a sliding layer the window's rows, in any order. None
    where the caches of the last pass are gone, or it had none.
    """
    caches = {kind: ref() for kind, ref in inner.__dict__[_CACHES].items()}
    if not caches or None in caches.values():
        return None
    window = inner.window_size
    shared = {kind: one.keys_and_values() for kind, one in caches.items()}
    if SLIDING in shared and shared[SLIDING][0].shape[2] > window:
        # a pass of several rows leaves them in order, and more than the window
        keys, values = shared[SLIDING]
        shared[SLIDING] = keys[..., -window:, :], values[..., -window:, :]
    return shared, int(caches[FULL].offset)


@memo
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, inputs: Any = None, cache: Any = None, **options: Any) -> mx.array:
            # a later layer of the same type overrules; weak, as conversations end
            own = zip(self.layers, cache or (), strict=False)
            self.__dict__[_CACHES] = {
                layer.layer_type: weakref.ref(one) for layer, one in own if one is not None
            }
            return super().__call__(inputs, cache=cache, **options)

    return Watched
