"""What a memory budget buys, before anything is loaded.

    python -m streamer.plan --model PATH --memory 16GB --context 32768
    python -m streamer.plan --model PATH --memory 16GB --json

The division is the loader's own (`streamer.budget.divide`). Disk speed, the rate of matrix
products and the time of a layer's experts are measured here, in a second or two, by the
kernels that decoding runs on; what stands between the products is not, so that the speed is
an upper bound for small models. Tokens per second is a range, since hit rates depend on the
text: from uniform routing, read from the disk, at one end to the skewed use seen on a trained
model at the other, read from the page cache as far as memory beyond the budget can hold the files.
Sizes are in units of 1024 as `--memory` takes them, a disk's rate in 10**9 bytes a second.
A profile of a run of the same model (`streamer.profile --json`) replaces the range by what its
text would give:

    python -m streamer.plan --model PATH --memory 16GB --profile profile.json
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .console import Parser, command, filename, number
from .errors import UsageError
from .interrupted import importing
from .kv import bits_option

TIMED_BYTES = 96 << 20  # of experts that `experts_seconds` holds, at most
PROMPT = 1 << 16  # tokens that the runtime is measured with, at most
CALLS = 12  # that it times at once
# Share of a layer's chosen experts found in a pool that holds a share of all
# experts: measured on the embedded demo, whose routers are trained.
HITS = ((0.0, 0.0), (0.12, 0.35), (0.25, 0.58), (0.5, 0.81), (0.75, 0.94), (0.9, 0.96), (1.0, 1.0))


@dataclass(frozen=True)
class Forecast:
    """Expected decoding, (worse, better). Bytes per token, seconds, tokens per second.

    disk_bytes_per_second: None where nothing is read.
    """

    hit_rate: tuple[float, float]
    read_bytes: tuple[float, float]
    compute_seconds: float
    tokens_per_second: tuple[float, float]
    disk_bytes_per_second: float | None
    reason: str


def parser() -> Parser:
    p = Parser(prog="streamer plan", description="Show what a memory budget buys.")
    p.add_argument("--model", help="folder or repository; the embedded demo when left out")
    p.add_argument("--memory", help="8GB, 50%% (of the experts), min; default: what can be spared")
    p.add_argument("--context", type=number(1, 1 << 30, int), default=4096, help="tokens (4096)")
    p.add_argument("--dtype", choices=("auto", "stored", "float32"), default="auto")
    p.add_argument("--kv-bits", type=bits_option, default="auto", metavar="auto|16|8|4|3.5|3|2.5|2")
    p.add_argument("--mtp", choices=("auto", "off"), default="off", help="plan for the MTP head")
    p.add_argument(
        "--profile", type=filename, metavar="FILE", help="foretell from streamer profile's JSON"
    )
    p.add_argument("--json", action="store_true", help="print one line of JSON instead")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with importing():
        from .budget import divide
        from .footprint import default_budget
        from .hub import resolve
        from .opened import open_model
        from .run import DEMO
        from .session import open_tokenizer  # with all that a run has imported by then

    path = DEMO if args.model is None else resolve(args.model)
    opened = open_model(path, args.dtype, mtp=args.mtp == "auto")
    # its memory belongs to the runtime that is measured, and what a prompt leaves behind
    open_tokenizer(opened).encode("def " * min(args.context, PROMPT))
    spare = default_budget()[0] if args.memory is None else None
    budget = divide(opened, args.memory, args.context, spare=spare, kv_bits=args.kv_bits)
    forecast = from_profile(args.profile, opened, budget) if args.profile else None
    forecast = forecast or foresee(opened, budget)
    if args.json:
        told = {"budget": asdict(budget), **describe(opened), **asdict(forecast)}
        print(json.dumps(told, allow_nan=False))
    else:
        print(table(opened, budget, forecast))
    return 0


def foresee(opened: Any, budget: Any) -> Forecast:
    """Hit rate, reads and speed that `budget` should give, without drafting."""
    from .experts import stored_bytes
    from .loading import expert_bytes
    from .probe import choose_backend

    layers = opened.trunk_layers
    asked = sum(opened.top_k * stored_bytes(layer.format) for layer in layers)
    share = min(1.0, sum(budget.slots) / max(1, opened.experts))
    hits = (share, max(share, _hits(share)))
    reads = (asked * (1 - hits[0]), asked * (1 - hits[1]))
    compute = trunk_weights(opened) / multiply_rate() + experts_seconds(opened)
    rate, settled, reason = float("inf"), float("inf"), "nothing is read"
    if layers:
        files = opened.files
        choice = choose_backend(files, expert_bytes(opened), budget.limit - budget.runtime)
        rate, reason = choice.bandwidth_bytes_per_s, choice.reason
        settled = max(rate, choice.settled_bytes_per_s)
    speed = (1 / (compute + reads[0] / rate), 1 / (compute + reads[1] / settled))
    return Forecast(hits, reads, compute, speed, _finite(rate), reason)


def from_profile(file: Path, opened: Any, budget: Any) -> Forecast:
    """What the text of a profiled run should give in `budget`, on the machine it ran on.

    Raises UsageError for a file that is no profile, or another model's.
    """
    import numpy as np

    from .forecast import at_share

    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["model"]["fingerprint"] != opened.checkpoint.fingerprint:
            raise UsageError(f"{file} is the profile of another checkpoint than {opened.path}")
        share = sum(budget.slots) / max(1, opened.experts)
        with np.errstate(all="raise"):
            hits, read, speed, step = map(float, at_share(document, share))
        rate = float(document["costs"].get("disk_bytes_per_second", float("inf")))
        sane = 0 <= hits <= 1 and min(read, step) >= 0 and min(speed, rate) > 0
        if not (sane and math.isfinite(read + step + speed)):
            raise ValueError("it tells of what cannot be")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UsageError(f"{file} is not the JSON of streamer profile") from error
    reason = f"as in the run that {file} tells of"
    return Forecast((hits, hits), (read, read), step, (speed, speed), _finite(rate), reason)


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None


def trunk_weights(opened: Any) -> int:
    """Weights of the trunk that one token multiplies with, its experts' not among them."""
    from .opened import in_head, trunk_parameters

    found = 0
    for path, array in trunk_parameters(opened.model):
        if in_head(path):
            continue
        if array.ndim >= 2 and not path.endswith(("scales", "biases", "embed_tokens.weight")):
            found += array.size * (32 // _bits(opened, path, array))
    return found


def _bits(opened: Any, path: str, array: Any) -> int:
    """Bits a packed weight has per value, 32 for one that is not packed."""
    import mlx.core as mx

    if array.dtype != mx.uint32:
        return 32
    module = dict(opened.model.named_modules()).get(path.rsplit(".", 1)[0])
    return getattr(module, "bits", 4)


def experts_seconds(opened: Any) -> float:
    """Seconds of a token's experts in all layers, each run as decoding runs it: the module that
    is bound to a pool, over more slots than caches keep, which hold zeros."""
    import mlx.core as mx

    from kernels import fast

    from .experts import held_bytes, projections
    from .slots import SlotArrays

    whole = 0.0
    for fmt in {layer.format for layer in opened.trunk_layers}:
        alike = [layer for layer in opened.trunk_layers if layer.format == fmt]
        chosen = max(1, min(opened.top_k, TIMED_BYTES // held_bytes(fmt)))
        slots = max(chosen, min(alike[0].count, TIMED_BYTES // held_bytes(fmt)))
        inner = SlotArrays(fmt, slots).bind(alike[0].switch)
        _, first = next(iter(projections(alike[0].switch)))
        x = mx.ones((1, 1, first.input_dims), dtype=opened.widen or mx.bfloat16)
        calls = [mx.arange(i * chosen, (i + 1) * chosen) % slots for i in range(CALLS)]
        mx.eval(calls)
        best = float("inf")
        with fast.installed():
            for _ in range(4):
                began = time.perf_counter()
                mx.eval([inner(x, ids.astype(mx.uint32)[None, None]) for ids in calls])
                best = min(best, time.perf_counter() - began)
        whole += len(alike) * best / CALLS * opened.top_k / chosen
    return whole


def multiply_rate() -> float:
    """Weights a second of 4-bit products with one row, by the kernels that decoding runs on."""
    import mlx.core as mx

    from kernels import fast

    n, each = 2048, 16  # 34 MB, more than caches keep from step to step
    packed = [mx.quantize(mx.random.normal((n, n)), 64, 4) for _ in range(each)]
    x = mx.ones((1, n))
    mx.eval(packed, x)
    best = float("inf")
    with fast.installed():
        for _ in range(4):
            began = time.perf_counter()
            mx.eval([mx.quantized_matmul(x, *p, group_size=64, bits=4) for p in packed])
            best = min(best, time.perf_counter() - began)
    return each * n * n / best


def describe(opened: Any) -> dict[str, Any]:
    """The model's own figures."""
    from .loading import expert_bytes

    return {
        "model": str(opened.path),
        "model_bytes": opened.checkpoint.nbytes,
        "moe_layers": len(opened.layers),
        "experts": opened.experts,
        "experts_per_token": opened.top_k,
        "bytes_per_expert": expert_bytes(opened),
        "mtp": list(opened.head_notes),
    }


def table(opened: Any, budget: Any, forecast: Forecast) -> str:
    """The plan for people."""
    from .footprint import format_size
    from .loading import expert_bytes

    layers = len(opened.layers)
    rows = [
        ("model", f"{opened.name}, {format_size(opened.checkpoint.nbytes)} on disk"),
        ("budget", format_size(budget.limit)),
        ("  runtime", format_size(budget.runtime)),
        ("  trunk", format_size(budget.trunk)),
        *_head_rows(opened, budget),
        ("  KV cache", _kv_row(opened, budget)),
        ("  workspace", f"{format_size(budget.workspace)}, prefill {budget.chunk} tokens a pass"),
    ]
    if layers:
        slots = sum(budget.slots)
        rows += [
            (
                "  experts",
                f"{format_size(budget.pool)}: {slots} of {budget.experts} "
                f"({slots / budget.experts:.0%}), {slots / layers:.1f} of "
                f"{opened.layers[0].count} a layer, {format_size(expert_bytes(opened))} each",
            ),
            ("smallest", _smallest(opened, budget)),
            ("disk", forecast.reason),
            (
                "reads",
                f"{_sizes(forecast.read_bytes[::-1])} a token "
                f"(hit rate {_range(forecast.hit_rate, '.0%')})",
            ),
        ]
    rows.append(("speed", f"{_range(forecast.tokens_per_second, '.1f')} tokens/s"))
    return "\n".join(f"{name:12} {text}" for name, text in rows)


def _smallest(opened: Any, budget: Any) -> str:
    """The smallest budgets that work, with the KV cache as planned and as small as it gets."""
    from .budget import MIN_CHUNK, chunk_workspace
    from .footprint import format_size
    from .kv import CODED

    def at(bits: float) -> int:
        context = budget.context
        workspace = chunk_workspace(opened, MIN_CHUNK, context, bits)
        return opened.kv_bytes(context, bits) + workspace

    size = f"{format_size(budget.smallest, up=True)} works"
    if budget.kv_bits == CODED[-1] or not opened.coded_layers[0]:
        return size
    least = budget.smallest - at(budget.kv_bits) + at(CODED[-1])
    return f"{size}, {format_size(least, up=True)} with the KV cache at {CODED[-1]} bits"


def _kv_row(opened: Any, budget: Any) -> str:
    """Its size at the chosen bits and in full precision, and which layers have it."""
    from .cache_size import KV_STEP
    from .footprint import format_size
    from .kv import CODED, FULL

    full = f"{format_size(budget.kv_full)} in full precision"
    coded, growing = opened.coded_layers
    some = f", {coded} of {growing} layers coded" if 0 < coded < growing else ""
    if budget.kv_bits < FULL:
        size = f"{format_size(budget.kv)} at {budget.kv_bits} bits ({full}{some})"
    elif coded:
        least = CODED[-1]
        size = f"{full} ({format_size(opened.kv_bytes(budget.context, least))} at {least} bits)"
    else:
        size = full
    states = opened.fixed_kv_bytes
    fixed = f", {format_size(states)} of it recurrent states of any context" if states else ""
    room = -(-budget.context // KV_STEP) * KV_STEP
    grown = f", held for {room} since caches grow by {KV_STEP}" if room != budget.context else ""
    return f"{size} for {budget.context} tokens{grown}{fixed}"


def _sizes(ends: Sequence[float]) -> str:
    from .footprint import format_size

    low, high = (format_size(round(end)) for end in ends)
    return low if low == high else f"{low} to {high}"


def _range(ends: Sequence[float], form: str) -> str:
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low} to {high}"


def _head_rows(opened: Any, budget: Any) -> list[tuple[str, str]]:
    """The MTP head's share of the budget; why there is none, where one was asked for."""
    from .footprint import format_size

    if opened.head is None:
        return [("  MTP head", "; ".join(opened.head_notes))] if opened.head_notes else []
    experts = sum(x.count for x in opened.layers) - sum(x.count for x in opened.trunk_layers)
    paged = f", {experts} experts paged with the trunk's" if experts else ""
    row = f"{format_size(budget.head)}, its KV cache {format_size(budget.head_kv)}{paged}"
    return [("  MTP head", row)]


def _hits(share: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(HITS):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0


if __name__ == "__main__":
    sys.exit(main())
