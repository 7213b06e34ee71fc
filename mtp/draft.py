"""Draft tokens with an MTP head, whose cache holds verified positions only.

    drafter.note(hidden, tokens)     # verified: states [1, T, D] and the tokens after them [T]
    drafts = drafter.draft(3, choose)

Rows that drafting writes into the head's cache are thrown away at once; the next
draft first runs the head over what was verified since. While nothing is drafted
that waits, and only the last `WAITING` rows are kept: what a head has not seen
costs acceptance, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .head import Head, Leave

WAITING = 16  # verified rows that wait for the next draft
Token = mx.array | int  # [1], or looked at already
Tokens = mx.array | list[int]  # [T]
Choose = Callable[[mx.array, Sequence[Any]], Token]  # logits [1, 1, V], drafts before -> draft
GoesOn = Callable[[Any], tuple[bool, bool]]  # draft -> whether to take it, to make another


class Drafter:
    """A head and its cache, following one sequence."""

    def __init__(self, head: Head, deepest: int):
        """deepest: most tokens drafted at once; units of the head beyond are left alone."""
        self.head = head
        self._units = max(1, min(head.depth, deepest))
        self.reset()

    def reset(self) -> None:
        """Start another sequence."""
        self.rows = 0  # positions noted
        self.cache: list[Any] = self.head.make_cache()
        self._waiting: list[tuple[mx.array, Tokens]] = []
        # of every unit but the first: states whose token is the next to be verified
        self._late: list[mx.array | None] = [None] * self._units
        self._first: tuple[mx.array, mx.array] | None = None  # logits [1, 1, V], state [1, 1, D]

    @property
    def state(self) -> list[Any]:
        """What `resume` needs besides the caches: numbers, arrays and None."""
        waiting = [[hidden, mx.array(tokens)] for hidden, tokens in self._waiting]
        return [self.rows, waiting, list(self._late)]

    def resume(self, cache: list[Any], state: list[Any]) -> None:
        """Go on as the drafter of the same head whose `cache` and `state` these were."""
        self.reset()
        self.rows, waiting, late = state
        self._waiting = [(hidden, tokens) for hidden, tokens in waiting]
        if len(cache) == len(self.cache):
            self.cache = cache
        if len(late) == self._units:
            self._late = list(late)

    def note(self, hidden: mx.array, tokens: Tokens) -> None:
        """Verified states [1, T, D] of the kind the head takes, and the tokens after them [T]."""
        self.rows += len(tokens)
        self._waiting.append((hidden, tokens))
        if len(self._waiting) > 2 * WAITING:
            self._shorten()

    def keep(self, positions: int) -> None:
        """Forget all but the first `positions`; the sequence goes on otherwise from there."""
        surplus = self.rows - positions
        if surplus <= 0:
            return
        self.rows = positions
        while surplus and self._waiting:
            hidden, tokens = self._waiting.pop()
            stay = max(0, len(tokens) - surplus)
            surplus -= len(tokens) - stay
            if stay:
                self._waiting.append((hidden[:, :stay], tokens[:stay]))
        _trim(self.cache, surplus)
        self._late = [None] * self._units

    def catch_up(self, *, prompt: bool = False) -> None:
        """Run the head over what was noted since the last time.

        prompt: over all of it, and more is noted before the next draft.
        """
        if not prompt:
            self._shorten()
        if not self._waiting:
            return
        hidden, held = self._waiting[0]
        tokens = mx.array([held]) if isinstance(held, list) else held[None]
        if len(self._waiting) > 1:
            hidden = mx.concatenate([h for h, _ in self._waiting], axis=1)
            tokens = mx.concatenate([mx.array(t) for _, t in self._waiting])[None]
        self._waiting = []
        count = tokens.size
        for unit in range(self._units):
            if unit:  # a unit's token lies further ahead: its last row waits for it
                late = self._late[unit]
                hidden = hidden if late is None else mx.concatenate([late, hidden], axis=1)
                count = min(count, hidden.shape[1] - 1)
                self._late[unit] = hidden[:, count:]
                if count == 0:
                    return
            # only the next unit takes all rows on
            final = unit == self._units - 1
            leave: Leave = "all" if not final else "none" if prompt else "last"
            logits, hidden = self.head(
                _part(hidden, 0, count),
                _part(tokens, tokens.size - count, count),
                self.cache,
                unit,
                last=True,
                leave=leave,
            )
            if not unit:
                self._first = None if leave == "none" else (logits, _part(hidden, -1, 1))

    def draft(self, count: int, choose: Choose, goes_on: GoesOn | None = None) -> list[Any]:
        """Up to `count` >= 1 tokens after the last noted one, as `choose` gives them.

        choose is given the head's logits [1, 1, V] and the drafts before, goes_on each draft.
        """
        self.catch_up()
        assert self._first is not None, "nothing was noted"
        logits, hidden = self._first
        drafts: list[Token] = []
        rows = 0  # of drafts, in the head's cache
        while True:
            token = choose(logits, drafts)
            take, more = goes_on(token) if goes_on else (True, True)
            drafts += [token] if take else []
            if not more or len(drafts) == count:
                break
            # deeper steps than units repeat the last one, on rows of its own
            rows += 1
            row = mx.array([[token]]) if isinstance(token, int) else token[None]
            logits, hidden = self.head(hidden, row, self.cache, rows)
        for step in range(1, rows + 1):
            _trim(self.head.cache_of(self.cache, step), 1)
        return drafts

    def _shorten(self) -> None:
        """Keep the last rows only of those waiting."""
        total, kept = 0, []
        for hidden, tokens in reversed(self._waiting):
            room = WAITING - total
            if room <= 0:
                break
            kept.append(
                (hidden, tokens) if len(tokens) <= room else (hidden[:, -room:], tokens[-room:])
            )
            total += min(room, len(tokens))
        if sum(len(t) for _, t in self._waiting) > total:
            self._late = [None] * self._units
        self._waiting = kept[::-1]


def _part(rows: mx.array, start: int, count: int) -> mx.array:
    """`count` of the rows [1, T, ...]; the array itself where that is all of it.

    A slice would have to be evaluated.
    """
    if count == rows.shape[1]:
        return rows
    return rows[:, start:] if start < 0 else rows[:, start : start + count]


def _trim(caches: Sequence[Any], rows: int) -> None:
    for cache in caches:
        cache.trim(rows)
