"""mlx_lm's `stream_generate`, drafting with the model's own MTP head.

    from streamer import load, stream_generate
    model, tokenizer = load("path/or/owner/name", memory="8GB", mtp=True)
    for response in stream_generate(model, tokenizer, "...", max_tokens=64):
        print(response.text, end="")

Takes the arguments of mlx_lm.stream_generate that concern one prompt. What comes
out is what mlx_lm gives with the same sampler and the same seed. A model without a
head, or whose caches drafts cannot be taken back from, is decoded plainly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp.depth import DEEPEST

from .engine import Sampler, Timing, generate
from .errors import UsageError
from .speculate import Processor, Speculation, why_not


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    mtp: int | None = None,
) -> Iterator[GenerationResponse]:
    """Yield what mlx_lm.stream_generate yields; `from_draft` tells drafted tokens.

    model: from `streamer.load(..., mtp=True)`. prompt_cache: updated in place; it holds
    the tokens before `prompt`. max_tokens: -1 for no limit. mtp: how many tokens each
    step drafts, 0 for none, 8 at most; None to choose as it runs. Raises UsageError for a
    prompt without tokens and for other numbers than these.
    """
    if max_tokens == 0:
        raise UsageError("max_tokens is 0; -1 is no limit")
    if mtp is not None and not 0 <= mtp <= DEEPEST:
        raise UsageError(f"mtp is {mtp}, not 0 to {DEEPEST}")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    tokens = _tokens(tokenizer, prompt)
    speculation = _speculation(model, mtp)
    detokenizer, timing = tokenizer.detokenizer, Timing()
    stop = frozenset(tokenizer.eos_token_ids)
    steps = generate(
        model,
        tokens,
        make_prompt_cache(model) if prompt_cache is None else prompt_cache,
        max_tokens=max_tokens if max_tokens > 0 else 1 << 60,
        sampler=sampler or greedy_sampler,
        processors=logits_processors or (),
        stop=stop,
        timing=timing,
        on_prompt=prompt_progress_callback or (lambda done, total: None),
        speculation=speculation,
    )
    began: float | None = None
    with contextlib.closing(steps):
        for step in steps:
            began = began or time.perf_counter()
            ended = step.token in stop or timing.generated_tokens == max_tokens
            if step.token not in stop:
                detokenizer.add_token(step.token)
            if ended:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.drafted,
                prompt_tokens=len(tokens),
                prompt_tps=len(tokens) / timing.prompt_seconds,
                generation_tokens=timing.generated_tokens,
                generation_tps=timing.generated_tokens / (time.perf_counter() - began + 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=("stop" if step.token in stop else "length") if ended else None,
            )


def _tokens(tokenizer: TokenizerWrapper, prompt: str | mx.array | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        tokens = list(tokenizer.encode(prompt, add_special_tokens=not begun))
    else:
        tokens = list(map(int, np.array(prompt)))
    if not tokens:
        raise UsageError("the prompt has no tokens")
    return tokens


def _speculation(model: nn.Module, mtp: int | None) -> Speculation | None:
    """One that starts empty, with what was measured on this model before."""
    head = model.streamer.opened.head
    if head is None or mtp == 0:
        return None
    learnt = model.streamer.learnt
    if "why_not" not in learnt:
        learnt["why_not"] = why_not(model)
    if learnt["why_not"]:
        return None
    speculation = Speculation(model, head, mtp)
    if mtp is None:
        speculation.depth = learnt.setdefault("depth", speculation.depth)
    return speculation
