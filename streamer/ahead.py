"""Experts that are read before they are asked for, in slots of their own.

An expert that turns out to be needed is placed in the pool and its read promoted to a
demand; one that is not is taken back, or, where its bytes came already, stays resident
as the first to be evicted. The pool knows nothing of these slots until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .errors import StreamerError
from .native_reads import NativeTicket
from .pool import SlotPool
from .store import Ticket


class Reading:
    """Experts on their way into slots."""

    def __init__(self, ticket: Ticket | NativeTicket):
        self._ticket = ticket
        self.guessed = False  # before it was asked for

    @property
    def done(self) -> bool:
        return self._ticket.done

    def promote(self) -> None:
        """A guess is needed now."""
        self.guessed = True
        self._ticket.promote()

    def cancel(self) -> None:
        """A guess is not needed; what of it has not started is left out."""
        self._ticket.cancel()

    @property
    def seconds(self) -> float:
        """From when it was asked for to when all was there, once it is."""
        return self._ticket.seconds

    @property
    def native(self) -> Any:
        """The extension's ticket, where the extension reads."""
        assert isinstance(self._ticket, NativeTicket)
        return self._ticket.native

    def wait(self) -> None:
        """Block until every byte is in place. Raises StreamerError on a failed read."""
        self._ticket.wait()


class _Ahead(NamedTuple):
    layer: int
    expert: int
    slot: int
    reading: Reading


class ReadAhead:
    """What is on its way into the slots of one pool."""

    def __init__(self, pool: SlotPool):
        self._pool = pool
        self._reading: dict[tuple[int, int], _Ahead] = {}
        self._wrong: list[_Ahead] = []  # not needed after all, their slots not yet free

    @property
    def held(self) -> int:
        """Slots."""
        return len(self._reading) + len(self._wrong)

    @property
    def busy(self) -> bool:
        """Some of it is still to be read."""
        under_way = (*self._reading.values(), *self._wrong)
        return any(not one.reading.done for one in under_way)

    def reads(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._reading

    def add(
        self, layer: int, experts: Sequence[int], slots: Sequence[int], reading: Reading
    ) -> None:
        """`slots`, owned by the caller until now, get absent `experts`."""
        for expert, slot in zip(experts, slots, strict=True):
            self._reading[layer, expert] = _Ahead(layer, expert, slot, reading)

    def arriving(self, layer: int, needed: Sequence[int]) -> list[tuple[list[int], Reading]]:
        """Those of `needed` that are read ahead, now in the pool, by reading; the rest go."""
        found: dict[Reading, list[int]] = {}
        wrong: list[_Ahead] = []
        for key in [k for k in self._reading if k[0] == layer]:
            one = self._reading.pop(key)
            if one.expert in needed:
                self._pool.place(layer, one.expert, one.slot)
                found.setdefault(one.reading, []).append(one.expert)
            else:
                wrong.append(one)
        for one in wrong:
            if one.reading not in found:
                one.reading.cancel()
        self._wrong += wrong
        for reading in found:
            reading.promote()
        return [(experts, reading) for reading, experts in found.items()]

    def arrived(self) -> list[tuple[int, int]]:
        """(layer, expert) of those that are there, now in the pool, the last to be evicted."""
        self.reclaim()
        done = [one for one in self._reading.values() if one.reading.done]
        for one in done:
            one.reading.wait()
            del self._reading[one.layer, one.expert]
            self._pool.place(one.layer, one.expert, one.slot)
        return [(one.layer, one.expert) for one in done]

    def drop(self, wait: bool = False) -> None:
        """Nothing of it is needed any more. wait: until all slots are free."""
        for one in self._reading.values():
            one.reading.cancel()
        self._wrong += self._reading.values()
        self._reading.clear()
        self.reclaim(wait)

    def reclaim(self, wait: bool = False) -> None:
        """Give the pool back the slots of what was not needed and is not being read."""
        left = []
        for one in self._wrong:
            if not (wait or one.reading.done):
                left.append(one)
                continue
            absent = self._pool.slot_of[one.layer][one.expert] < 0
            try:
                one.reading.wait()
            except StreamerError:
                absent = False
            if absent and not self.reads(one.layer, one.expert):
                self._pool.place(one.layer, one.expert, one.slot)
                self._pool.unused(one.layer, one.expert)
            else:
                self._pool.release([one.slot])
        self._wrong = left
