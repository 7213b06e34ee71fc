"""Divide a memory budget: runtime, trunk, KV cache, workspace, and expert slots.

One function, used by the loader and by `python -m streamer.plan`, so that what
is promised is what is loaded. All sizes are bytes of the process's footprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass

import mlx.core as mx

from kernels import backend, fast, latent
from kernels.query_blocks import COPIES, SCORES, is_fused

from .errors import BudgetError, UsageError
from .experts import ExpertFormat, held_bytes
from .footprint import footprint, format_size, parse_size, percentage
from .kv import CODED, FULL, KVBits
from .opened import Opened
from .prefill import MAX_PAIRS

SLACK = 12 << 20  # Python objects, thread stacks and read buffers made after planning
STARTS = 1 << 20  # what the runtimes of two starts, of one to plan and one to run, may differ by
# prompt tokens of one prefill pass: each reads every expert that is absent, once
MAX_CHUNK = 2048
RESIDENT_CHUNK = 512  # where none is, which gains nothing by more
MIN_CHUNK = 16
MOST_ELEMENTS = (1 << 31) - 1  # of an array, where our kernels don't run
# where one of these is set, mlx-lm makes masks of all queries and keys
WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size",
    "loop_window_size",
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What each owner may take. `slots` follows the order of `Opened.groups`.

    head: of the MTP head what is not a routed expert; head_kv: its caches; 0 without one.
    kv: the caches at `kv_bits` bits; kv_full: in full precision, which is kv_bits 16. smallest:
    a limit that works in another process too.
    """

    limit: int
    runtime: int
    trunk: int
    kv: int
    workspace: int
    pool: int
    context: int
    chunk: int
    slots: tuple[int, ...]
    experts: int
    smallest: int
    head: int = 0
    head_kv: int = 0
    kv_bits: float = FULL
    kv_full: int = 0

    @property
    def resident(self) -> bool:
        """Everything fits: no expert is ever paged."""
        return sum(self.slots) >= self.experts

    @property
    def total(self) -> int:
        held = self.runtime + self.trunk + self.head + self.kv + self.head_kv
        return held + self.workspace + self.pool


def chunk_workspace(
    opened: Opened, chunk: int, context: int, kv_bits: float = FULL, *, paged: bool = True
) -> int:
    """Transient bytes of a pass over `chunk` tokens, free buffers included.

    Of one layer, as MLX evaluates layer by layer when it streams, in float32:
    activations, what the chosen experts give, twice, and of the pairs that are computed at once
    what is within an expert (all of them where nothing is paged), attention's scores, a
    recurrent state for every token, as mlx-lm's loop over tokens leaves them (the kernel has one
    before, one after and a copy of each), what reading and writing coded caches takes, and the old
    storage of a cache that grows. 1.2 to 2.3 times the peaks measured at true shapes (docs/LOG.md).
    """
    hidden = opened.text("hidden_size", 4096)
    inner = opened.text("moe_intermediate_size", opened.text("intermediate_size", hidden))
    vocabulary = opened.text("vocab_size", 32000)
    pairs = chunk * opened.top_k
    at_once = min(pairs, MAX_PAIRS) if paged else pairs
    rows = chunk * 32 * hidden + pairs * 8 * hidden + at_once * (8 * hidden + 12 * inner)
    state = 0 if mx.default_device() == mx.Device(mx.gpu) else opened.state_bytes
    one = fast.keeps_one_state(opened.text("linear_key_head_dim", 0))
    states = 0 if one else 3 * state // 2
    return (
        5 * rows // 4
        + _scores(opened, chunk, context)
        + chunk * states
        + (4 if one else 8) * state
        + _expanded(opened) * context
        + (opened.coding_bytes(chunk, context, kv_bits) if chunk else 0)
        + 3 * opened.growth_bytes(context, kv_bits) // 2  # MLX lets go of storage a moment later
        + 24 * vocabulary
        + (8 << 20)
    )


