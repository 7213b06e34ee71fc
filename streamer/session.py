"""A loaded model, its tokenizer and one KV cache: what a command line talks to.

Text in, text out, around the token-only engine; keeps the cache between the
turns of a chat and re-reads only what changed.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ChunkedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .budget import Budget, divide
from .console import bar, say
from .engine import Timing, generate, prefill
from .errors import CheckpointError, UsageError
from .footprint import (
    available_memory,
    default_budget,
    footprint,
    format_size,
    peak_footprint,
)
from .hub import resolve
from .kv import FULL, describe
from .loading import Streamer, attach, expert_bytes, open_tokenizer
from .opened import Opened, open_model
from .prompt_cache import PromptCache, shared
from .speculate import Counters, Speculation, why_not

CHAT_CONTEXT = 8192  # tokens a chat's KV cache is planned for when nothing is said


def open_session(args: argparse.Namespace, prompt: str | None, demo: Path) -> Session:
    """Open, plan and load as the options say. Raises StreamerError."""
    path = demo if args.model is None else resolve(args.model)
    opened = open_model(path, args.dtype, mtp=args.mtp != "off")
    about_head = _about_head(opened, args)
    tokenizer = open_tokenizer(opened)
    tokens = [] if prompt is None else _encode(tokenizer, prompt, args.raw)
    kept = _kept(args, opened)
    context = args.context or _context(args, tokens, kept)
    if len(tokens) >= context:
        raise UsageError(f"the prompt has {_tokens(len(tokens))} and --context is {context}")
    spare, why = default_budget() if args.memory is None else (None, "")
    budget = divide(opened, args.memory, context, spare=spare, kv_bits=args.kv_bits)
    if kept is not None:
        kept.check(budget)
    _warn(opened, budget, args)
    with bar("loading") as update:
        model = attach(
            opened,
            budget,
            args.io,
            lambda what, done, all_: update(done, all_, "MB"),
            executor=args.executor,
            guess=args.guess,
            disk=args.disk,
            heat=getattr(args, "heat", "off"),
        )
    return Session(model, tokenizer, tokens, args, why, about_head, kept)


def _warn(opened: Opened, budget: Budget, args: argparse.Namespace) -> None:
    """Of what was asked for and is allowed, but hardly meant."""
    wanted, room = budget.total - footprint(), available_memory()
    if args.memory is not None and wanted > room:
        say(
            f"warning: {format_size(wanted)} more of memory are to be used, and "
            f"{format_size(room)} are available"
        )
    trained = opened.text("max_position_embeddings", 0)
    if trained and budget.context > trained and (args.context or not args.chat):
        say(f"warning: {budget.context} tokens are planned, the model was made for {trained}")


def _kept(args: argparse.Namespace, opened: Opened) -> PromptCache | None:
    """The prompt cache, if one is asked for. Raises UsageError where it would be lost."""
    if not args.prompt_cache:
        return None
    kept = PromptCache(args.prompt_cache, opened)
    if args.chat and kept.tokens and kept.notes is None:
        raise UsageError(f"{kept.path} holds a prompt, which --chat would replace")
    if not args.chat and kept.notes is not None:
        raise UsageError(f"{kept.path} holds a conversation, which --chat goes on with")
    return kept


def _context(args: argparse.Namespace, tokens: list[int], kept: PromptCache | None) -> int:
    """Tokens to plan the KV cache for when nothing is said."""
    held = len(kept.tokens) if kept else 0
    if args.chat:
        return CHAT_CONTEXT + held
    return max(len(tokens) + args.max_tokens, held)


def _about_head(opened: Opened, args: argparse.Namespace) -> str:
    """What the head is, a line; `--mtp 2` needs one, auto does not. Raises UsageError."""
    if args.mtp == "off":
        return ""
    if opened.head:
        return "; ".join(opened.head_notes)
    why = opened.head_notes[-1]
    if args.mtp != "auto":
        raise UsageError(f"--mtp {args.mtp} needs an MTP head: {why}")
    return f"{why}; decoding without drafts"


def _speculation(model: Any, args: argparse.Namespace) -> Speculation | None:
    """What drafts, where the model has a head. Raises UsageError."""
    opened: Opened = model.streamer.opened
    if not opened.head:
        return None
    if why := why_not(model):
        if args.mtp != "auto":
            raise UsageError(f"--mtp {args.mtp} cannot draft for {opened.name}: {why}")
        say(f"{opened.name}: {why}; decoding without drafts")
        return None
    return Speculation(model, opened.head, None if args.mtp == "auto" else args.mtp)


def _encode(tokenizer: TokenizerWrapper, prompt: str, raw: bool) -> list[int]:
    if tokenizer.has_chat_template and not raw:
        return chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
    tokens = list(tokenizer.encode(prompt))
    if not tokens:
        raise UsageError("the prompt has no tokens")
    return tokens


def chat_tokens(tokenizer: TokenizerWrapper, messages: list[dict[str, str]]) -> list[int]:
    """A conversation by the model's own template. Raises CheckpointError where that fails."""
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except Exception as error:  # a template is a program, and may refuse a role
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the model's chat template fails: {text}; --raw prompts without it"
        ) from error


