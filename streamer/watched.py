"""One run, watched: the document that `streamer.profile` draws, and the routes it took.

    document, routes = watched_run(args, prompt, demo)

Times of a run whose experts are all resident are taken without its routers; what they
choose then comes from a second run over the same prompt, whose routers are read back.
Everything is plain data, ready for JSON; bytes and seconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .budget import Budget
from .calibrate import hit_step, resident_step
from .experts import held_bytes, stored_bytes
from .footprint import peak_footprint
from .loading import expert_bytes
from .machine import machine, versions
from .owners import OWNERS, Ledger, Sampler
from .probe import measure
from .profiler import PARTS, Profiler, Step
from .recorder import record
from .routes import Routes
from .session import Session, open_session

FORMAT, VERSION = "streamer-profile", 1
QUANTILES = (0.5, 0.9, 0.99)


def watched_run(args: argparse.Namespace, prompt: str, demo: Path) -> tuple[dict[str, Any], Routes]:
    """Generate as `streamer.run` would, and tell. Raises StreamerError."""
    session = open_session(args, prompt, demo)
    try:
        return _watched(session, args)
    finally:
        session.close()


def _watched(session: Session, args: argparse.Namespace) -> tuple[dict[str, Any], Routes]:
    streamer = session.streamer
    profiler = Profiler(session.model)
    ledger = Ledger(session.model, lambda: session.caches, streamer.opened.files)
    drafts: list[tuple[int, int]] = []  # of each verify pass: drafted, accepted
    streamer.watch = profiler
    before = session.drafts.drafted, session.drafts.accepted
    with Sampler(ledger) as sampler:
        for _ in session.reply(session.prompt_tokens, lambda done, total: None):
            now = session.drafts.drafted, session.drafts.accepted
            if now[0] > before[0]:
                drafts.append((now[0] - before[0], now[1] - before[1]))
                profiler.accepted(drafts[-1][1])
                before = now
    profiler.end()
    streamer.watch = None
    stats, peak = session.stats(), peak_footprint()
    costs = _costs(session, args, drafts)
    routes = profiler.routes()
    if not routes.calls and streamer.opened.layers:
        depth = args.mtp if isinstance(args.mtp, int) and streamer.opened.head else 0
        tokens = session.prompt_tokens
        routes = record(session.model, [tokens], len(session.tokens), depth)
    timing = session.timing
    document = {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine() | {"backend": mx.default_device().type.name},
        "versions": versions(),
        "model": _model(session),
        "options": {
            "memory": args.memory,
            "mtp": args.mtp,
            "executor": args.executor,
            "io": streamer.io,
            "disk": str(args.disk) if args.disk else None,
            "heat": args.heat,
            "kv_cache": stats["kv_cache"],
        },
        "budget": asdict(streamer.budget) | {"resident": streamer.resident},
        "run": {
            "prompt_tokens": timing.prompt_tokens,
            "prompt_seconds": timing.prompt_seconds,
            "generated_tokens": timing.generated_tokens,
            "decode_seconds": timing.decode_seconds,
            "tokens_per_second": timing.decode_rate,
            "bytes_read": stats["experts"]["bytes_read"],
            "peak_bytes": peak,
        },
        "memory": _memory(sampler, profiler, streamer.budget),
        "steps": _steps(profiler.steps),
        "experts": _experts(session, profiler, routes),
        "drafts": _drafts(drafts),
        "reads": _reads(profiler),
        "costs": costs,
    }
    return document, routes


def _model(session: Session) -> dict[str, Any]:
    opened = session.streamer.opened
    return {
        "name": opened.name,
        "fingerprint": opened.checkpoint.fingerprint,
        "bytes": opened.checkpoint.nbytes,
        "layers": [layer.path for layer in opened.layers],
        "head_layers": len(opened.layers) - len(opened.trunk_layers),
        "experts": opened.experts,
        "experts_per_token": opened.top_k,
        "bytes_per_expert": expert_bytes(opened),
        "groups": [
            {
                "experts": sum(layer.count for layer in layers),
                "stored_bytes": stored_bytes(fmt),
                "held_bytes": held_bytes(fmt),
            }
            for fmt, layers in opened.groups.items()
        ],
    }


def _memory(sampler: Sampler, profiler: Profiler, budget: Budget) -> dict[str, Any]:
    samples = sampler.samples
    ends = [step.seconds + profiler.began - sampler.began for step in profiler.steps]
    errors = [abs(sum(s.owners.values()) - s.footprint) / s.footprint for s in samples]
    largest = max(samples, key=lambda s: s.footprint)
    cached = [s.page_cache for s in samples if s.page_cache is not None]
    return {
        "seconds": [s.seconds for s in samples],
        "footprint": [s.footprint for s in samples],
        "owners": {name: [s.owners[name] for s in samples] for name in OWNERS},
        "page_cache": [s.page_cache for s in samples] if len(cached) == len(samples) else None,
        "limit": budget.limit,
        "planned": {name: getattr(budget, name) for name in OWNERS if name not in ("kv", "free")}
        | {"kv": budget.kv + budget.head_kv},
        "first_token_seconds": next(
            (end for end, s in zip(ends, profiler.steps, strict=True) if s.kind != "prefill"), 0.0
        ),
        "largest_footprint": largest.footprint,
        "largest": largest.owners,
        "largest_page_cache": max(cached, default=0),
        "worst_error": max(errors),
    }


def _steps(steps: Sequence[Step]) -> dict[str, Any]:
    """By column; the prompt's passes first, then one a generated step."""
    return {
        "kind": [s.kind for s in steps],
        "seconds": [s.seconds for s in steps],
        "rows": [s.rows for s in steps],
        "asked": [s.asked for s in steps],
        "misses": [s.misses for s in steps],
        "calls": [s.calls for s in steps],
        **{part: [s.parts[i] for s in steps] for i, part in enumerate(PARTS)},
    }


