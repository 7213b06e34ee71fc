"""Accept or reject drafted tokens exactly: what comes out is distributed as the trunk's own.

One pass over [last token, d1..dk] gives k + 1 rows of logits; row i is the trunk's
choice after d1..di. Two rules, both exact for any filters and processors, since
drafts and rows go through the same ones:

*shared noise* (`Shared`): every position has one state of MLX's random generator,
used for the draft there and for the row there; a draft stands if the row chooses it.
The tokens are those of plain decoding with the same seed, whatever the depth, for any
sampler of mlx-lm's (Daliri et al. 2024, arXiv:2408.07978). Greedy decoding is the
case without noise.

*residual* (`Residual`): accept d with min(1, p(d) / q(d)), else sample
norm(max(p - q, 0)) (Leviathan et al. 2023, arXiv:2211.17192). Accepts more often
than shared noise does, but which tokens come out depends on the depths.

A rejection is corrected from the row at hand, without another pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import greedy_sampler

from kernels import backend
from kernels.sampling import NumpySampler, Sampler, draw, parts_of

Filter = Callable[[mx.array], mx.array]  # log probabilities [1, V] -> the same, some -inf

# logits nearer than this share of the larger may change places with the rows of a pass
NEAR = {mx.float32: 2.0**-16, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


class Shared:
    """Draft and verify with the same noise at each position."""

    def __init__(self, sampler: Sampler, *, noise: bool = True):
        """noise: whether the sampler draws from MLX's generator."""
        self._sampler, self._noise = sampler, noise
        self.greedy = not noise
        self._start = 0
        self._states: list[mx.array] = []  # of the generator, after each position

    def begin(self) -> None:
        """A step starts at the generator's current state."""
        if self._noise:
            self._start = as_seed(random_state())

    def draft(self, logprobs: mx.array) -> mx.array:
        """[1, V] of the next position -> the draft there [1]."""
        return self._sampler(logprobs)

    def accept(self, drafts: mx.array, rows: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """The first drafts made [k], k + 1 rows [1, V] -> how many stand [], tokens [k + 1].

        Of the tokens only those that stand and the one after them count.
        """
        if self._noise:
            mx.random.seed(self._start)
        self._states, chosen = [], []
        for row in rows:
            chosen.append(self._sampler(row))
            if self._noise:
                self._states.append(random_state())
        tokens = mx.concatenate(chosen).astype(drafts.dtype)
        return _leading(tokens[:-1] == drafts), tokens

    @property
    def pending(self) -> list[mx.array]:
        """What `end` reads, to be evaluated with the tokens."""
        return self._states

    def end(self, emitted: int) -> None:
        """`emitted` tokens came of the step: go on where plain decoding would be."""
        if self._noise:
            mx.random.seed(as_seed(self._states[emitted - 1]) if emitted else self._start)


class Residual:
    """Draft from q, accept with min(1, p / q), correct from norm(max(p - q, 0))."""

    greedy = False
    pending: Sequence[mx.array] = ()

    def __init__(self, filters: Sequence[Filter], temperature: float):
        self._filters, self._temperature = filters, temperature
        self._q: list[mx.array] = []

    def begin(self) -> None:
        self._q = []

    def draft(self, logprobs: mx.array) -> mx.array:
        self._q.append(self._distribution(logprobs))
        return mx.random.categorical(mx.log(self._q[-1]))

    def accept(self, drafts: mx.array, rows: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        p = mx.concatenate([self._distribution(row) for row in rows])
        return accept(p, mx.concatenate(self._q[: drafts.size]), drafts)

    def end(self, emitted: int) -> None:
        """The generator has no place to go back to."""

    def _distribution(self, logprobs: mx.array) -> mx.array:
        for keep in self._filters:
            logprobs = keep(logprobs)
        return mx.softmax(logprobs * (1.0 / self._temperature), axis=-1, precise=True)


class Sparse:
    """`Residual` on the tokens alone that the filters of a sampler in NumPy leave."""

    greedy = False
    pending: Sequence[mx.array] = ()

    def __init__(self, sampler: NumpySampler):
        self._sampler = sampler
        self._q: list[tuple[np.ndarray, np.ndarray]] = []

    def begin(self) -> None:
        self._q = []

    def draft(self, logprobs: mx.array) -> mx.array:
        tokens, chances = self._sampler.distribution(logprobs)
        self._q.append((tokens, chances))
        return mx.array(tokens[draw(chances)][None], dtype=mx.uint32)

    def accept(self, drafts: mx.array, rows: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        p, q = [self._sampler.distribution(row) for row in rows], self._q[: drafts.size]
        some = np.zeros(rows[0].size, np.bool_)
        for tokens, _ in (*p, *q):
            some[tokens] = True
        known = np.flatnonzero(some)  # what any row may say
        column = np.searchsorted(known, np.array(drafts)).astype(np.int32)
        stand, columns = accept(_spread(p, known), _spread(q, known), mx.array(column))
        return stand, mx.array(known[np.array(columns)], dtype=drafts.dtype)

    def end(self, emitted: int) -> None:
        """The generator has no place to go back to."""


def _spread(rows: Sequence[tuple[np.ndarray, np.ndarray]], known: np.ndarray) -> mx.array:
    """Tokens and their probabilities of each row -> those of the tokens known: [rows, known]."""
    out = np.zeros((len(rows), len(known)), np.float32)
    for row, (tokens, chances) in zip(out, rows, strict=True):
        row[np.searchsorted(known, tokens)] = chances
    return mx.array(out)


Rule = Shared | Residual | Sparse


class Likeliest(NamedTuple):
    """The likeliest token of a row, whether another is within rounding of it, its probability."""

    token: int
    near: bool
    confidence: float  # 0 where it was not asked for


def accept(p: mx.array, q: mx.array, drafts: mx.array) -> tuple[mx.array, mx.array]:
    """The residual rule on probabilities.

    p: [..., k + 1, V] of the trunk, q: [..., k, V] that drafts [..., k] were drawn
    from. Returns how many stand [...] and tokens [..., k + 1], of which those that
    stand and the one after them count.
    """
    at = drafts[..., None]
    p_draft = mx.take_along_axis(p[..., :-1, :], at, axis=-1)[..., 0]
    q_draft = mx.take_along_axis(q, at, axis=-1)[..., 0]
    stand = _leading(mx.random.uniform(shape=drafts.shape) * q_draft < p_draft)
    # after the last draft nothing was drafted: q is 0 and what is left is p
    left = mx.maximum(p - mx.concatenate([q, mx.zeros_like(q[..., :1, :])], axis=-2), 0)
    left = mx.where(left.sum(axis=-1, keepdims=True) > 0, left, p)
    instead = mx.random.categorical(mx.log(left)).astype(drafts.dtype)
    extended = mx.concatenate([drafts, drafts[..., :1]], axis=-1)
    rejected = mx.arange(p.shape[-2]) >= stand[..., None]
    return stand, mx.where(rejected, instead, extended)


def rule_for(sampler: Sampler, *, seeded: bool) -> Rule:
    """The rule that accepts most; seeded: of those that give plain decoding's tokens."""
    if sampler is greedy_sampler:
        return Shared(sampler, noise=False)
    if isinstance(sampler, NumpySampler) and not seeded:
        return Sparse(sampler)
    known = None if seeded else filters_of(sampler)
    return Shared(sampler) if known is None else Residual(*known)


def filters_of(sampler: Sampler) -> tuple[Sequence[Filter], float] | None:
    """Filters and temperature of a sampler that mlx-lm's `make_sampler` made.

    None for any other, and for XTC, whose filter is itself random.
    """
    known = parts_of(sampler)
    if known and any("apply_xtc" in f.__code__.co_names for f in known[0]):
        return None
    return known


def likeliest(logits: mx.array, confident: bool = False) -> list[Likeliest]:
    """Of each row of logits [..., V], at once; as by log probabilities, which are rounded."""
    if logits.dtype == mx.float32 and backend.available():
        native = backend.native()
        assert native is not None
        found = native.choose(logits, NEAR[mx.float32], confident)
        if not any(unsure for _, _, unsure, _ in found):
            return [Likeliest(token, near, share) for token, near, _, share in found]
    rows = logits.reshape(-1, logits.shape[-1])
    logprobs = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    tokens, near, most = mx.argmax(logprobs, axis=-1), near_tie(rows, logprobs), logprobs.max(-1)
    mx.eval(tokens, near, most)
    shares = mx.exp(most).tolist()
    return [Likeliest(*row) for row in zip(tokens.tolist(), near.tolist(), shares, strict=True)]  # type: ignore[arg-type]


def near_tie(logits: mx.array, logprobs: mx.array) -> mx.array:
    """Whether the two likeliest of each row [R, V] are within rounding of each other: [R].

    logits: the model's, whose size says how they were rounded; logprobs: what was
    chosen from. A pass over one row and one over several round differently, so
    greedy decoding may differ there.
    """
    scale = mx.abs(logits).max(axis=-1, keepdims=True).astype(mx.float32)
    best = logprobs.max(axis=-1, keepdims=True)
    near = logprobs >= best - NEAR.get(logits.dtype, NEAR[mx.bfloat16]) * scale
    return near.sum(axis=-1) > 1


def _leading(stand: mx.array) -> mx.array:
    return mx.cumprod(stand.astype(mx.int32), axis=-1).sum(axis=-1)


def random_state() -> mx.array:
    """Of MLX's generator: two words of 32 bits, lazy."""
    return mx.random.state[0]  # type: ignore[index]


def as_seed(state: mx.array) -> int:
    """The seed that puts MLX's generator into `state`."""
    high, low = np.array(state).tolist()
    return high << 32 | low
