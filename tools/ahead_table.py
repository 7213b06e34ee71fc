"""What reads ahead of need would gain: guessers on the demo's own routing, an imagined machine.

    python -m tools.ahead_table --pools 50,25 --disks 0.5,1.5 --step 4.5

The demo decodes a few texts with all of its experts in memory, and what every layer of every pass
chose is kept beside the states that rehearsals start from. Then time is simulated, pass by pass
and layer by layer: a disk that sends chunk after chunk, demands first; the runtime's pool; experts
computed as they come. Rehearsed rows are really computed, with the experts that the simulated pool
holds at that moment, so that what they name, and what reading it does to the pool, is real; only
the clock is not. `--step`, `--row`, `--head`: milliseconds of a pass without misses, of what a
second row adds to it, of a draft. Ways to guess:

    look      layers behind one that waits, in its wait
    router    the next layer's router on what this one's took
    token     what layers chose when the draft's token was last put in, for the next pass
    keep      the same, not read, but not evicted where it is there
    draft     the draft rehearsed in waits, as far as the pass has come, for the next pass
    inline    the draft as a second row of every pass, for the next pass
    pass      all of this pass's, known at its start (a bound)
    next      all of the next pass's, layer by layer (a bound)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from streamer.console import Parser, command, number
from streamer.foresee import BUCKETS, LEAST, SHARE
from streamer.guess import Moment, Token
from streamer.lrfu import Lrfu
from streamer.ways import SLACK
from tools.ahead_demo import Demo, Text, again
from tools.ahead_disk import CHUNK, Disk, Read
from tools.rehearsal_table import PROMPTS

WAYS = ("", "look", "router", "token", "keep", "draft", "inline", "look+draft", "look+router")
BOUNDS = ("pass", "next")
HEADER = (
    "| pool | disk | way | tok/s | of layer-wise | misses | recall | precision | read | exact |\n"
    + "|---" * 10
    + "|"
)


def parser() -> Parser:
    p = Parser(prog="ahead_table", description="What reads ahead of need would gain, simulated.")
    p.add_argument("--pools", default="75,50,25,12", help="%% of experts in memory")
    p.add_argument("--disks", default="0.5,1,1.5,5", help="GB/s")
    p.add_argument("--ways", default=",".join((*WAYS, *BOUNDS)))
    p.add_argument("--step", type=number(0.001), default=4.5, help="ms of a pass, all at hand")
    p.add_argument("--row", type=number(0), default=1.8, help="ms that a second row adds")
    p.add_argument("--head", type=number(0), default=1.0, help="ms of a draft")
    p.add_argument("--paged-head", action="store_true", help="head's experts miss, too")
    p.add_argument("--copy", type=number(0), default=0.1, help="ms of a read that comes early")
    p.add_argument("--router", type=number(0), default=0.06, help="ms to ask a router")
    p.add_argument("--host", type=number(0), default=0.1, help="ms to ask for reads")
    p.add_argument("--expert-bytes", type=number(1), default=1.08e6)
    p.add_argument("--tokens", type=number(8, 4096, int), default=48)
    p.add_argument("--texts", type=number(2, len(PROMPTS), int), default=4)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    demo = Demo()
    texts = [demo.text(prompt, args.tokens) for prompt in PROMPTS[: args.texts]]
    right = [a == b for t in texts for a, b in zip(t.drafts, t.tokens[1:], strict=False)]
    print(f"drafts that come true: {np.mean(right):.2f}\n")
    print(HEADER)
    for pool in map(int, args.pools.split(",")):
        for disk in map(float, args.disks.split(",")):
            base = 0.0
            for way in args.ways.split(","):
                sim = Simulation(demo, way, pool * demo.total // 100, disk * 1e9, args)
                for text in texts:
                    sim.decode(text)
                rate = sim.passes / sim.seconds
                base = base or rate
                cells = [f"{pool}%", f"{disk:g} GB/s", way or "layer-wise", f"{rate:.1f}"]
                cells += [f"{rate / base:.2f}", f"{sim.misses / sim.passes:.1f}"]
                cells += [f"{sim.used / max(1, sim.misses):.2f}" if sim.read else ""]
                cells += [f"{sim.used / sim.read:.2f}" if sim.read else ""]
                cells += [f"{(sim.misses - sim.used + sim.read) / max(1, sim.misses):.2f}"]
                cells += [f"{sim.exact / sim.passes:.2f}" if "draft" in way or "inl" in way else ""]
                print(f"| {' | '.join(cells)} |", flush=True)
    return 0


class Simulation:
    """One way on one machine; the first text warms the pool and is not counted."""

    def __init__(self, demo: Demo, way: str, slots: int, bandwidth: float, args: Any):
        self._demo, self._way, self._slots = demo, way.split("+"), slots
        self._disk = Disk(bandwidth)
        self._chunks = -(-int(args.expert_bytes) // CHUNK)
        self._layer = args.step / 1e3 / len(demo.layers)
        self._row, self._head = args.row / 1e3 / len(demo.layers), args.head / 1e3
        self._host, self._copy = args.host / 1e3, args.copy / 1e3
        self._guessing = args.router / 1e3
        self._paged, self._missed, self._ready = args.paged_head, 0.0, 0.0
        self._pool = Lrfu(slots, demo.counts)
        self._token = Token(len(demo.layers), demo.top_k)
        self._ahead: dict[tuple[int, int, int], tuple[int, Read]] = {}  # pass, layer, expert
        self._late: dict[tuple[int, int], Read] = {}  # placed, perhaps not there yet
        self._expected: list[tuple[int, int]] = []  # by the next pass
        self._likely: dict[tuple[str, int], list[float]] = {}
        self._named: dict[tuple[int, int, int], tuple[str, int]] = {}
        self._now, self._at = 0.0, 0
        self.seconds, self.passes, self.misses = 0.0, 0, 0
        self.read = self.used = self.exact = 0
        self._draft_at, self._look_at = -1, 0  # layers that were rehearsed, of either row
        self._draft_x: mx.array | None = None
        self._look_x: mx.array | None = None
        self._exact = True
        self._keep: tuple[int, frozenset[int]] | None = None
        self._counts = False
        self._rate = 0.3  # share of misses

    def decode(self, text: Text) -> None:
        began = self._now
        self._drop(lambda key: True)
        for p in range(len(text.tokens)):
            self._pass(text, p)
        if self._counts:
            self.seconds += self._now - began
            self.passes += len(text.tokens)
        self._counts = True

    def _pass(self, text: Text, p: int) -> None:
        self._at += 1
        self._keep = None
        self._pool.expect_nothing()
        for layer, expert in self._expected:
            if self._pool.slot_of[layer][expert] >= 0:
                self._pool.expect(layer, [expert])
        self._expected = []
        if p and text.drafts[p - 1] != text.tokens[p]:
            self._drop(lambda key: key[0] == self._at)
        self._draft_at, self._draft_x, self._exact = -1, None, True
        self._look_at, self._look_x, self._ready = 0, None, 0.0
        if "inline" in self._way:
            self._make_draft()
            self._draft(text, p, -1)
        if "keep" in self._way:
            self._make_draft()
            for layer, e, _ in self._token.guess(Moment(np.array([text.drafts[p]]))):
                if self._pool.slot_of[layer][e] >= 0:
                    self._expected.append((layer, e))
                    self._pool.expect(layer, [e])
        if "token" in self._way:
            self._make_draft()
            moment = Moment(np.array([text.drafts[p]]))
            for layer, e, strength in self._token.guess(moment):
                self._guess("token", layer, [e], 1, strength)
        if "pass" in self._way:
            for layer, ids in enumerate(text.chosen[p]):
                self._guess("pass", layer, ids.tolist(), 0)
        for layer in range(len(self._demo.layers)):
            self._run_layer(text, p, layer)
        self.exact += self._exact and self._draft_at == len(self._demo.layers) and self._counts

    def _run_layer(self, text: Text, p: int, layer: int) -> None:
        half = self._layer / 2
        self._now += half + ("inline" in self._way) * self._row / 2
        ids = text.chosen[p][layer]
        pool, disk = self._pool, self._disk
        disk.run(self._now)
        pool.chose(layer, ids)
        self._token.observe(layer, np.array([text.tokens[p]]), ids[None])
        table, need = pool.slot_of[layer], ids.tolist()
        self._keep = layer, frozenset(need)
        hits = [e for e in need if table[e] >= 0]
        misses = [e for e in need if table[e] < 0]
        pool.touch(layer, hits)
        self._rate += (len(misses) / len(need) - self._rate) / 100
        if self._counts:
            self.misses += len(misses)
        self._score(layer, set(misses))
        waited = [self._late[layer, e] for e in hits if (layer, e) in self._late]
        late = []
        for e in misses:
            found = self._ahead.pop((self._at, layer, e), None)
            if found is None:
                late.append(e)
                continue
            self.used += self._counts
            self._now += self._copy * (found[1].done <= self._now)
            disk.promote(found[1], self._now)
            pool.place(layer, e, found[0])
            self._late[layer, e] = found[1]
            waited.append(found[1])
        self._drop(lambda key: key[:2] == (self._at, layer))
        self._now += self._host * bool(misses)
        for e, slot in zip(late, pool.take(len(late), (layer, frozenset(need))), strict=True):
            read = Read(self._chunks, self._now, None)
            disk.ask(read, self._now)
            pool.place(layer, e, slot)
            self._late[layer, e] = read
            waited.append(read)
        if "router" in self._way and layer + 1 < len(self._demo.layers):
            x = np.array(text.taken[p][layer]).reshape(1, -1)
            self._now += self._guessing
            for to, e, strength in self._demo.router.guess(Moment(np.zeros(1), layer, x)):
                self._guess("router", to, [e], 0, strength)
        if "inline" in self._way:
            self._draft(text, p, layer)
        if "next" in self._way and p + 1 < len(text.tokens):
            self._guess("next", layer, text.chosen[p + 1][layer].tolist(), 1)
        waited = [r for r in waited if r.done > self._now]
        if waited:
            for name in self._way:
                self._use_wait(name, text, p, layer)
        # what is at hand computes first, then each as it comes
        each = half / len(need)
        t = self._now + each * (len(need) - len(waited))
        for read in waited:
            t = max(t, disk.finish(read)) + each
        self._now = t + ("inline" in self._way) * self._row / 2
        for key in [k for k, r in self._late.items() if r.done <= self._now]:
            del self._late[key]

    def _use_wait(self, name: str, text: Text, p: int, layer: int) -> None:
        cost, begun = self._layer + self._host, False
        while True:
            left = self._disk.left(self._now)
            if left < cost * (1.0 if begun else SLACK):
                return
            begun = True
            if name == "look":
                at = max(self._look_at, layer + 1)
                if at >= len(self._demo.layers):
                    return
                if self._look_at <= layer:
                    self._look_x, _ = self._demo.experts(
                        layer, text.opened[p][layer], text.taken[p][layer], self._have
                    )
                self._now += cost
                assert self._look_x is not None
                x, ids, *_ = self._demo.layer(
                    at, self._look_x, again(text.before[p][at]), self._have
                )
                self._look_x, self._look_at = x, at + 1
                self._guess("look", at, ids.tolist(), 0)
            elif name == "draft":
                if self._draft_at > layer:
                    return
                if self._draft_at < 0 and not self._ready:
                    self._read_head()
                if self._ready > self._now:
                    return
                self._now += self._head if self._draft_at < 0 else cost
                self._draft(text, p, self._draft_at)
            else:
                return

    def _make_draft(self) -> None:
        """Before a pass."""
        self._read_head()
        self._now = max(self._now, self._ready) + self._head

    def _read_head(self) -> None:
        """What of the head's experts is absent, of 8 bits where the trunk's have 4."""
        self._ready = self._now
        if not self._paged:
            return
        self._missed += self._rate * self._demo.top_k
        count, self._missed = int(self._missed), self._missed % 1
        for _ in range(count):
            read = Read(2 * self._chunks, self._now, None)
            self._disk.ask(read, self._now)
            self._ready = self._disk.finish(read)

    def _draft(self, text: Text, p: int, at: int) -> None:
        """The draft's row, one layer further; -1: the draft itself."""
        if at < 0:
            self._draft_at, self._draft_x = 0, self._demo.embed(text.drafts[p])
            return
        assert self._draft_x is not None
        x, ids, *_ = self._demo.layer(at, self._draft_x, again(text.before[p + 1][at]), self._have)
        self._draft_at, self._draft_x = at + 1, x
        self._exact &= bool(self._have(at, ids).all())
        self._guess("draft", at, ids.tolist(), 1)

    def _have(self, layer: int, ids: np.ndarray) -> np.ndarray:
        self._disk.run(self._now)
        there = self._pool.slot_of[layer][ids] >= 0
        for i, e in enumerate(ids.tolist()):
            read = self._late.get((layer, e))
            there[i] &= read is None or read.done <= self._now
        return there

    def _guess(
        self, name: str, layer: int, experts: Sequence[int], later: int, strength: float = 0.9
    ) -> None:
        pool, at = self._pool, self._at + later
        table = pool.slot_of[layer]
        bucket = min(BUCKETS - 1, int(strength * BUCKETS))
        likely = self._likely.setdefault((name, bucket), [strength, 6.0])[0]
        for e in experts:
            if table[e] >= 0:
                if name not in ("token", "router"):
                    if later:
                        self._expected.append((layer, e))
                    pool.expect(layer, [e])
                continue
            key = at, layer, e
            self._named.setdefault(key, (name, bucket))
            busy = self._disk.busy / max(1e-9, self._now)
            if key in self._ahead or len(self._ahead) >= self._slots // SHARE:
                continue
            if likely < max(LEAST, busy) and name not in BOUNDS:
                continue
            read = Read(self._chunks, self._now, len(self._demo.layers) * later + layer)
            (slot,) = pool.take(1, self._keep)
            self._disk.ask(read, self._now)
            self._ahead[key] = slot, read
            self.read += self._counts

    def _score(self, layer: int, misses: set[int]) -> None:
        for key in [k for k in self._named if k[0] <= self._at and k[1] == layer]:
            likely = self._likely[self._named.pop(key)]
            likely[1] += 1
            likely[0] += ((key[2] in misses) - likely[0]) * max(0.01, 1 / likely[1])

    def _drop(self, which: Callable[[tuple[int, int, int]], bool]) -> None:
        """Guesses that are not needed: those that came stay, the first to be evicted."""
        for key in [k for k in self._ahead if which(k)]:
            slot, read = self._ahead.pop(key)
            _, layer, expert = key
            if self._disk.cancel(read, self._now):
                self.read -= self._counts and read.left == self._chunks
                self._pool.release([slot])
                continue
            self._now += self._copy
            if self._pool.slot_of[layer][expert] < 0:
                self._pool.place(layer, expert, slot)
                self._pool.unused(layer, expert)
            else:
                self._pool.release([slot])


if __name__ == "__main__":
    sys.exit(main())
