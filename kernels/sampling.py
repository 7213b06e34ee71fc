"""Sampling with a large vocabulary on the CPU: mlx-lm's tokens, without its sorts.

    sampler = kernels.sampling.faster(mlx_lm.sample_utils.make_sampler(0.6, top_p=0.95, top_k=20))
    sampler(logprobs)                       # [1, V] -> [1]: what mlx-lm's draws with this seed

mlx-lm's filters sort all tokens and look at all of them again and again. Here NumPy finds those
that the filters leave, ties as in mlx-lm, and draws from them as MLX does, with the next number of
its generator. Its sums are in double precision: where mlx-lm's are rounded, as over many tokens
that no filter takes out, the tokens drawn may differ. mlx-lm's sampler stays the reference, and
runs where this one does not: few tokens, several rows, GPUs.

    python -m kernels.sampling              # both, timed
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import greedy_sampler, make_sampler

FEW = 8192  # tokens of a vocabulary that mlx-lm's own takes as long for
VANISHING = -18.1  # log probability below which adding to 1/4 or more changes no float32
MANY = 1 << 14  # candidates whose order is worth a look at whether it matters
BLOCK = 512
LEAST = 1e-30  # temperature: log probabilities over less pass what float32 can hold

Sampler = Callable[[mx.array], mx.array]  # log probabilities [1, V] -> token [1]


def faster(sampler: Sampler) -> Sampler:
    """A `NumpySampler` in place of mlx-lm's, where it is of use, the greedy one for temperatures
    that are as good as 0; any other as it is."""
    options = options_of(sampler)
    if options is None or not options.keys() <= {"temp", "top_p", "min_p", "top_k"}:
        return sampler
    if options["temp"] < LEAST:
        return greedy_sampler
    return NumpySampler(sampler, **options) if mx.default_device() == mx.cpu else sampler


def options_of(sampler: Sampler) -> dict[str, Any] | None:
    """What `make_sampler` was told: temp, and of each filter that is in use its own, by name; of
    XTC no more than that it is. None where `parts_of` is."""
    if (parts := parts_of(sampler)) is None:
        return None
    options: dict[str, Any] = {"temp": parts[1]}
    for method in parts[0]:
        told = dict(inspect.getclosurevars(method).nonlocals)
        if told.get("min_tokens_to_keep") == 1:
            del told["min_tokens_to_keep"]
        options |= told
    return options


def parts_of(sampler: Sampler) -> tuple[Sequence[Sampler], float] | None:
    """Filters and temperature of a sampler that mlx-lm's `make_sampler` made; None for any other,
    and a greedy one."""
    if getattr(sampler, "__qualname__", "") != f"{make_sampler.__qualname__}.<locals>.sampler":
        return None
    inside: dict[str, Any] = dict(inspect.getclosurevars(sampler).nonlocals)
    filters, temperature = inside.get("sampling_methods"), inside.get("temp")
    return None if filters is None or temperature is None else (filters, temperature)


class NumpySampler:
    """One row of log probabilities to a token, at once and not as an operation of MLX's."""

    def __init__(
        self, reference: Sampler, temp: float, top_p: float = 0, min_p: float = 0, top_k: int = 0
    ):
        """reference: mlx-lm's sampler of these settings."""
        self.reference = reference
        self._scale = np.float32(1 / temp)
        self._top_p, self._min_p, self._top_k = top_p, min_p, top_k

    def __call__(self, logprobs: mx.array) -> mx.array:
        """[1, V] -> the token drawn [1], uint32."""
        if not self.at_once(logprobs):
            return self.reference(logprobs)
        tokens, chances = self._left(logprobs)
        return mx.array(tokens[draw(chances)][None], dtype=mx.uint32)

    def at_once(self, logprobs: mx.array) -> bool:
        """Whether it draws from these itself, for which it evaluates them."""
        tokens = logprobs.shape[-1]
        # mlx-lm refuses a top_k that leaves all
        return logprobs.size == tokens and (tokens > FEW or self._top_k >= tokens)

    def distribution(self, logprobs: mx.array) -> tuple[np.ndarray, np.ndarray]:
        """[1, V] -> tokens that the filters leave, in order, and their probabilities, float32."""
        tokens, chances = self._left(logprobs)
        chances /= chances.sum()
        return tokens, chances

    def _left(self, logprobs: mx.array) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that the filters leave, and their probabilities over the largest."""
        row = np.array(logprobs.astype(mx.float32), copy=False).reshape(-1)
        tokens = kept(row, self._top_p, self._min_p, self._top_k)
        if len(tokens) == 1:
            return tokens, np.ones(1, np.float32)
        chances = (row if len(tokens) == len(row) else row[tokens]) * self._scale
        chances -= chances.max()
        return tokens, np.exp(chances, out=chances)  # new memory costs more than the numbers do


def kept(row: np.ndarray, top_p: float, min_p: float, top_k: int) -> np.ndarray:
    """Tokens, in order, that mlx-lm's top_p, then min_p, then top_k leave of log probabilities
    [V], float32; 0: no such filter. Only the first where the largest is no number or infinite."""
    top = row.max()
    if not np.isfinite(top):
        return np.array([row.argmax()])
    top_k = top_k if top_k < row.size else 0
    least = np.float32(-np.inf)
    if 0 < top_p < 1:
        least = nucleus(row, top_p, top_k)
    if min_p:
        least = max(least, top + np.float32(math.log(min_p)))
    if top_k:
        least = max(least, np.partition(row, -top_k)[-top_k])
    if least == -np.inf:
        return np.arange(row.size)
    ids = np.flatnonzero(row >= least)
    if top_k and len(ids) > top_k:  # as likely as the last of them: the first of these
        above = row[ids] > least
        ids = np.sort(np.concatenate([ids[above], ids[~above][: top_k - above.sum()]]))
    return ids


def nucleus(row: np.ndarray, top_p: float, top_k: int = 0) -> np.float32:
    """The least log probability that top_p keeps; where top_k keeps less, maybe one below that."""
    likely = row >= VANISHING
    if top_k and np.count_nonzero(likely) > MANY:
        # mlx-lm's sum of all is rounded at each step, which the result seldom hangs on
        few = np.sort(row[row >= np.partition(row, -top_k)[-top_k]])[::-1]
        limit, slack = top_p * float(np.exp(row).sum()), row.size * 2.0**-24 + 1e-4
        low, high = np.searchsorted(
            _before(np.exp(few)), [limit * (1 - slack), limit * (1 + slack)]
        )
        if low == high:
            return few[low - 1]
    for some in (likely, slice(None)):
        down = np.sort(row[some])[::-1].copy()
        chances = np.array(mx.exp(mx.array(down)))  # MLX's own, by whose rounding it goes
        before = _before(chances)
        total = before[-1:] + chances[-1:]
        if total.sum() > 0.25:
            break
    return down[np.searchsorted(before, np.float32(top_p) * total)[0] - 1]


def _before(chances: np.ndarray) -> np.ndarray:
    """The sum of what is before each, taken one by one as mlx-lm does, float32."""
    out = np.zeros(len(chances), np.float32)
    np.cumsum(chances[:-1], out=out[1:])
    return out


def draw(chances: np.ndarray) -> int:
    """Which of n, as their chances are [n], whatever these sum to: where one more number of MLX's
    generator falls among them, in order. That is what MLX's `categorical` does with a row."""
    whole = len(chances) // BLOCK * BLOCK
    sums = chances[:whole].reshape(-1, BLOCK).sum(axis=1)
    blocks = np.append(sums, chances[whole:].sum()).astype(np.float64)
    ends = np.cumsum(blocks)
    at = mx.random.uniform().item() * ends[-1]
    block = int(np.searchsorted(ends, at, side="right"))
    inside = chances[block * BLOCK : (block + 1) * BLOCK]
    ends = np.cumsum(inside, dtype=np.float64) + (ends[block] - blocks[block])
    last = np.flatnonzero(inside)[-1]  # sums of other order may differ in their last bits
    return block * BLOCK + int(min(last, np.searchsorted(ends, at, side="right")))


def _milliseconds(sampler: Sampler, logprobs: mx.array) -> float:
    times = []
    for _ in range(8):
        began = time.perf_counter()
        mx.eval(sampler(logprobs))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * 1e3


def _bench(vocabulary: int = 248_320) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=vocabulary)
    rows = {"peaked": 2.2 * noise, "random": 2.5 * noise, "flat": 0.01 * noise}
    rows["peaked"][rng.integers(0, vocabulary, 40)] += 22 * rng.random(40)
    settings: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.95}, {"min_p": 0.05}]
    settings.append({"top_p": 0.95, "top_k": 20})
    print("| temp 0.6 and | " + " | ".join(f"{r}: mlx-lm, here, left" for r in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for options in settings:
        cells = []
        for row in rows.values():
            logits = mx.array(row.astype(np.float32))[None]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            theirs = make_sampler(0.6, **options)
            ours = NumpySampler(theirs, **options_of(theirs) or {})
            ms = [_milliseconds(sampler, logprobs) for sampler in (theirs, ours)]
            cells.append(f"{ms[0]:.1f} ms, {ms[1]:.2f} ms, {len(ours.distribution(logprobs)[0])}")
        name = ", ".join(f"{k} {v}" for k, v in options.items()) or "no filter"
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    _bench()
