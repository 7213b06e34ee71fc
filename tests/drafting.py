"""Heads for tests: one that drafts the true next token most of the time, on any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp.head import Hidden, Leave, Trunk, trunk_of

VOCABULARY = 320


class Rows:
    """A cache that only counts."""

    def __init__(self) -> None:
        self.offset = 0
        self.state: list[mx.array] = []

    def trim(self, n: int) -> int:
        self.offset -= n
        return n


class Oracle:
    """Knows the whole sequence; drafts it right with chance `share`, by position, and is
    more and less sure of it, right or not.

    Right only while its cache holds one row for each verified position, so that its
    acceptance shows whether rows are thrown away and rebuilt as they should be.
    """

    depth = 1
    hidden: Hidden = "post_norm"

    def __init__(self, model: nn.Module, sequence: Sequence[int], share: float = 0.7):
        self.trunk = trunk(model)
        rng = np.random.default_rng(8)
        right = rng.random(len(sequence)) < share
        other = rng.integers(0, VOCABULARY, len(sequence))
        self._says = mx.array(np.where(right, sequence, other).astype(np.int32))
        self._sure = mx.array(rng.uniform(8, 11, len(sequence)).astype(np.float32))

    def make_cache(self) -> list[Rows]:
        return [Rows()]

    def cache_of(self, cache: list[Rows], step: int) -> list[Rows]:
        return cache

    def __call__(
        self,
        hidden: mx.array,
        tokens: mx.array,
        cache: list[Rows],
        step: int = 0,
        *,
        last: bool = False,
        leave: Leave = "all",
    ) -> tuple[mx.array, mx.array]:
        assert hidden.shape[:2] == tokens.shape
        at = mx.arange(cache[0].offset, cache[0].offset + tokens.shape[1]) + 2
        cache[0].offset += tokens.shape[1]
        at = mx.minimum(at, len(self._says) - 1)
        said = mx.arange(VOCABULARY) == self._says[at][:, None]
        logits = mx.where(said, self._sure[at][:, None], 0.0)[None]
        if leave != "all":
            return logits[:, -1:], hidden[:, -1:]
        return logits[:, -1:] if last else logits, hidden


def trunk(model: Any) -> Trunk:
    """Of models whose final norm has a name that `trunk_of` does not know, too."""
    try:
        return trunk_of(model)
    except AttributeError:
        ends = {name.split(".")[-1]: m for name, m in model.named_modules() if "." in name}
        known = ("embedding_norm", "final_layernorm", "ln", "norm")
        norm = next(ends[name] for name in known if name in ends)
        return Trunk(model, norm, lambda tokens: tokens, lambda hidden: hidden)
