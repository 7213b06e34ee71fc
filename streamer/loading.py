"""Load a model whose experts do not fit: trunk resident, experts paged.

    from streamer import load
    model, tokenizer = load("path/or/owner/name", memory="8GB")
    mlx_lm.generate(model, tokenizer, "...")

The model is mlx-lm's own, with every switch module swapped for one that reads
its experts through a bounded pool. `model.streamer` is the `Streamer`: budget,
counters, reads, `close()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from cache.make import compress
from kernels import fast, gpu

from .budget import Budget, divide, with_slots
from .counters import Counters
from .disk import Disk
from .errors import BudgetError, CheckpointError, UsageError
from .executor import Executor
from .experts import LayerExperts, extras, held_bytes, is_switch, stored_bytes
from .filling import fill
from .footprint import (
    default_budget,
    footprint,
    format_size,
    return_freed_memory,
    trim_heap,
)
from .guess import named
from .heat import Heat
from .held import widen_embeddings
from .hub import resolve
from .kv import FULL, KVBits, read_bits
from .layers import decoder_layers
from .opened import Opened, open_model
from .pager import Pager
from .probe import choose_backend
from .rehearse import Rehearsal
from .store import Backend, Store
from .trunk import load_trunk
from .watch import Watch
from .ways import Choice

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all
GPU_ROWS = (2, 3, 4)  # of verify passes that kernels are tried for


class StreamedSwitch(nn.Module):
    """Stands where a `SwitchGLU` / `SwitchMLP` stood: `(x, indices) -> [..., k, D]`."""

    def __init__(self, executor: Executor, layer: int, switch: nn.Module):
        super().__init__()
        # set past nn.Module, whose parameters must not list the shared pool
        self.__dict__["_run"] = executor
        self.__dict__["_layer"] = layer
        self.__dict__["_inner"] = executor.arrays.bind(switch)
        for name, child in extras(switch):
            self[name] = child

    @property
    def inner(self) -> nn.Module:
        """The switch over the pool's slots, which its indices name."""
        return self.__dict__["_inner"]  # type: ignore[no-any-return]

    @property
    def pager(self) -> Pager | None:
        """For who computes the experts together with what is around them."""
        run = self.__dict__["_run"]
        fetches = isinstance(run, Executor) and run.fetches
        return Pager(run, self._layer, self._inner) if fetches else None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self._run(self._layer, self._inner, x, indices)


class Streamer:
    """The running state behind a loaded model: budget, pools, reads."""

    def __init__(self, opened: Opened, budget: Budget, store: Store | None, choice: str):
        self.opened, self.budget, self.store, self.io = opened, budget, store, choice
        self.counters = Counters()
        self.executors: list[Executor] = []
        self.heat: Heat | None = None
        self.learnt: dict[str, Any] = {}  # what one generation leaves for the next
        self._watch: Watch | None = None

    @property
    def watch(self) -> Watch | None:
        """Told of passes and choices; see `streamer.watch`."""
        return self._watch

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self._watch = watch
        for run in self.executors:
            run.watch = watch
        if self.store is not None:
            self.store.logging = watch is not None

    @property
    def resident(self) -> bool:
        """No expert is paged: decoding never reads the router back."""
        return all(e.pool.slots >= e.pool.total for e in self.executors)

    @property
    def slots(self) -> int:
        return sum(e.pool.slots for e in self.executors) or self.opened.experts

    @property
    def total(self) -> int:
        return self.opened.experts

    def check(self) -> None:
        """Hold the footprint within the budget; called between passes.

        Free buffers are dropped first. Raises BudgetError when that is not enough.
        """
        if footprint() <= self.budget.limit:
            return
        mx.clear_cache()
        trim_heap()
        now = footprint()
        if now > self.budget.limit:
            raise BudgetError(
                f"the footprint reached {format_size(now)} of a budget of "
                f"{format_size(self.budget.limit)}; give more memory or less context"
            )

    def stats(self) -> dict[str, Any]:
        """The `experts` block of `--stats`."""
        counters = self.counters
        return {
            "total": self.total,
            "slots": self.slots,
            "bytes_per_expert": expert_bytes(self.opened),
            "hits": counters.hits,
            "misses": counters.misses,
            "bytes_read": self.store.counters.bytes_read if self.store else 0,
            "imitated_disk": str(self.store.disk) if self.store and self.store.disk else None,
            "reads": self.store.counters.reads if self.store else 0,
            "prefetch_issued": counters.prefetched,
            "prefetch_used": counters.prefetch_used,
            "io_wait_seconds": counters.io_wait_seconds,
            "warm_filled": self.heat.filled if self.heat else 0,
            "warm_seconds": self.heat.seconds if self.heat else 0.0,
        }

    def close(self) -> None:
        """Stop the readers and close the files; add to the heat file, where there is one.

        Raises UsageError where that was asked for by name and cannot be written.
        """
        heat, self.heat = self.heat, None
        if self.store is not None:
            self.store.close()
        if heat is not None:
            heat.save(self.executors)


