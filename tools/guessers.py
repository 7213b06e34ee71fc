"""Which absent experts the past alone would have named: guessers, scored on a recording.

    python -m tools.trace guess demo.routes --pool 25%,50%

A guess names the absent experts of a layer before the layer is reached; it is scored
against those that were then missed on the runtime's pool, which the guess itself does not
fill. The guessers are the runtime's own (`streamer.guess`); what they say at the beginning
of a pass is taken whatever its strength. The next layer's router and rehearsals need the
model and are scored where they run: `--guess` and `--stats`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streamer.errors import UsageError
from streamer.guess import Frequency, Guesser, Moment, Previous, Token
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


GUESSERS: dict[str, Callable[[Routes], Guesser]] = {
    "previous": lambda routes: Previous(len(routes.counts)),
    "frequency": lambda routes: Frequency(routes.counts, routes.top_k),
    "token": lambda routes: Token(len(routes.counts), routes.top_k),
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

    begun = -1
    named: list[dict[int, set[int]]] = [{} for _ in guessers]  # by layer, of the pass at hand

    def on_call(call: Call, absent: np.ndarray, missed: np.ndarray) -> None:
        nonlocal begun
        step = routes.passes[call.step]
        if call.layer >= routes.head:
            return
        if call.step != begun:
            begun = call.step
            for guesser, of_layers in zip(guessers, named, strict=True):
                of_layers.clear()
                for layer, expert, _ in guesser.guess(Moment(step.tokens)):
                    of_layers.setdefault(layer, set()).add(expert)
        for guesser, found, of_layers in zip(guessers, scores, named, strict=True):
            if step.kind != "prefill":
                guesses = of_layers.get(call.layer, set()) & set(absent.tolist())
                found.misses += len(missed)
                found.named += len(guesses)
                found.right += len(guesses & set(missed.tolist()))
            guesser.observe(call.layer, step.tokens[: step.kept], call.experts[: step.kept])

    replay(routes, slots, on_call=on_call)
    return scores
