"""Record what a loaded model's routers choose, and what passes they belong to.

    recorder = Recorder(model)
    with recorder.attached() as routes:
        recorder.begin(len(tokens))
        for step in generate(model, tokens, cache, max_tokens=64): ...
    routes.save(Path("demo.routes"))

Every router is read back while this is attached, which changes the time that a pass
takes and nothing else. `record` does all of it for greedy decoding of some prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from .engine import generate
from .errors import UsageError
from .experts import extras, stored_bytes
from .opened import Opened
from .routes import Call, Group, Pass, Routes
from .speculate import Speculation, why_not


def record(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, depth: int = 0) -> Routes:
    """Greedy tokens after each of `prompts`, one after the other, on the model's own pool.

    depth: drafts of each step, where the model was loaded with its MTP head.
    Raises UsageError where it cannot draft.
    """
    head = model.streamer.opened.head
    if depth and (head is None or why_not(model)):
        raise UsageError(f"{model.streamer.opened.name} has no MTP head to draft with")
    recorder = Recorder(model)
    with recorder.attached() as routes:
        for tokens in prompts:
            recorder.begin(len(tokens))
            speculation = Speculation(model, head, depth) if depth else None
            cache = make_prompt_cache(model)
            steps = generate(model, tokens, cache, max_tokens=max_tokens, speculation=speculation)
            passes = accepted = 0
            with contextlib.closing(steps):
                for _ in steps:
                    if speculation and speculation.counters.verify_passes > passes:
                        passes = speculation.counters.verify_passes
                        recorder.accepted(speculation.counters.accepted - accepted)
                        accepted = speculation.counters.accepted
    return routes


class Recorder:
    """Notes every router's choice and every pass of `model` while it is attached."""

    def __init__(self, model: Any):
        opened: Opened = model.streamer.opened
        executors = model.streamer.executors
        index = {layer.path: i for i, layer in enumerate(opened.layers)}
        self.routes = Routes(
            model=opened.name,
            fingerprint=opened.checkpoint.fingerprint,
            counts=tuple(layer.count for layer in opened.layers),
            head=len(opened.trunk_layers),
            top_k=opened.top_k,
            groups=tuple(
                Group(
                    tuple(index[x.path] for x in e.layers),
                    e.pool.slots,
                    stored_bytes(e.arrays.format),
                )
                for e in executors
            ),
        )
        self._model, self._index = model, index
        self._prompt = 0  # tokens of it that are still to be put in, but the last
        self._sequence = -1

    @contextlib.contextmanager
    def attached(self) -> Iterator[Routes]:
        """While this is open; afterwards the counters of the run are in the recording."""
        model, kind, modules = self._model, type(self._model), dict(self._model.named_modules())
        before = model.streamer.counters.hits, model.streamer.counters.misses
        recorded = [(p, _Recorded(self, i, modules[p])) for p, i in self._index.items()]
        model.update_modules(tree_unflatten(list(recorded)))
        model.__dict__["_recorder"] = self
        model.__class__ = _noted(kind)
        try:
            yield self.routes
        finally:
            model.__class__ = kind
            del model.__dict__["_recorder"]
            model.update_modules(tree_unflatten([(p, modules[p]) for p in self._index]))
            for executor in model.streamer.executors:
                executor.settle()
            self.routes.hits = model.streamer.counters.hits - before[0]
            self.routes.misses = model.streamer.counters.misses - before[1]

    def begin(self, prompt: int) -> None:
        """Another sequence, of `prompt` tokens."""
        self._sequence += 1
        self._prompt = prompt - 1

    def passed(self, tokens: list[int]) -> None:
        """The trunk is about to run over these."""
        if self._prompt > 0:
            self._prompt -= len(tokens)
            self._add("prefill", tokens, len(tokens))
        else:
            self._add("verify" if len(tokens) > 1 else "decode", tokens, 1)

    def accepted(self, drafts: int) -> None:
        """Of the last verify pass."""
        passes = self.routes.passes
        i = max(i for i, p in enumerate(passes) if p.kind == "verify")
        passes[i] = passes[i]._replace(kept=1 + drafts)

    def chose(self, layer: int, experts: np.ndarray) -> None:
        """experts [..., k] of a layer of the pass that runs."""
        passes = self.routes.passes
        experts = experts.reshape(-1, experts.shape[-1]).astype(np.uint16)
        if layer >= self.routes.head:
            last = self.routes.calls[-1] if self.routes.calls else None
            inside = (
                last and last.step == len(passes) - 1 and self.routes.head <= last.layer < layer
            )
            if not inside:
                self._add("draft", [-1] * len(experts), 0)
        self.routes.calls.append(Call(len(passes) - 1, layer, experts))

    def _add(self, kind: str, tokens: list[int], kept: int) -> None:
        self.routes.passes.append(
            Pass(kind, self._sequence, np.array(tokens, dtype=np.int32), kept)
        )


class _Recorded(nn.Module):
    """A switch whose indices are noted."""

    def __init__(self, recorder: Recorder, layer: int, switch: Any):
        super().__init__()
        self.__dict__["_noted"] = recorder, layer, switch
        for name, child in extras(switch):
            self[name] = child

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        recorder, layer, switch = self.__dict__["_noted"]
        recorder.chose(layer, np.array(indices))
        return switch(x, indices)


def _noted(kind: type[nn.Module]) -> type[nn.Module]:
    class Noted(kind):  # type: ignore[misc, valid-type]
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            self.__dict__["_recorder"].passed(inputs.reshape(-1).tolist())
            return super().__call__(inputs, *args, **kwargs)

    return Noted
