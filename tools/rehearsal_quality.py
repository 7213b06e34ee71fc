"""What one rehearsal of a whole pass names of its misses: recall and precision, live.

    python -m tools.rehearsal_quality --pools 25,50,75,90 --rows 1,2,3,4

The rows of a pass are the true next tokens, as after drafts that were all accepted: the model's
own greedy text is put in again, so many rows at once. Misses are experts that a layer of the
pass truly chose and that were absent when it began; named are those that the first rehearsal,
before any read, found chosen and absent. The pool evicts as the runtime does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from streamer.bench import PROMPT
from streamer.console import Parser, command, number
from streamer.engine import generate
from streamer.loading import expert_count, load_streamed, open_tokenizer
from streamer.run import DEMO


def parser() -> Parser:
    p = Parser(prog="rehearsal_quality", description="Recall and precision of rehearsals.")
    p.add_argument("--model", type=Path, default=DEMO)
    p.add_argument("--pools", default="25,50,75,90", help="%% of experts in memory")
    p.add_argument("--rows", default="1,2,3,4", help="of a pass")
    p.add_argument("--tokens", type=number(8, 4096, int), default=240)
    p.add_argument("--prompt", default=PROMPT)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    whole: Any = load_streamed(args.model, dtype="auto")
    prompt = list(open_tokenizer(whole.streamer.opened).encode(args.prompt))
    steps = generate(whole, prompt, make_prompt_cache(whole), max_tokens=args.tokens)
    text = [step.token for step in steps]
    print("| pool | rows | experts a layer | misses a row | recall | precision | layers unnamed |")
    print("|---" * 7 + "|")
    for pool in map(int, args.pools.split(",")):
        for rows in map(int, args.rows.split(",")):
            slots = expert_count(args.model) * pool // 100
            print(_line(pool, rows, measure(args.model, slots, prompt, text, rows)), flush=True)
    return 0


class Names:
    """Watches one model: what its rehearsals named, and what its passes then chose."""

    def __init__(self, model: Any):
        self._run = model.streamer.executors[0]
        self._hooks = model.__dict__["_hooks"]
        self._settle, self._hooks._settle = self._hooks._settle, self._settled
        model.streamer.watch = self
        self.counts = dict.fromkeys(("chosen", "missed", "named", "right", "unnamed", "layers"), 0)
        self.begin()

    def begin(self) -> None:
        """A pass begins."""
        self._absent = [np.flatnonzero(t < 0) for t in self._run.pool.slot_of]
        self._named: dict[int, set[int]] | None = None
        self._chosen: dict[int, set[int]] = {}

    def _settled(self, *told: Any) -> int:
        if self._named is None:
            notes = self._hooks._notes
            mx.eval([note.indices for _, note in notes])
            self._named = {note.layer: set(self._run.named(note)[1]) for _, note in notes}
        return self._settle(*told)  # type: ignore[no-any-return]

    def end(self) -> None:
        """The pass is over."""
        self._run.settle()
        if self._named is None:
            return
        c = self.counts
        for layer, chosen in self._chosen.items():
            missed = chosen & set(self._absent[layer].tolist())
            named = self._named.get(layer, set())
            c["layers"] += 1
            c["chosen"] += len(chosen)
            c["missed"] += len(missed)
            c["named"] += len(named)
            c["right"] += len(missed & named)
            c["unnamed"] += bool(missed - named)

    def chose(self, layer: int, ids: np.ndarray, missed: Sequence[int]) -> None:
        self._chosen[layer] = set(ids.reshape(-1).tolist())

    def step(self, kind: str, rows: int, seconds: float) -> None:
        return


def measure(path: Path, slots: int, prompt: list[int], text: list[int], rows: int) -> Names:
    """The text in passes of so many rows, after the prompt, on a pool of `slots`."""
    model: Any = load_streamed(path, slots=slots, dtype="auto", executor="rehearse")
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(prompt)[None], cache=cache))
    names = Names(model)
    for at in range(0, len(text) - rows + 1, rows):
        names.begin()
        mx.eval(model(mx.array(text[at : at + rows])[None], cache=cache))
        names.end()
    names.counts["rows"] = len(text) // rows * rows
    names.counts["each"] = len(names._run.layers)
    model.streamer.close()
    return names


def _line(pool: int, rows: int, names: Names) -> str:
    c = names.counts
    cells = [
        f"{pool}%",
        str(rows),
        f"{c['chosen'] / max(1, c['layers']):.2f}",
        f"{c['missed'] / c['rows']:.2f}",
        f"{c['right'] / max(1, c['missed']):.2f}",
        f"{c['right'] / max(1, c['named']):.2f}",
        f"{c['unnamed'] / max(1, c['layers']) * c['each']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