def _scores(opened: Opened, chunk: int, context: int) -> int:
    """Bytes of attention's masks and scores: of a block of queries, none of scores where our
    kernel makes them, all where a model does by itself."""
    heads = opened.text("num_attention_heads", 32)
    made = COPIES * 4 * heads * context
    if opened.over_latents:  # a block's queries and outputs, in the latents' space and in theirs
        masks = 2 * chunk * context  # bool, and a block's part of it
        rows = min(chunk, latent.rows_of(heads, context))
        wide = 3 * opened.text("kv_lora_rank", 512) + 2 * _widths(opened)
        return masks + rows * (made + 4 * heads * wide)
    if opened.text("index_n_heads", 0) or _expanded(opened):
        return chunk * made
    width = opened.text("head_dim", opened.text("hidden_size", 4096) // heads)
    mine = backend.available() or is_fused(width)
    windows = any(opened.text(key, 0) for key in WINDOWS)
    masks = 9 * chunk * context if windows else 0
    return masks + (0 if mine else min(chunk * made, SCORES))


def _expanded(opened: Opened) -> int:
    """Bytes that mlx-lm's latent attention makes of each token of context: keys and values of
    every head; none where it is run over the latents, or its cache holds them."""
    heads, rank = opened.text("num_attention_heads", 32), opened.text("kv_lora_rank", 0)
    made = opened.cache_row >= 4 * heads * _widths(opened)
    return 0 if opened.over_latents or made else 5 * heads * (rank + _widths(opened)) * (rank > 0)


def _widths(opened: Opened) -> int:
    """Of a key's part without position and of a value, together."""
    return opened.text("qk_nope_head_dim", 128) + opened.text("v_head_dim", 128)


def divide(
    opened: Opened,
    memory: str | int | None,
    context: int,
    *,
    spare: int | None = None,
    kv_bits: KVBits = FULL,
) -> Budget:
    """Divide `memory`: bytes, a size such as '8GB', 'min', or 'N%' of the experts.

    spare: what the machine can give, used when memory is None. kv_bits: of the KV cache;
    auto takes the most with which the context fits. Raises BudgetError naming the
    smallest budget that works.
    """
    runtime = footprint() + SLACK
    auto = (FULL, *CODED) if opened.coded_layers[0] else (FULL,)
    choices = auto if kv_bits == "auto" else (kv_bits,)
    for bits in choices[:-1]:
        with contextlib.suppress(BudgetError):
            return _divide(opened, memory, context, spare, bits, runtime)
    return _divide(opened, memory, context, spare, choices[-1], runtime)


def _divide(
    opened: Opened,
    memory: str | int | None,
    context: int,
    spare: int | None,
    bits: float,
    runtime: int,
) -> Budget:
    trunk, kv = opened.trunk_bytes, opened.kv_bytes(context, bits)
    head, head_kv = opened.head_bytes, opened.head_kv_bytes(context)
    groups = opened.groups
    least = {fmt: _least_slots(opened, layers) for fmt, layers in groups.items()}
    counts = {
        fmt: min(sum(layer.count for layer in layers), _most_slots(fmt))
        for fmt, layers in groups.items()
    }
    floor = sum(n * held_bytes(fmt) for fmt, n in least.items())
    full = sum(n * held_bytes(fmt) for fmt, n in counts.items())
    fixed = runtime + trunk + head + kv + head_kv
    smallest = fixed + chunk_workspace(opened, MIN_CHUNK, context, bits) + floor + STARTS

    share = percentage(memory)
    if share is not None:
        paged = share < 1.0
        chunk = _wanted_chunk(opened, context, full, bits, paged=paged)
        workspace = chunk_workspace(opened, chunk, context, bits, paged=paged)
        room = max(floor, int(share * full))
        limit = fixed + workspace + room
    else:
        limit = _limit(memory, spare, smallest)
        if limit < smallest - STARTS:
            raise BudgetError(
                f"{opened.name} does not run in {format_size(limit)}: the smallest budget "
                f"that works is {format_size(smallest, up=True)} (runtime "
                f"{format_size(runtime)}, trunk {format_size(trunk)}, "
                f"{f'MTP head {format_size(head)}, ' if head else ''}KV of {context} tokens "
                f"{f'at {bits} bits ' if bits < FULL else ''}"
                f"{format_size(kv + head_kv)}, workspace and {sum(least.values())} expert slots "
                f"{format_size(smallest - fixed)})"
            )
        chunk, workspace = _chunk(opened, context, limit - fixed - floor, full, bits)
        room = limit - fixed - workspace
    slots = _share(groups, least, counts, min(room, full))
    pool = sum(n * held_bytes(fmt) for fmt, n in slots.items())
    return Budget(
        limit=limit,
        runtime=runtime,
        trunk=trunk,
        kv=kv,
        workspace=workspace,
        pool=pool,
        context=context,
        chunk=chunk,
        slots=tuple(slots.values()),
        experts=opened.experts,
        smallest=smallest,
        head=head,
        head_kv=head_kv,
        kv_bits=bits,
        kv_full=opened.kv_bytes(context),
    )


def with_slots(budget: Budget, slots: tuple[int, ...], pool: int) -> Budget:
    """The same division with a pool of another size; tests and benchmarks use it."""
    return dataclasses.replace(budget, slots=slots, pool=pool)


def _limit(memory: str | int | None, spare: int | None, smallest: int) -> int:
    if memory is None:
        return spare if spare is not None else smallest
    if isinstance(memory, int):
        return memory
    if memory.strip().lower() == "min":
        return smallest
    limit = parse_size(memory)
    if limit < 1 << 20 and memory.strip().isdecimal():
        raise UsageError(f"--memory {memory} is in bytes; write {memory}GB or {memory}%")
    return limit


def _wanted_chunk(
    opened: Opened, context: int, full: int, bits: float = FULL, *, paged: bool = True
) -> int:
    """The chunk that costs at most a quarter of the experts, or 64 tokens; no more than needed."""
    chunk = MAX_CHUNK if paged else RESIDENT_CHUNK
    while chunk > 64 and (
        chunk >= 2 * context or _growing(opened, chunk, context, bits, paged=paged) > full // 4
    ):
        chunk //= 2
    return chunk


def _chunk(
    opened: Opened, context: int, room: int, full: int, bits: float = FULL
) -> tuple[int, int]:
    """(tokens per prefill pass, workspace bytes): at most a quarter of what experts could use.

    Or with all experts in memory, where that leaves passes of 64 tokens at least.
    """
    chunk = _wanted_chunk(opened, context, full, bits, paged=False)
    while chunk >= 64:
        workspace = chunk_workspace(opened, chunk, context, bits, paged=False)
        if workspace + full <= room:
            return chunk, workspace
        chunk //= 2
    chunk = _wanted_chunk(opened, context, full, bits)
    while chunk > MIN_CHUNK:
        workspace = chunk_workspace(opened, chunk, context, bits)
        if workspace <= room and _growing(opened, chunk, context, bits) <= room // 4:
            break
        chunk //= 2
    return chunk, chunk_workspace(opened, chunk, context, bits)


def _growing(
    opened: Opened, chunk: int, context: int, bits: float = FULL, *, paged: bool = True
) -> int:
    """The part of the workspace that a smaller chunk saves."""
    whole = chunk_workspace(opened, chunk, context, bits, paged=paged)
    return whole - chunk_workspace(opened, 0, context, bits, paged=paged)


def _least_slots(opened: Opened, layers: list) -> int:
    return min(opened.top_k, max(layer.count for layer in layers))


def _most_slots(fmt: ExpertFormat) -> int:
    """Of one pool: MLX's own products on the CPU (0.32.4) die of arrays with more elements."""
    if backend.available() or mx.default_device() == mx.Device(mx.gpu):
        return sys.maxsize
    return min(MOST_ELEMENTS // math.prod(tensor.shape) for tensor in fmt)


def _share(
    groups: dict[ExpertFormat, list],
    least: dict[ExpertFormat, int],
    counts: dict[ExpertFormat, int],
    room: int,
) -> dict[ExpertFormat, int]:
    """Slots of each group, in proportion to its bytes, from its least to all of it."""
    full = sum(n * held_bytes(fmt) for fmt, n in counts.items())
    share = min(1.0, room / full) if full else 1.0
    slots = {f: max(least[f], min(counts[f], int(counts[f] * share))) for f in groups}
    for fmt in groups:
        spent = sum(n * held_bytes(f) for f, n in slots.items())
        over = -(-(spent - room) // held_bytes(fmt))
        if over > 0:
            slots[fmt] = max(least[fmt], slots[fmt] - over)
    return slots
