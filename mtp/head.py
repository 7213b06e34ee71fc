"""An MTP head: from the trunk's hidden state and the next token to the token after it.

    embedded, hidden -> norms -> concatenate -> join -> blocks -> norm -> the trunk's lm_head

Every family's head has this shape; `mtp.families` says how each fills it in and
`mtp.find` builds one from a checkpoint's weights. The blocks are mlx-lm's own
layers, so a routed expert in a head is paged like any other. Knows nothing of
disks, sampling or acceptance.

    python -c "from mtp.families import FAMILIES; print(*sorted(FAMILIES))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as memo
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from kernels import heads

Hidden = Literal["post_norm", "pre_norm"]
Leave = Literal["all", "last", "none"]  # the rows whose output is wanted; all leave keys and values


@dataclass(frozen=True)
class Trunk:
    """What a head borrows from its model.

    inner: the module that ends in `norm`; embed: tokens [B, T] -> [B, T, D];
    words: what gives logits of normed hidden states, and whether it is the embedding.
    """

    inner: nn.Module
    norm: nn.Module
    embed: Callable[[mx.array], mx.array]
    words: Callable[[], tuple[nn.Module, bool]]

    def logits(self, normed: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, V]."""
        module, tied = self.words()
        return module.as_linear(normed) if tied else module(normed)  # type: ignore[operator]


def trunk_of(model: nn.Module) -> Trunk:
    """The parts of an mlx-lm model, by the names its files use for them."""
    outer: Any = getattr(model, "language_model", model)
    inner = outer.model if hasattr(outer, "model") else outer.backbone
    embedding = inner.embed_tokens if "embed_tokens" in inner else inner.embeddings
    norm = inner.norm if "norm" in inner else inner.norm_f

    def words() -> tuple[nn.Module, bool]:
        # looked up at each call: quantizing or swapping replaces the module
        return (outer["lm_head"], False) if "lm_head" in outer else (embedding, True)

    return Trunk(inner, norm, embedding, words)


class Unit(nn.Module):
    """One trained step of a head; most heads have one and repeat it.

    embed_norm, hidden_norm: of the two inputs; join: 2D -> D; blocks: decoder
    layers; norm: before the lm_head.
    """

    def __init__(
        self,
        norms: Callable[[], nn.Module],
        width: int,
        blocks: Sequence[nn.Module],
        caches: Sequence[Callable[[], Any] | None] | None = None,
        *,
        norm: nn.Module | None = None,
        lm_head: nn.Module | None = None,
        embedding_first: bool = True,
        window: int | None = None,
        mask_array: bool = False,
    ):
        """norms: makes a norm of `width`. caches: for each block what makes its cache, None for
        one without attention; a KVCache each when left out. norm: the trunk's, where the unit
        has none; lm_head: the unit's own. window: rows that attention reaches back, on caches
        that can be cut back all the same; mask_array: the blocks take no mask by name.
        """
        super().__init__()
        self.embed_norm, self.hidden_norm = norms(), norms()
        if norm is None:
            self.norm = norms()
        else:
            self.__dict__["norm"] = norm  # past nn.Module: not this module's parameter
        if lm_head is not None:
            self.lm_head = lm_head
        self.join = nn.Linear(2 * width, width, bias=False)
        self.blocks = list(blocks)
        self._caches = tuple(caches or [KVCache] * len(self.blocks))
        self._embedding_first = embedding_first
        self._window, self._mask_array = window, mask_array
        self._tail = max((i for i, make in enumerate(self._caches) if make), default=-1)
        # what follows the last attention sees single rows only: it may be left out of the others
        if self._tail >= 0 and "mlp" in (block := self.blocks[self._tail]):
            block.mlp.__dict__["_leave"] = "all"
            block.mlp.__class__ = _leaving(block.mlp.__class__)

    def parts(self, trunk: Trunk) -> heads.Parts | None:
        """What a step of one block is made of, for who runs it as one operation."""
        if len(self.blocks) != 1 or self._window is not None:
            return None
        words, tied = (self["lm_head"], False) if "lm_head" in self else trunk.words()
        return heads.Parts(
            trunk.embed,
            self["embed_norm"],
            self["hidden_norm"],
            self["join"],
            self._embedding_first,
            self.blocks[0],
            self.norm,
            words,
            tied,
        )

    def make_cache(self) -> list[Any]:
        return [make() for make in self._caches if make is not None]

    def __call__(
        self,
        embedded: mx.array,
        hidden: mx.array,
        cache: Sequence[Any],
        leave: Leave = "all",
    ) -> mx.array:
        """[B, T, D] twice -> [B, T, D] before `norm`; the caches grow by T.

        leave: "last" gives [B, 1, D], "none" that of no use; no more than keys and values are
        computed for the other rows, and none of their experts is read.
        """
        pair = [self.embed_norm(embedded), self.hidden_norm(hidden)]
        x = self.join(mx.concatenate(pair if self._embedding_first else pair[::-1], axis=-1))
        left = iter(cache)
        for i, (block, make) in enumerate(zip(self.blocks, self._caches, strict=True)):
            if make is None:
                x = block(x)
                continue
            own = next(left)
            first = own if hasattr(own, "offset") else own[0]
            mask = create_attention_mask(
                x, first, window_size=self._window, return_array=self._mask_array
            )
            if i < self._tail or leave == "all":
                x = block(x, mask, own)
                continue
            x = self._last_attention(block, leave)(x, mask, own)[:, -1:]
            if leave == "none":
                break
        return x

    def _last_attention(self, block: nn.Module, leave: Leave) -> Callable[..., mx.array]:
        def call(*args: Any) -> mx.array:
            if "mlp" not in block:
                return block(*args)
            block.mlp.__dict__["_leave"] = leave
            try:
                return block(*args)  # its sum with the other rows means nothing
            finally:
                block.mlp.__dict__["_leave"] = "all"

        return call


