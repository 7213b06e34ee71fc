"""What paging the experts of a model cost so far; `--stats` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """One source of guesses, in experts.

    misses: of the passes that it guessed in; named: absent ones that it named, and right, those
    of them that were then asked for; read: named and read ahead, used: of those, asked for.
    """

    misses: int = 0
    named: int = 0
    right: int = 0
    read: int = 0
    used: int = 0

    @property
    def recall(self) -> float:
        return self.right / max(1, self.misses)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.named)

    def stats(self, expert_bytes: int) -> dict[str, float]:
        return {
            "recall": self.recall,
            "precision": self.precision,
            "named": self.named,
            "bytes": self.read * expert_bytes,
            "bytes_used": self.used * expert_bytes,
        }


@dataclass
class Demands:
    """Reads that a layer waited for, each call's from when they were asked for to the last."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        self.calls += 1
        self.nbytes += nbytes
        self.seconds += seconds

    def stats(self) -> dict[str, float]:
        each = self.seconds / max(1, self.nbytes)
        return {"calls": self.calls, "bytes": self.nbytes, "seconds_per_gigabyte": each * 1e9}


@dataclass
class Counters:
    """What the experts cost so far. Hits and misses count a layer's distinct experts.

    waits: calls of a layer that missed. syncs: times that a pass stood still for what a router
    chose to be looked up by Python; none where the extension does so (`streamer.serving`).
    prefetched, prefetch_used: experts read ahead of need, and those that were then needed.
    bytes_guessed: of those that no layer was waiting for.
    rehearsals: times that rehearsed layers were read back; exact_layers: those of the layers
    that were right; rehearsed_misses: misses of the passes resumed. sources: of guesses, by
    name; alone, beside: reads of layers asked for while no guess was under way, and while one was.
    """

    hits: int = 0
    misses: int = 0
    bytes_wanted: int = 0
    io_wait_seconds: float = 0.0
    waits: int = 0
    syncs: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    bytes_guessed: int = 0
    rehearsals: int = 0
    exact_layers: int = 0
    rehearsed_misses: int = 0
    sources: dict[str, Tally] = field(default_factory=dict)
    alone: Demands = field(default_factory=Demands)
    beside: Demands = field(default_factory=Demands)

    def prefetch(self, expert_bytes: int) -> dict[str, dict[str, float]]:
        """The `prefetch` block of `--stats`: sources that guessed, and what demands took."""
        found = {name: tally.stats(expert_bytes) for name, tally in self.sources.items()}
        demands = {"demands": self.alone.stats(), "demands_beside_guesses": self.beside.stats()}
        return found | demands

    def rehearsal(self) -> dict[str, float]:
        """The `rehearsal` block of `--stats`."""
        return {
            "passes": self.rehearsals,
            "exact_layers": self.exact_layers,
            "recall": self.prefetch_used / max(1, self.rehearsed_misses),
            "bytes": self.bytes_guessed,
            "precision": self.prefetch_used / max(1, self.prefetched),
        }