class Session:
    """One conversation with one model."""

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerWrapper,
        prompt_tokens: list[int],
        args: argparse.Namespace,
        why: str,
        about_head: str = "",
        kept: PromptCache | None = None,
    ):
        self.model, self.tokenizer, self.prompt_tokens = model, tokenizer, prompt_tokens
        self.streamer: Streamer = model.streamer
        self.timing = Timing()
        self.tokens: list[int] = []
        self.interrupted = self.full = False
        self.speculation = _speculation(model, args)
        self.drafts = self.speculation.counters if self.speculation else Counters()
        self._args, self._why, self._about_head = args, why, about_head
        self._cache: list[Any] = []
        self._cached: list[int] = []  # tokens that the cache holds
        self.kept, self.reused = kept, 0
        self._unsaved: UsageError | None = None  # what `close` tells of the prompt cache
        if kept and kept.tokens:
            self._cache = kept.load(model, self.speculation)
            self._cached = list(kept.tokens)
        if args.seed is not None:
            mx.random.seed(args.seed)

    def headline(self) -> str:
        """What was loaded and what the budget gave; a second line about the MTP head."""
        b, s = self.streamer.budget, self.streamer
        experts = (
            f"{s.slots} of {s.total} experts in memory" if s.total else "a dense model, in memory"
        )
        if s.total and s.resident:
            experts = f"all {s.total} experts in memory"
        why = f" ({self._why})" if self._why else ""
        head = f"\n{self._about_head}" if self._about_head else ""
        return (
            f"{s.opened.name}: budget {format_size(b.limit)}{why}: runtime "
            f"{format_size(b.runtime)}, trunk {format_size(b.trunk)}, "
            f"{f'MTP head {format_size(b.head)}, ' if b.head else ''}"
            f"KV {format_size(b.kv + b.head_kv)} {self._about_kv()}for {b.context} tokens, "
            f"workspace "
            f"{format_size(b.workspace)}, {experts}, reads by {s.io}{head}"
        )

    def _about_kv(self) -> str:
        """At how many bits the history is held, and why; empty in full precision."""
        b = self.streamer.budget
        if b.kv_bits == FULL:
            return ""
        if not self.streamer.opened.coded_layers[0]:
            return f"in full precision, none of its layers can be held at {b.kv_bits} bits, "
        why = ", which does not fit" if self._args.kv_bits == "auto" else ""
        full = format_size(b.kv_full + b.head_kv)
        return f"at {b.kv_bits} bits (full precision takes {full}{why}) "

    def reply(self, tokens: list[int], on_prompt: Callable[[int, int], None]) -> Iterator[str]:
        """Pieces of text after `tokens`, a whole conversation; what is cached is not re-read."""
        tokens = list(tokens)
        until = self._save_at(tokens)
        keep = self.reused = self._reusable(tokens)
        args = self._args
        self.timing, self.tokens, self.interrupted, self.full = Timing(), [], False, False
        room = self.streamer.budget.context - len(tokens)
        self._cached = []  # what it holds is not known while the prompt is read
        if keep < until:
            self._read(tokens, keep, until, on_prompt)
        stop = frozenset(self.tokenizer.eos_token_ids)
        detokenizer = self.tokenizer.detokenizer
        detokenizer.reset()
        steps = generate(
            self.model,
            tokens[keep:],
            self._cache,
            max_tokens=min(args.max_tokens, room),
            sampler=make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
            processors=_processors(args.repetition_penalty),
            stop=stop,
            timing=self.timing,
            on_prompt=on_prompt,
            speculation=self.speculation,
            seeded=args.seed is not None,
            before=tokens[:keep],
        )
        with contextlib.closing(steps):  # takes drafts back that were not asked for any more
            for step in steps:
                self.tokens.append(step.token)
                self._cached = (tokens + self.tokens)[: keep + self.timing.cached]
                if step.token in stop:
                    break
                self.full = len(self.tokens) == room < args.max_tokens
                detokenizer.add_token(step.token)
                yield detokenizer.last_segment
        detokenizer.finalize()
        yield detokenizer.last_segment

    def _save_at(self, tokens: list[int]) -> int:
        """After how many of a prompt's tokens the cache goes into the file; 0: not at all."""
        kept = self.kept
        if kept is None or self._args.chat:  # a chat is saved after each turn
            return 0
        most, same = len(tokens) - 1, shared(kept.tokens, tokens[:-1])
        if not kept.tokens or _trims(self._cache, same, most):
            return most
        if same == len(kept.tokens):  # it may serve other prompts, too
            return 0
        return same if 2 * same >= min(len(kept.tokens), most) else most

    def _read(
        self, tokens: list[int], keep: int, until: int, on_prompt: Callable[[int, int], None]
    ) -> None:
        """Read the prompt up to `until` tokens, of which `keep` are there, and save that."""
        began = time.perf_counter()
        prefill(
            self.model,
            tokens[keep : until + 1],
            self._cache,
            self.timing,
            lambda done, _: on_prompt(done, len(tokens) - keep),
            self.speculation,
        )
        self.timing.prompt_seconds += time.perf_counter() - began
        assert self.kept is not None
        try:
            self.kept.save(self._cache, tokens[:until], self.speculation)
        except UsageError as error:  # the reply can be given all the same
            self._unsaved = error

    def save_chat(self, messages: list[dict[str, str]]) -> None:
        """Keep a conversation in its file, if it has one. Raises UsageError."""
        if self.kept is not None and self._cached:
            self.kept.save(self._cache, self._cached, self.speculation, messages)

    @property
    def caches(self) -> list[Any]:
        """KV caches of the conversation, the head's included."""
        return [*self._cache, *(self.speculation.drafter.cache if self.speculation else [])]

    def interrupt(self) -> None:
        """The reply was cut short."""
        self.interrupted = True

    def _reusable(self, tokens: list[int]) -> int:
        """How many leading tokens the cache already holds; a new cache when none fit."""
        n = shared(self._cached, tokens[:-1])
        surplus = len(self._cached) - n
        if n and surplus and _trims(self._cache, n):
            surplus -= trim_prompt_cache(self._cache, surplus)
        if not n or surplus:  # what cannot be cut back starts anew
            self._cache = make_prompt_cache(self.model)
            n = 0
        if self.speculation:
            self.speculation.follow(n)
        return n

    def closing(self) -> str:
        """One line: speed, hit rate, bytes read, peak against budget."""
        t, s = self.timing, self.streamer
        stats = s.stats()
        asked = stats["hits"] + stats["misses"]
        parts = [
            _tokens(t.prompt_tokens, "prompt ")
            + (f", first token after {t.prompt_seconds:.2f} s" if t.generated_tokens else ""),
            _tokens(t.generated_tokens)
            + (f" at {t.decode_rate:.1f} tok/s" if t.decode_rate else ""),
        ]
        if self.reused and self.kept is not None:
            parts.insert(0, f"{_tokens(self.reused)} from the prompt cache")
        if self.drafts.drafted:
            parts.append(f"{self.drafts.accepted / self.drafts.drafted:.0%} of drafts accepted")
        if self.drafts.near_ties:
            parts.append(f"{self.drafts.near_ties} near ties")
        if asked:
            parts.append(f"{stats['hits'] / asked:.0%} of experts hit")
        parts.append(f"{stats['bytes_read'] / 1e9:.2f} GB read")
        peak = peak_footprint()
        parts.append(f"peak {format_size(peak)} of {format_size(s.budget.limit)}")
        why = f"ended by --context {s.budget.context}: " if self.full else ""
        return ("interrupted: " if self.interrupted else why) + ", ".join(parts)

    def stats(self) -> dict[str, Any]:
        """The `--stats` document."""
        t, s = self.timing, self.streamer
        return {
            "model": str(self._args.model or "demo"),
            "backend": mx.default_device().type.name,
            "budget_bytes": s.budget.limit,
            "peak_bytes": peak_footprint(),
            "prompt_tokens": t.prompt_tokens,
            "prompt_seconds": t.prompt_seconds,
            "generated_tokens": t.generated_tokens,
            "decode_seconds": t.decode_seconds,
            "decode_tokens_per_second": t.decode_rate,
            "tokens": self.tokens,
            "experts": s.stats(),
            "mtp": self.drafts.stats(),
            "rehearsal": s.counters.rehearsal(),
            "prefetch": s.counters.prefetch(expert_bytes(s.opened)),
            "syncs": s.counters.syncs,
            "kv_cache": describe(self._cache, 16 if s.opened.widen is None else 32),
            "prompt_cache": self.kept
            and {
                "file": str(self.kept.path),
                "reused_tokens": self.reused,
                "held_tokens": len(self.kept.tokens),
            },
            "finished_at": time.time(),
        }

    def close(self) -> None:
        """Raises UsageError where the prompt cache, or the heat, was asked for and not saved."""
        self.streamer.close()
        if self._unsaved is not None:
            raise self._unsaved


def _trims(cache: list[Any], n: int, length: int = 0) -> bool:
    """Whether it can be cut back to `n` tokens, also once it has held `length`.

    mlx-lm's chunked caches (llama4) say so whatever they have dropped of n's chunk.
    """
    return can_trim_prompt_cache(cache) and all(
        max(c.start_position, length - c.chunk_size) <= n // c.chunk_size * c.chunk_size
        for c in cache
        if isinstance(c, ChunkedKVCache)
    )


def _tokens(n: int, kind: str = "") -> str:
    return f"{n} {kind}token{'s' * (n != 1)}"


def _processors(penalty: float) -> list[Any]:
    return [] if penalty == 1.0 else make_logits_processors(repetition_penalty=penalty)