def load(
    model: str | Path,
    memory: str | int | None = None,
    *,
    context: int = 4096,
    io: str = "auto",
    dtype: str = "auto",
    mtp: bool = False,
    executor: Choice = "auto",
    guess: str = "auto",
    heat: str = "off",
    kv_bits: KVBits = "auto",
    progress: Progress | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a checkpoint folder or repository so that the process stays within `memory`.

    memory: bytes, '8GB', 'N%' (that share of the experts), 'min', or None for
    what the machine can spare. context: tokens that the KV cache is planned for.
    io: auto, mmap, pread or direct. dtype: auto, stored or float32. mtp: with the MTP
    head, where there is one, for `streamer.stream_generate` to draft with. executor:
    layerwise, lookahead, rehearse (see `streamer.rehearse`), or auto, whichever is measured faster.
    guess: by what else experts are read ahead (`streamer.guess`), off, or auto: where auto finds
    that it pays.
    heat: off, auto or a file, for a warm start (`streamer.heat`); closing the streamer adds to it.
    kv_bits: 16 for mlx-lm's own caches, 8, 4, 3.5, 3, 2.5 or 2 for compressed ones, which
    `mlx_lm.models.cache.make_prompt_cache(model)` then gives; auto: 16 unless the context
    would not fit, see `model.streamer.budget.kv_bits`.
    Raises a StreamerError whose text is one line.
    """
    bits = read_bits(kv_bits)
    path = resolve(str(model))
    opened = open_model(path, dtype, mtp=mtp)
    tokenizer = open_tokenizer(opened)
    spare = default_budget()[0] if memory is None else None
    budget = divide(opened, memory, context, spare=spare, kv_bits=bits)
    said = progress or (lambda *_: None)
    return attach(opened, budget, io, said, executor=executor, guess=guess, heat=heat), tokenizer


def open_tokenizer(opened: Opened) -> TokenizerWrapper:
    """The checkpoint's tokenizer. Raises CheckpointError."""
    try:
        tokenizer = load_tokenizer(opened.path, eos_token_ids=opened.config.get("eos_token_id"))
        if not tokenizer.encode("a"):  # transformers makes an empty one where files are missing
            raise ValueError("it knows no tokens; are its files missing?")
    except Exception as error:  # transformers raises whatever its parsers raise
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{opened.path} has no usable tokenizer: {text}") from error
    return tokenizer


def attach(
    opened: Opened,
    budget: Budget,
    io: str,
    progress: Progress,
    *,
    executor: Choice = "layerwise",
    guess: str = "auto",
    disk: Disk | None = None,
    heat: str = "off",
) -> nn.Module:
    """Read the trunk, make the pools, swap the switches; the model is ready to call.

    disk: one to imitate; heat: see `streamer.heat`.
    """
    named(guess)  # raises, even where nothing will be guessed
    if not opened.layers and budget.limit < budget.total:
        raise BudgetError(
            f"{opened.name} has no routed experts to page and needs "
            f"{format_size(budget.total)}; the budget is {format_size(budget.limit)}"
        )
    remembered = Heat.of(heat, opened)
    fast.install()
    return_freed_memory()
    mx.set_cache_limit(budget.workspace // 6)
    store, chosen = _open_store(opened, budget, io, disk)
    streamer = Streamer(opened, budget, store, chosen)
    model = opened.model
    done = 0

    def trunk_progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("trunk", done, budget.trunk + budget.head)

    load_trunk(opened, trunk_progress)
    widen_embeddings(model, opened.held)
    if store is not None:
        _swap(streamer, opened, budget, store)
    for run in streamer.executors:
        if run.pool.slots >= run.pool.total:
            switches = fill(run, lambda n, total: progress("experts", n, total))
            paths = [layer.path for layer in run.layers]
            model.update_modules(tree_unflatten(list(zip(paths, switches, strict=True))))
    _try_gpu(opened)
    streamer.heat = remembered
    if streamer.heat is not None:
        streamer.heat.fill(streamer.executors, lambda n, total: progress("experts", n, total))
    model.streamer = streamer
    if budget.kv_bits < FULL:
        compress(model, budget.kv_bits)
    ahead = executor != "layerwise" or guess not in ("off", "auto")
    if ahead and opened.layers and not streamer.resident:
        found = decoder_layers(model, [layer.path for layer in opened.trunk_layers])
        if found is not None:
            Rehearsal(model, found, streamer.executors, opened.top_k, executor, guess)
    return model


def load_streamed(
    path: Path,
    *,
    slots: int | None = None,
    io: str = "pread",
    dtype: str = "stored",
    mtp: bool = False,
    executor: Choice = "layerwise",
    guess: str = "auto",
    disk: Disk | None = None,
    heat: str = "off",
    kv_bits: float = FULL,
) -> nn.Module:
    """A model with a pool of exactly `slots` experts: None for all, 0 for the smallest.

    For tests and benchmarks; there is no bound on the footprint.
    """
    opened = open_model(path, dtype, mtp=mtp)
    budget = divide(opened, 1 << 60, 4096, kv_bits=kv_bits)
    counts = tuple(sum(x.count for x in layers) for layers in opened.groups.values())
    if slots is not None:
        counts = spread(counts, slots / max(1, opened.experts), opened.top_k)
    pool = sum(n * held_bytes(fmt) for fmt, n in zip(opened.groups, counts, strict=True))
    limited = with_slots(budget, counts, pool)
    quiet: Progress = lambda *_: None  # noqa: E731
    return attach(opened, limited, io, quiet, executor=executor, guess=guess, disk=disk, heat=heat)


def spread(counts: Sequence[int], share: float, top_k: int) -> tuple[int, ...]:
    """Slots of each pool that holds `share` of its `counts` experts, enough for a row."""
    return tuple(max(top_k, min(n, int(n * share))) for n in counts)


def expert_count(path: Path) -> int:
    """Routed experts over all layers."""
    return open_model(path).experts


def expert_bytes(opened: Opened) -> int:
    """Bytes that a miss reads, of the largest expert format; 0 for a dense model."""
    return max((stored_bytes(fmt) for fmt in opened.groups), default=0)


def _open_store(
    opened: Opened, budget: Budget, io: str, disk: Disk | None
) -> tuple[Store | None, str]:
    if io not in ("auto", "mmap", "pread", "direct"):
        raise UsageError(f"--io must be auto, mmap, pread or direct, not {io!r}")
    if not opened.layers:
        return None, "none"
    files = opened.files
    if io != "auto":
        return Store(files, backend=cast(Backend, io), disk=disk), io
    choice = choose_backend(files, expert_bytes(opened), max(0, budget.limit - footprint()))
    store = Store(files, backend=choice.backend, drop_behind=choice.drop_behind, disk=disk)
    return store, choice.backend


def _swap(streamer: Streamer, opened: Opened, budget: Budget, store: Store) -> None:
    swapped: list[tuple[str, nn.Module]] = []
    numbers = {layer.path: i for i, layer in enumerate(opened.layers)}
    for layers, slots in zip(opened.groups.values(), budget.slots, strict=True):
        executor = Executor(layers, slots, store, streamer.counters)
        executor.numbers = [numbers[layer.path] for layer in layers]
        streamer.executors.append(executor)
        swapped += [(x.path, _streamed(executor, i, x)) for i, x in enumerate(layers)]
    opened.model.update_modules(tree_unflatten(swapped))


def _try_gpu(opened: Opened) -> None:
    """Let our kernels take over where they gain on a GPU, verify passes of GPU_ROWS included."""
    modules = [module for _, module in opened.model.named_modules()]
    switches = [m.inner if isinstance(m, StreamedSwitch) else m for m in modules]
    rows = () if opened.head is None else GPU_ROWS
    gpu.install(opened.model, rows, [m for m in switches if is_switch(m)], opened.top_k)


def _streamed(executor: Executor, index: int, layer: LayerExperts) -> StreamedSwitch:
    return StreamedSwitch(executor, index, layer.switch)
