"""What paging the experts of a model cost so far; `--stats` shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What the experts cost so far. Hits and misses count a layer's distinct experts.

    waits: calls of a layer that missed.
    prefetched, prefetch_used: experts read ahead of need, and those that were then needed.
    bytes_guessed: of those that no layer was waiting for.
    rehearsals: times that rehearsed layers were read back; exact_layers: those of the layers
    that were right; rehearsed_misses: misses of the passes resumed.
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

    def rehearsal(self) -> dict[str, float]:
        """The `rehearsal` block of `--stats`."""
        return {
            "passes": self.rehearsals,
            "exact_layers": self.exact_layers,
            "recall": self.prefetch_used / max(1, self.rehearsed_misses),
            "bytes": self.bytes_guessed,
            "precision": self.prefetch_used / max(1, self.prefetched),
        }
