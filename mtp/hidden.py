"""The trunk's hidden states, taken at its final norm as it runs.

    watch(norm)                      # once
    logits = model(tokens, cache=cache)
    hidden = take(norm, "post_norm")

The norm keeps its parameters and its place; nothing of the model is rewritten.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from .head import Hidden

_SEEN = "_mtp_seen"


def watch(norm: nn.Module) -> None:
    """From now on `norm` remembers what it was last called with and returned."""
    if not hasattr(norm, _SEEN):
        norm.__dict__[_SEEN] = None  # past nn.Module: no parameter
        norm.__class__ = _watched(type(norm))


def take(norm: nn.Module, kind: Hidden) -> mx.array:
    """[B, T, D] of the trunk's last pass, before or after `norm`, forgotten hereby."""
    before, after = norm.__dict__[_SEEN]
    norm.__dict__[_SEEN] = None
    return after if kind == "post_norm" else before


@cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array) -> mx.array:
            y = super().__call__(x)
            self.seen(x, y)
            return y

        def seen(self, x: mx.array, y: mx.array) -> None:
            """For who computes the norm with what is around it: what it took and gave."""
            self.__dict__[_SEEN] = x, y

    return Watched
