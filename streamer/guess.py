"""Guessers: which experts the layers ahead will choose, from the past or from what is at hand.

    token = Token(layers=8, top_k=4)
    token.observe(0, tokens, ids)
    token.guess(Moment(tokens))             # [Guess(layer, expert, strength)]

A guess has a strength in 0 to 1, the guesser's own idea of how likely it is; `streamer.foresight`
corrects that by what came true. `tools.trace guess` scores the same classes on a recording.
Rehearsals (`streamer.rehearse`, `kernels.segments`) tell `Rehearsed`. Guessers hold numbers only,
`MEMORY` bytes at most, and know neither pool nor disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import UsageError
from .experts import LayerExperts

MEMORY = 1 << 20  # bytes of a token memory, and of the routers held as plain floats
SURE = 3  # times that a choice must repeat to be sure of
TOKENS = 1024  # remembered at most
REHEARSED = 0.9  # strength of what a rehearsed layer chose


class Guess(NamedTuple):
    layer: int
    expert: int
    strength: float


class Moment(NamedTuple):
    """Where a pass is: tokens [T] put in; at: layer that has just chosen, -1: none yet; x [T, D],
    float32: what that layer's router took, None where it is not known."""

    tokens: np.ndarray
    at: int = -1
    x: np.ndarray | None = None


class Guesser(Protocol):
    learns: bool  # by observing, so that it is to observe passes in which it does not guess

    def observe(self, layer: int, tokens: np.ndarray, ids: np.ndarray) -> None:
        """The layer chose ids [T, k] for tokens [T], which were kept."""

    def guess(self, moment: Moment) -> Iterable[Guess]:
        """Of layers behind `moment.at`, some of which may be resident."""


class Previous:
    """The choices of the last row."""

    learns = True

    def __init__(self, layers: int):
        self._last: list[list[int]] = [[] for _ in range(layers)]
        self._again = 0.3  # share that comes again

    def observe(self, layer: int, tokens: np.ndarray, ids: np.ndarray) -> None:
        now = ids[-1].tolist()
        if before := self._last[layer]:
            self._again += (len(set(now) & set(before)) / len(now) - self._again) / 64
        self._last[layer] = now

    def guess(self, moment: Moment) -> Iterable[Guess]:
        if moment.at < 0:
            for layer, experts in enumerate(self._last):
                yield from (Guess(layer, e, self._again) for e in experts)


class Frequency:
    """Twice as many as a row asks of a layer, by their share of rows so far."""

    learns = True

    def __init__(self, counts: Sequence[int], top_k: int):
        self._uses = [np.zeros(n) for n in counts]
        self._rows = [0] * len(counts)
        self._count = 2 * top_k

    def observe(self, layer: int, tokens: np.ndarray, ids: np.ndarray) -> None:
        self._uses[layer] += np.bincount(ids.reshape(-1), minlength=len(self._uses[layer]))
        self._rows[layer] += len(ids)

    def guess(self, moment: Moment) -> Iterable[Guess]:
        for layer, uses in enumerate(self._uses if moment.at < 0 else ()):
            for expert in np.argsort(-uses, kind="stable")[: self._count].tolist():
                if uses[expert]:
                    yield Guess(layer, expert, float(uses[expert]) / self._rows[layer])