@memo
def _leaving(kind: type[nn.Module]) -> type[nn.Module]:
    """A feed-forward part that can leave out all rows but the last: [B, T, D] -> [B, 1, D]."""

    def call(self: Any, x: mx.array, *args: Any) -> mx.array:
        leave: Leave = self.__dict__["_leave"]
        if leave == "all":
            return kind.__call__(self, x, *args)
        x = x[:, -1:]
        return mx.zeros_like(x) if leave == "none" else kind.__call__(self, x, *args)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


class Head(nn.Module):
    """A model's MTP head.

    depth: number of distinct units; the last is applied again for deeper drafts.
    hidden: which of the trunk's hidden states it takes, after the final norm or
    before it; what it hands back for recursion is of the same kind. Families set
    it; tests change it.
    notes: decisions taken while it was built, lines for people.
    """

    hidden: Hidden = "post_norm"

    def __init__(self, trunk: Trunk, units: Sequence[Unit], hidden: Hidden):
        super().__init__()
        # past nn.Module: the trunk's parameters are not this module's
        self.__dict__["trunk"] = trunk
        self.__dict__["hidden"] = hidden
        self.__dict__["notes"] = []
        self.units = list(units)

    @property
    def depth(self) -> int:
        return len(self.units)

    def make_cache(self) -> list[Any]:
        """mlx-lm caches of the attention layers of every unit, in order; all can be trimmed."""
        return [cache for unit in self.units for cache in unit.make_cache()]

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
        """Draft one token further for each row.

        hidden: [B, T, D] of positions t..t+T-1: the trunk's of kind `self.hidden`,
        or what the step before returned. tokens: [B, T], the tokens t+1+step.. that
        follow. cache: from `make_cache`; only the unit of `step` adds rows to its own.
        Returns logits [B, T, V] of the tokens after those, and hidden [B, T, D] for
        the next step. last: logits [B, 1, V] of the last row alone. leave: rows whose logits
        and hidden are wanted; less than "all" gives one row of both, for "none" of no use.
        """
        unit = self.units[min(step, self.depth - 1)]
        if leave == "last" or (leave == "all" and tokens.size == 1):
            own = self.cache_of(cache, step)
            parts = unit.parts(self.trunk)
            whole = None if parts is None else heads.step(unit, parts, tokens, hidden, own)
            if whole is not None:
                logits, x, normed = whole
                return logits, normed if self.hidden == "post_norm" else x
        x = unit(self.trunk.embed(tokens), hidden, self.cache_of(cache, step), leave)
        normed = unit.norm(x)
        ends = normed[:, -1:] if last else normed
        logits = unit.lm_head(ends) if "lm_head" in unit else self.trunk.logits(ends)
        return logits, normed if self.hidden == "post_norm" else x

    def cache_of(self, cache: list[Any], step: int) -> list[Any]:
        """The part of `cache` that the unit of `step` writes."""
        sizes = [len(unit.make_cache()) for unit in self.units]
        at = min(step, self.depth - 1)
        return cache[sum(sizes[:at]) : sum(sizes[: at + 1])]