def _experts(session: Session, profiler: Profiler, routes: Routes) -> dict[str, Any]:
    use = profiler.use
    if not any(n.any() for n in use):
        use = [np.zeros(n, dtype=np.int64) for n in routes.counts]
        for call in routes.calls:
            np.add.at(use[call.layer], call.experts.reshape(-1), 1)
    counters = session.streamer.counters
    asked = counters.hits + counters.misses
    generated = [s for s in profiler.steps if s.kind != "prefill"][1:]
    chosen, missed = (sum(getattr(s, n) for s in generated) for n in ("asked", "misses"))
    order = np.sort(np.concatenate(use))[::-1] if use else np.zeros(0)
    tenth = order[: max(1, len(order) // 10)].sum() / max(1, order.sum())
    return {
        "use": [n.tolist() for n in use],
        "misses": [n.tolist() for n in profiler.missed],
        "residency": [n.tolist() for n in profiler.residency()],
        "slots": session.streamer.slots,
        "hits": counters.hits,
        "missed": counters.misses,
        "hit_rate": counters.hits / asked if asked else 1.0,
        "generated_hit_rate": 1 - missed / chosen if chosen else 1.0,
        "never_used": int((order == 0).sum()),
        "busiest_tenth": float(tenth),
    }


def _drafts(passes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of drafts at each depth: how many were verified, and how many were accepted."""
    deepest = max((drafted for drafted, _ in passes), default=0)
    depths = range(1, deepest + 1)
    drafted = [sum(d >= depth for d, _ in passes) for depth in depths]
    accepted = [sum(a >= depth for _, a in passes) for depth in depths]
    return {
        "depth": list(depths),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": [a / d for a, d in zip(accepted, drafted, strict=True)],
        "verify_passes": len(passes),
        "tokens_per_pass": statistics.mean(1 + a for _, a in passes) if passes else 1.0,
    }


def _reads(profiler: Profiler) -> dict[str, Any]:
    """Reads by size, and how long they took: waiting in the queue and under way."""
    reads = profiler.ended
    if not reads:
        return {"count": 0}
    sizes = np.array([r.nbytes for r in reads])
    took = np.array([r.took for r in reads])
    queued = np.array([r.queued for r in reads])
    seconds = profiler.steps[-1].seconds
    generated = np.array([r.generated for r in reads])
    edges = np.geomspace(max(1e-6, took.min()), took.max() * 1.0001, 25)
    octaves = np.arange(np.floor(np.log2(sizes.min())), np.floor(np.log2(sizes.max())) + 2)
    return {
        "count": len(reads),
        "bytes": int(sizes.sum()),
        "generated_bytes": int(sizes[generated].sum()),
        "median_bytes": float(np.median(sizes)),
        "size_edges": (2**octaves).tolist(),
        "size_counts": np.histogram(np.log2(sizes), octaves)[0].tolist(),
        "took_edges": edges.tolist(),
        "took_counts": np.histogram(took, edges)[0].tolist(),
        "took_quantiles": np.quantile(took, QUANTILES).tolist(),
        "queued_quantiles": np.quantile(queued, QUANTILES).tolist(),
        "quantiles": list(QUANTILES),
        "bytes_per_second": float(sizes.sum() / seconds),
        "one_bytes_per_second": float(sizes.sum() / took.sum()),
        "under_way": float(took.sum() / seconds),
        "in_queue": float(queued.sum() / seconds),
    }


def _costs(
    session: Session, args: argparse.Namespace, drafts: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """What forecasts for other budgets rest on, besides the steps."""
    model, streamer = session.model, session.streamer
    tokens, store = [*session.prompt_tokens, *session.tokens], streamer.store
    depth = round(statistics.mean(d for d, _ in drafts)) if drafts else 0
    found: dict[str, Any] = {
        "resident_step_seconds": resident_step(model, tokens, depth),
        "hit_step_seconds": hit_step(model, tokens, depth),
    }
    if store is not None:
        probed = measure(
            store.files, expert_bytes(streamer.opened), store.backend, drop_behind=store.drop_behind
        )
        found["disk_bytes_per_second"] = probed.bandwidth
        each, disk = expert_bytes(streamer.opened), args.disk
        slowed = each / disk.bandwidth + disk.latency if disk else 0.0
        found["read_seconds"] = max(probed.latency, slowed)
    return found
