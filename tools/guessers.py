"""Which absent experts the past alone would have named: guessers, scored on a recording.

    python -m tools.trace guess demo.routes --pool 25%,50%

A guess names the absent experts of a layer before the layer is reached; it is scored
against those that were then missed on an LRU pool, which the guess itself does not
fill. previous: what the token before chose; frequency: the layer's most used so far;
token: what this layer chose the last time that this token id was put in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streamer.errors import UsageError
from streamer.replay import replay
from streamer.routes import Call, Routes


@dataclass
class Score:
    """recall: share of misses named; precision: share of what was named that was missed."""

    guesser: str
    slots: int
    misses: int = 0
    named: int = 0
    right: int = 0

    @property
    def recall(self) -> float:
        return self.right / self.misses if self.misses else 1.0

    @property
    def precision(self) -> float:
        return self.right / self.named if self.named else 0.0


class Previous:
    """The choices of the last row that was kept."""

    def __init__(self, routes: Routes):
        self._last: dict[int, np.ndarray] = {}

    def guess(self, layer: int, tokens: np.ndarray) -> np.ndarray:
        return self._last.get(layer, np.zeros(0, np.int64))

    def learn(self, layer: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        self._last[layer] = np.unique(experts[-1])


class Frequency:
    """Twice as many as a row asks of a layer, by uses since the start."""

    def __init__(self, routes: Routes):
        self._uses = [np.zeros(n, dtype=np.int64) for n in routes.counts]
        self._count = 2 * routes.top_k

    def guess(self, layer: int, tokens: np.ndarray) -> np.ndarray:
        uses = self._uses[layer]
        best = np.argsort(-uses, kind="stable")[: self._count]
        return best[uses[best] > 0]

    def learn(self, layer: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        np.add.at(self._uses[layer], experts.reshape(-1), 1)


class Token:
    """A memory by token id: what each layer chose when this token was last put in."""

    def __init__(self, routes: Routes):
        self._seen: dict[tuple[int, int], np.ndarray] = {}

    def guess(self, layer: int, tokens: np.ndarray) -> np.ndarray:
        known = [self._seen[layer, t] for t in tokens.tolist() if (layer, t) in self._seen]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *known]))

    def learn(self, layer: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        for token, row in zip(tokens.tolist(), experts, strict=True):
            self._seen[layer, token] = row.astype(np.int64)


Guesser = Previous | Frequency | Token
GUESSERS: dict[str, Callable[[Routes], Guesser]] = {
    "previous": Previous,
    "frequency": Frequency,
    "token": Token,
}


def score(
    routes: Routes, slots: Sequence[int], names: Sequence[str] = tuple(GUESSERS)
) -> list[Score]:
    """Each guesser on the trunk's decoding passes; prefill only teaches it.

    Raises UsageError for an unknown guesser.
    """
    if unknown := set(names) - set(GUESSERS):
        raise UsageError(f"no guesser {min(unknown)!r}; there are {', '.join(GUESSERS)}")
    scores = [Score(name, sum(slots)) for name in names]
    guessers = [GUESSERS[name](routes) for name in names]

    def on_call(call: Call, absent: np.ndarray, missed: np.ndarray) -> None:
        step = routes.passes[call.step]
        if call.layer >= routes.head:
            return
        for guesser, found in zip(guessers, scores, strict=True):
            if step.kind != "prefill":
                named = np.intersect1d(guesser.guess(call.layer, step.tokens), absent)
                found.misses += len(missed)
                found.named += len(named)
                found.right += len(np.intersect1d(named, missed))
            guesser.learn(call.layer, step.tokens[: step.kept], call.experts[: step.kept])

    replay(routes, slots, on_call=on_call)
    return scores
