"""What the benchmark compares, and what it says of each: configurations, rows, the table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Run = dict[str, Any]  # one turn of a worker, or {"failed": why}
KILLED = "killed by the limit"  # why, where that is what --limit was to find out


@dataclass(frozen=True)
class Configuration:
    """kind: mlx-lm (everything in memory), streamed or llama.cpp. share: %, of the experts in
    memory; None for what the memory limit leaves room for. disk: one imitated, or none.
    kv_bits: a channel's in the KV cache; 16 is mlx-lm's own cache."""

    kind: str
    share: int | None = None
    mtp: str = "off"
    executor: str = "layerwise"
    disk: str = "none"
    kv_bits: float = 16

    @property
    def plain(self) -> Configuration:
        """The same pool without drafts, layer by layer, with mlx-lm's caches."""
        return Configuration(self.kind, self.share, disk=self.disk)

    @property
    def label(self) -> str:
        parts = [self.kind]
        if self.kind == "streamed":
            parts = ["what fits" if self.share is None else f"{self.share}%"]
        parts += [f"mtp {self.mtp}"] if self.mtp != "off" else []
        parts += [self.executor] if self.executor != "layerwise" else []
        parts += [f"kv {self.kv_bits:g}"] if self.kv_bits != 16 else []
        parts += [f"disk {self.disk}"] if self.disk != "none" else []
        return ", ".join(parts)

    def job(self) -> dict[str, Any]:
        return asdict(self)


MEMORY = Configuration("mlx-lm")
LLAMA = Configuration("llama.cpp")


def crossed(
    shares: Iterable[int | None],
    drafts: Sequence[str],
    executors: Sequence[str],
    disks: Sequence[str] = ("none",),
    bits: Sequence[float] = (16,),
) -> list[Configuration]:
    """Every combination; executors and disks make no difference with all experts in memory."""
    found = []
    for share, disk, kv, executor, mtp in itertools.product(shares, disks, bits, executors, drafts):
        one = Configuration("streamed", share, mtp, executor, disk, kv)
        found.append(replace(one, executor="layerwise", disk="none") if share == 100 else one)
    return list(dict.fromkeys(found))


def suite(shares: Sequence[int | None], head: bool) -> list[Configuration]:
    """Plain decoding at every share; at the first that pages, all that changes how it is done."""
    found = [Configuration("streamed", share) for share in shares]
    base = next((c for c in found if c.share != 100), found[0])
    if head:
        found += [replace(base, mtp=mtp) for mtp in ("2", "auto")]
    if base.share != 100:
        found += [replace(base, executor=e) for e in ("rehearse", "auto")]
        found += [replace(base, mtp="2", executor="rehearse")] if head else []
    return [*found, replace(base, kv_bits=3.5)]


def row(one: Configuration, results: dict[Configuration, list[Run]], disk: float) -> Run:
    """Medians of a configuration's turns, compared turn by turn with the others'.

    disk: bytes per second. Figures of a configuration that failed are left out.
    """
    runs = results[one]
    made: Run = {"configuration": one.label} | one.job()
    if failed := [r["failed"] for r in runs if "failed" in r]:
        return made | {"failed": failed[0]}
    made |= {
        "tokens_per_second": 1 / statistics.median(r["seconds"] for r in runs),
        "seconds": [r["seconds"] for r in runs],
        "peak_bytes": max(r["peak"] for r in runs),
        "kernel_bytes": statistics.median(r["kernel_bytes"] for r in runs),
    }
    if one.plain != one:
        made |= _ratio("of_plain", results.get(one.plain), runs)
    if one.mtp != "off":
        made["drafted"] = sum(r["drafted"] for r in runs)
        made["acceptance"] = sum(r["accepted"] for r in runs) / max(1, made["drafted"])
        if "passes" in runs[0]:  # llama.cpp does not say
            made["verify_passes"] = sum(r["passes"] for r in runs)
    made |= _ratio("of_mlx_lm", results.get(MEMORY), runs)
    reference = next((r for r in results.values() if "out" in r[0]), None)
    if reference and "out" in runs[0]:
        same = all(r["out"] == m["out"] for m, r in zip(reference, runs, strict=True))
        # drafts are sampled with other noise, and coded caches are other caches
        if same or (one.kv_bits == 16 and (one.mtp == "off" or runs[0]["greedy"])):
            made["same_tokens"] = same
    if "misses" in runs[0]:
        asked = sum(r["hits"] + r["misses"] for r in runs)
        made["hit_rate"] = sum(r["hits"] for r in runs) / asked if asked else 1.0
        made["slots"] = runs[0]["slots"]
        made["bytes_per_token"] = statistics.median(r["bytes"] for r in runs)
        made |= _roofline(made["bytes_per_token"] / disk, runs, results)
    return made


def _ratio(name: str, others: list[Run] | None, runs: list[Run]) -> Run:
    """The median over turns of the others' seconds over these, where there are others."""
    if not others or "failed" in others[-1]:
        return {}
    pairs = zip(others, runs, strict=True)
    return {name: statistics.median(o["seconds"] / r["seconds"] for o, r in pairs)}


def _roofline(read: float, runs: list[Run], results: dict[Configuration, list[Run]]) -> Run:
    """The share reached of the speed at which nothing but computing or reading takes time."""
    ours = Configuration("streamed", 100)
    resident = [
        results[n] for n in (MEMORY, ours) if n in results and "failed" not in results[n][-1]
    ]
    if ours not in results:  # mlx-lm alone is no bound: our kernels may be faster
        return {}
    compute = [min(r["seconds"] for r in turn) for turn in zip(*resident, strict=True)]
    shares = (max(c, read) / r["seconds"] for c, r in zip(compute, runs, strict=True))
    return {"roofline": statistics.median(shares)}


def table(rows: list[Run]) -> str:
    """A markdown table of the rows."""
    columns: dict[str, list[str]] = {
        "experts in memory": [r["configuration"] for r in rows],
        "tok/s": [r.get("failed") or f"{r['tokens_per_second']:.1f}" for r in rows],
        "of mlx-lm": _cells(rows, "of_mlx_lm", "{:.2f}"),
        "of plain": _cells(rows, "of_plain", "{:.2f}"),
        "drafts accepted": _cells(rows, "acceptance", "{:.0%}"),
        "hit rate": _cells(rows, "hit_rate", "{:.0%}"),
        "MB read a token": _cells(rows, "bytes_per_token", "{:.1f}", 1e6),
        "peak memory": _cells(rows, "peak_bytes", "{:.0f} MB", 1e6),
        "roofline": _cells(rows, "roofline", "{:.0%}"),
        "tokens": [_SAME[r.get("same_tokens")] for r in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    head = [" | ".join(columns), "|".join(["---"] * len(columns))]
    lines = ["| " + head[0] + " |", "|" + head[1] + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


_SAME = {True: "same", False: "DIFFERENT", None: ""}


def _cells(rows: list[Run], key: str, form: str, unit: float = 1) -> list[str]:
    return [form.format(r[key] / unit) if key in r else "" for r in rows]
