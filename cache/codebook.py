"""Codebooks for rotated channels, which are close to independent N(0, 1).

`lloyd_max(b)` is the paper's: 2^b levels for one channel. `pairs(b)` codes two channels by one
index of 2b bits, which fills the plane better than a product of two lines: 7 to 18% less error at
equal bits, and half a bit is no special case (2.5 bits: 32 points). The points are in pairs.py,
found by Lloyd's iteration on the density; tests check them by integrating it again. They are
rounded to a grid of signed bytes, so that kernels can multiply bytes and be exact: 0.3% more error
at 4 bits, 0.1% at 3.5, less below. At 8 bits there are 256 levels for one channel, of 13 bits each:
the upper half are sixteen pieces of eight, for kernels that compute levels rather than look them
up, and the lower half are their negatives: 0.5% more error than Lloyd-Max.

    from cache.codebook import pairs; pairs(2.5).points.shape    # (32, 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .pairs import POINTS

BITS = (2, 2.5, 3, 3.5, 4, 8)
REACH = 5.0  # pairs further out are as good as on this edge
CELLS = 512

# Level i of a piece is start + slope * i + bent * BEND[i], times LEVEL. Found by Lloyd's iteration
# over such levels; the largest is 127 * 32 + 15, two signed bytes for kernels that multiply bytes.
BEND = (0, 0, 1, 2, 4, 8, 14, 26)
LEVEL = 0.00112695
PIECES = (
    (7, 15, 0), (128, 15, 0), (249, 15, 0), (369, 16, 0), (495, 16, 0), (622, 17, 0),
    (757, 17, 0), (895, 18, 0), (1042, 19, 0), (1197, 21, 0), (1368, 23, 0), (1553, 27, 0),
    (1771, 31, 0), (2029, 37, 1), (2359, 53, 2), (2865, 88, 23),
)  # fmt: skip


@dataclass(frozen=True)
class Codebook:
    """points [2^width, channels] float32; width: bits of an index; channels: 1 or 2.

    nearest: for pairs, the index of the point nearest to each cell of a grid over
    [-REACH, REACH]^2, uint8 [CELLS * CELLS], first channel slowest; for one channel the
    boundaries between neighbouring levels, ascending.
    """

    points: np.ndarray
    width: int
    channels: int
    nearest: np.ndarray

    @property
    def bits(self) -> float:
        """Bits per channel."""
        return self.width / self.channels


def of_bits(bits: float) -> Codebook:
    """The codebook that the shipped codec uses at `bits` per channel."""
    return pairs(bits) if bits != 8 else levels()


@lru_cache
def levels() -> Codebook:
    """The 256 levels of 8 bits."""
    steps = np.arange(8)
    upper = np.concatenate([a + b * steps + c * np.array(BEND) for a, b, c in PIECES])
    points = np.concatenate([-upper[::-1], upper]).astype(np.float32) * np.float32(LEVEL)
    return Codebook(points[:, None], 8, 1, (points[1:] + points[:-1]) / 2)


def _on_grid(points: np.ndarray, steps: int) -> np.ndarray:
    """Points as float32 multiples, the largest of them `steps`."""
    grid = np.float32(np.abs(points).max() / steps)
    return np.round(points / grid).astype(np.float32) * grid


@lru_cache
def pairs(bits: float) -> Codebook:
    """2^(2 * bits) points of the plane. Raises KeyError for bits other than 2 to 4 by halves."""
    points = _on_grid(np.array(POINTS[round(2 * bits)]), 127)
    axis = (np.arange(CELLS, dtype=np.float32) + 0.5) * (2 * REACH / CELLS) - REACH
    half = (points**2).sum(1) / 2
    rows = [
        (x * points[:, 0] + axis[:, None] * points[:, 1] - half).argmax(1).astype(np.uint8)
        for x in axis
    ]
    return Codebook(points, round(2 * bits), 2, np.concatenate(rows))


@lru_cache
def lloyd_max(bits: int) -> Codebook:
    """The least-error levels for N(0, 1): each is the mean of what is nearest to it.

    Newton's steps, as Lloyd's iteration takes thousands (seconds) at 8 bits.
    """
    count = 2**bits
    edges = np.array([math.sqrt(3) * _quantile(i / count) for i in range(1, count)])
    levels = _centroids(edges)
    for _ in range(50):
        edges = (levels[1:] + levels[:-1]) / 2
        moved, slope = _centroids(edges), _slope(edges)
        step = np.linalg.solve(np.eye(count) - slope, moved - levels)
        levels = levels + step
        if np.abs(step).max() < 1e-7:
            break
    edges = (levels[1:] + levels[:-1]) / 2
    return Codebook(levels.astype(np.float32)[:, None], bits, 1, edges.astype(np.float32))


def _centroids(edges: np.ndarray) -> np.ndarray:
    """Means of N(0, 1) between neighbouring edges, the outermost to infinity."""
    density = np.concatenate([[0], np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi), [0]])
    # the tail above is exact where 1 - cdf would cancel
    below = np.array([0.0, *(math.erfc(-e / math.sqrt(2)) / 2 for e in edges), 1.0])
    above = np.array([1.0, *(math.erfc(e / math.sqrt(2)) / 2 for e in edges), 0.0])
    mass = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))
    return -np.diff(density) / mass


def _slope(edges: np.ndarray) -> np.ndarray:
    """How the means between edges, the middles of levels, move with the levels: [n, n]."""
    inner = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    means = _centroids(edges)
    mass = -np.diff(np.concatenate([[0], inner, [0]])) / means
    slope = np.zeros((len(means), len(means)))
    for i, (edge, density) in enumerate(zip(edges, inner, strict=True)):
        for cell, sign in ((i, 1), (i + 1, -1)):
            moves = sign * density * (edge - means[cell]) / mass[cell] / 2
            slope[cell, i] += moves
            slope[cell, i + 1] += moves
    return slope


def _quantile(p: float) -> float:
    """Where the normal distribution function is p, by bisection."""
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.erfc(-middle / math.sqrt(2)) / 2 < p:
            low = middle
        else:
            high = middle
    return low