class Token:
    """What each layer chose when this token id was put in before.

    Counts of each choice's repetitions, up and down by one as in branch predictors; what came
    once is not guessed yet. A token whose place another took is forgotten. Of the first 16384
    experts of a layer.
    """

    learns = True

    def __init__(self, layers: int, top_k: int):
        self._width = 2 * top_k
        self._places = max(1, min(TOKENS, MEMORY // max(1, layers * (2 * self._width + 4))))
        # expert << 2 | count, the surest first, 0 where there are no more
        self._known = np.zeros((layers, self._places, self._width), np.uint16)
        self._whose = np.full((layers, self._places), -1, np.int32)

    def observe(self, layer: int, tokens: np.ndarray, ids: np.ndarray) -> None:
        whose = self._whose[layer]
        for token, chosen in zip(tokens.tolist(), ids.tolist(), strict=True):
            place = token % self._places
            codes = self._known[layer, place]
            sure = dict.fromkeys(chosen, 1)
            if whose[place] == token:
                for code in codes.tolist():
                    expert, n = code >> 2, code & 3
                    if not n:
                        break
                    if expert in sure:
                        sure[expert] = min(SURE, n + 1)
                    elif n > 1:
                        sure[expert] = n - 1
            whose[place] = token
            kept = sorted((n, e) for e, n in sure.items())[: -self._width - 1 : -1]
            codes[: len(kept)] = [e << 2 | n for n, e in kept]
            codes[len(kept) :] = 0

    def guess(self, moment: Moment) -> Iterable[Guess]:
        if moment.at >= 0:
            return
        for token in set(moment.tokens.tolist()):
            place = token % self._places
            whose = self._whose[:, place].tolist()
            for layer, codes in enumerate(self._known[:, place].tolist()):
                for code in codes if whose[layer] == token else ():
                    if code & 3 < 2:  # the surest come first
                        break
                    yield Guess(layer, code >> 2, (code & 3) / (SURE + 1))


class Router:
    """The next layer's router on what this layer's took: the residual changes little in between.

    What was normed for one layer is rescaled for the next: gate[l + 1](x * w[l + 1] / w[l]).
    """

    learns = False

    def __init__(self, gates: Sequence[Any], norms: Sequence[mx.array], top_k: int):
        """gates: of each layer, x [T, D] -> logits [T, n]; norms: weights [D] before them."""
        self._k, self._gates = top_k, list(gates)
        self._scales = [b / a for a, b in pairwise(norms)]
        self._held: list[np.ndarray | None] = [None] * len(self._scales)
        width = norms[0].size if norms else 0
        eye = mx.eye(width)
        nbytes = 0
        for i, scale in enumerate(self._scales):
            if width > 1024 or nbytes > MEMORY:
                break  # the model's own gate is asked then
            weights = np.array(gates[i + 1](eye).astype(mx.float32))  # [D, n]
            nbytes += weights.nbytes
            self._held[i] = np.array(scale.astype(mx.float32))[:, None] * weights

    def observe(self, layer: int, tokens: np.ndarray, ids: np.ndarray) -> None:
        return

    def guess(self, moment: Moment) -> Iterable[Guess]:
        at, x = moment.at, moment.x
        if not 0 <= at < len(self._scales) or x is None:
            return
        held = self._held[at]
        if held is not None:
            logits = x @ held
        else:
            made = self._gates[at + 1](mx.array(x) * self._scales[at])
            logits = np.array(made.astype(mx.float32))
        for row in logits:
            order = np.argpartition(row, -self._k - 1)
            last = row[order[-self._k - 1]]  # the best that is not chosen
            for expert in order[-self._k :].tolist():
                yield Guess(at + 1, expert, 1 - 0.7 * math.exp(last - row[expert]))


class Rehearsed:
    """What layers chose that were run ahead with the experts at hand."""

    learns = False

    def __init__(self) -> None:
        self._named: list[Guess] = []

    def named(self, layer: int, experts: Iterable[int]) -> None:
        self._named += [Guess(layer, e, REHEARSED) for e in experts]

    def observe(self, layer: int, tokens: np.ndarray, ids: np.ndarray) -> None:
        return

    def guess(self, moment: Moment) -> Iterable[Guess]:
        named, self._named = self._named, []
        return named


SOURCES = ("token", "router", "previous", "frequency")
USEFUL = ("router",)  # of these, where they are not chosen by name


def named(names: str) -> tuple[str, ...]:
    """'a,b' of `SOURCES`, 'auto' or 'off' as names. Raises UsageError for one that there is not."""
    wanted = {"auto": USEFUL, "off": ()}.get(names, tuple(names.split(",")))
    if unknown := set(wanted) - set(SOURCES):
        raise UsageError(f"no guesser {min(unknown)!r}; there are {', '.join(SOURCES)}")
    return wanted


def sources_of(
    names: str, model: nn.Module, experts: Sequence[LayerExperts], top_k: int
) -> dict[str, Guesser]:
    """Guessers 'a,b' of `SOURCES`, or 'auto', for these layers of a model.

    Raises UsageError for a name that there is not; a router that is not
    found is left out.
    """
    layers, counts = len(experts), [x.count for x in experts]
    found: dict[str, Guesser] = {}
    for name in named(names):
        if name == "router":
            if (router := _router(model, [x.path for x in experts], top_k)) is not None:
                found[name] = router
        elif name == "token":
            found[name] = Token(layers, top_k)
        else:
            found[name] = Previous(layers) if name == "previous" else Frequency(counts, top_k)
    return found


def _router(model: nn.Module, paths: Sequence[str], top_k: int) -> Router | None:
    """Of blocks as most families have them; None where gates or norms are not found."""
    gates, norms = [], []
    for path in paths:
        parts = path.split(".")
        layer, block = model, model
        for name in parts[:-1]:
            block = block[int(name)] if name.isdigit() else getattr(block, name)
            layer = block if name.isdigit() else layer
        gate, norm = block.get("gate"), layer.get("post_attention_layernorm")
        if not isinstance(gate, nn.Linear | nn.QuantizedLinear) or norm is None:
            return None
        gates.append(gate)
        norms.append(norm["weight"])
    return Router(gates, norms, top_k) if len(gates) > 1 else None
