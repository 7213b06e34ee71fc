"""A checkpoint opened without reading its weights: the model's shape and sizes.

`open_model(path)` builds mlx-lm's own model with lazy parameters, finds where
every expert lies, and knows what the trunk weighs and what a token of context
costs. The planner and the loader both start here, so they cannot disagree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import _BaseCache, make_prompt_cache

from mtp.find import head_names
from mtp.head import Head

from .checkpoint import Checkpoint
from .errors import CheckpointError, LayoutError, StreamerError
from .experts import (
    ExpertFormat,
    LayerExperts,
    extras,
    find_experts,
    is_switch,
    projections,
    stored_bytes,
)
from .head import Found, advice, read_head
from .hub import called
from .trace import tracing

KV_STEP = 256  # mlx-lm's caches grow by this many tokens
HEAD = "mtp"  # the model's child that is its MTP head


class CacheSize(NamedTuple):
    """What a cache weighs: bytes from the start, and of every row until there are `limit`."""

    fixed: int
    row: int
    limit: int | None = None

    def at(self, rows: int) -> int:
        return self.fixed + self.row * min(rows, (self.limit or rows) + KV_STEP)


@dataclass
class Opened:
    """A model whose weights are still on disk.

    layers: its MoE layers, the head's last, empty for a dense model; top_k: experts
    a row asks of each layer; widen: dtype that floating tensors are held in, or None;
    files: those that hold weights, a head's side file last; head: the MTP head, also
    `model.mtp`, where it was asked for and is there; head_notes: what was decided
    about it, or why there is none.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    model: nn.Module
    layers: list[LayerExperts]
    top_k: int
    widen: mx.Dtype | None
    files: tuple[Path, ...]
    head: Head | None
    head_notes: tuple[str, ...]
    _caches: list[CacheSize]
    _head_caches: list[CacheSize]

    @property
    def name(self) -> str:
        """Of the model, for people."""
        return os.path.basename(os.path.abspath(called(self.path)))

    @property
    def groups(self) -> dict[ExpertFormat, list[LayerExperts]]:
        """Layers by expert format; each group shares a pool."""
        groups: dict[ExpertFormat, list[LayerExperts]] = {}
        for layer in self.layers:
            groups.setdefault(layer.format, []).append(layer)
        return groups

    @property
    def trunk_layers(self) -> list[LayerExperts]:
        """The MoE layers without the MTP head's."""
        return [layer for layer in self.layers if not in_head(layer.path)]

    @property
    def experts(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def expert_file_bytes(self) -> int:
        return sum(layer.count * stored_bytes(layer.format) for layer in self.layers)

    @property
    def trunk_bytes(self) -> int:
        """Held bytes of everything that is neither a routed expert nor the MTP head's."""
        return self._resident_bytes(head=False)

    @property
    def head_bytes(self) -> int:
        """Held bytes of the MTP head without its routed experts."""
        return self._resident_bytes(head=True)

    def _resident_bytes(self, *, head: bool) -> int:
        parameters = [p for n, p in trunk_parameters(self.model) if in_head(n) == head]
        return sum(_held(p, self.widen) * p.size for p in parameters)

    def kv_bytes(self, context: int) -> int:
        """Bytes of the trunk's caches at `context` tokens, as mlx-lm allocates them."""
        return _kv_bytes(self._caches, context)

    @property
    def state_bytes(self) -> int:
        """The largest state of a layer whose cache does not grow."""
        return max((cache.fixed for cache in self._caches), default=0)

    @property
    def cache_row(self) -> int:
        """Bytes of the largest cache per token."""
        return max((cache.row for cache in self._caches), default=0)

    def head_kv_bytes(self, context: int) -> int:
        """Bytes of the MTP head's caches at `context` tokens."""
        return _kv_bytes(self._head_caches, context)

    def text(self, key: str, default: int) -> int:
        """An integer of the (text) configuration."""
        for config in (self.config.get("text_config") or {}, self.config):
            if isinstance(config.get(key), int):
                return config[key]
        return default


def compute_dtype(name: str) -> mx.Dtype | None:
    """`auto`: float32 on CPU, where it is fastest and exact; as stored elsewhere."""
    if name == "auto":
        name = "stored" if mx.default_device() == mx.Device(mx.gpu) else "float32"
    if name not in ("stored", "float32"):
        raise StreamerError(f"dtype must be auto, stored or float32, not {name!r}")
    return mx.float32 if name == "float32" else None


def open_model(path: Path, dtype: str = "auto", *, mtp: bool = False) -> Opened:
    """Open a checkpoint folder, with its MTP head if `mtp`. Raises CheckpointError and LayoutError.

    A head that is missing or cannot be used is no error: `Opened.head_notes` says why.
    """
    checkpoint = Checkpoint.open(path)
    widen = compute_dtype(dtype)
    try:
        # mlx-lm leaves heads out, but not those of every family in every form
        with tracing(checkpoint, hidden=head_names(checkpoint.config, checkpoint.tensors)):
            model, config = load_lazily(path)
        found = _with_head(checkpoint, model, config, widen) if mtp else Found.none(checkpoint)
        top_k, caches, head_caches = _shapes(model, found.head)
    except StreamerError:
        raise
    except Exception as error:  # a model file may stumble over a configuration anywhere
        name = checkpoint.config["model_type"]
        raise CheckpointError(f"{path} does not load as {name!r}: {_line(error)}") from error
    layers = find_experts(model, path, widen)
    _check_runs_here(path, layers)
    return Opened(
        path=path,
        checkpoint=checkpoint,
        config=config,
        model=model,
        layers=layers,
        top_k=top_k,
        widen=widen,
        files=found.files,
        head=found.head,
        head_notes=found.notes,
        _caches=caches,
        _head_caches=head_caches,
    )


def in_head(path: str) -> bool:
    """Whether a module or parameter of the model is the MTP head's."""
    return path.startswith(f"{HEAD}.")


def _with_head(
    checkpoint: Checkpoint, model: nn.Module, config: dict[str, Any], widen: mx.Dtype | None
) -> Found:
    """The head, made a child of `model`, so that it is loaded and paged with the rest."""
    found = read_head(checkpoint, model, config)
    if found.head is None:
        return found
    try:
        find_experts(found.head, checkpoint.path, widen)
    except LayoutError:
        return Found.none(
            checkpoint,
            f"{checkpoint.path.name} is used without MTP head, whose experts are not stored as "
            f"they are used; {advice(checkpoint.path)} puts it in a file that works",
        )
    model[HEAD] = found.head
    return found


def load_lazily(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model of a folder of any name, nothing read yet, and its configuration."""
    return mlx_lm.utils.load_model(_Folder(path), lazy=True)


class _Folder(PosixPath):
    """mlx-lm looks for shards with glob, to which a name such as `a[1]` is a pattern."""

    def __truediv__(self, name: str) -> Path:  # type: ignore[override]
        return Path(escape(str(self)) if "*" in name else str(self)) / name


def trunk_parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """(path, parameter) of everything outside the routed experts."""
    inside = tuple(
        f"{path}.{name}."
        for path, module in model.named_modules()
        if is_switch(module)
        for name, _ in projections(module)
    )
    flat = dict(tree_flatten(model.parameters()))
    return [(p, a) for p, a in flat.items() if not inside or not p.startswith(inside)]


def _held(parameter: mx.array, widen: mx.Dtype | None) -> int:
    if widen is not None and mx.issubdtype(parameter.dtype, mx.floating):
        return widen.size
    return parameter.dtype.size


class _Recorder(nn.Module):
    """Stands in for a switch while shapes are looked up; notes the router's top-k."""

    def __init__(self, seen: list[int], switch: nn.Module):
        super().__init__()
        self.__dict__["seen"] = seen
        for name, child in extras(switch):
            self[name] = child

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.__dict__["seen"].append(indices.shape[-1])
        return mx.zeros((*indices.shape, x.shape[-1]), dtype=x.dtype)


def _shapes(model: nn.Module, head: Head | None) -> tuple[int, list[CacheSize], list[CacheSize]]:
    """The routers' top-k, and the sizes of the trunk's and the head's caches.

    From passes that are never evaluated, and of which nothing is kept: a lazy
    array holds the weights that it would be made of.
    """
    switches = [(path, m) for path, m in model.named_modules() if is_switch(m)]
    seen: list[int] = []

    def passed(rows: int) -> list[Any]:
        caches = make_prompt_cache(model)
        model(mx.zeros((1, rows), dtype=mx.int32), cache=caches)
        return caches

    head_caches = head.make_cache() if head else []
    try:
        model.update_modules(tree_unflatten([(path, _Recorder(seen, m)) for path, m in switches]))
        caches = passed(2)
        sizes = [size for cache in caches for size in _cache_sizes(cache)]
        if not all(isinstance(cache, _BaseCache) for cache in caches):
            few, many = passed(4 * KV_STEP), passed(8 * KV_STEP)
            sizes = [_extrapolated(a, b) for a, b in zip(few, many, strict=True)]
        if head:
            tokens = mx.zeros((1, 2), dtype=mx.int32)
            hidden = head.trunk.embed(tokens)
            for step in range(head.depth):
                head(hidden, tokens, head_caches, step)
    finally:
        model.update_modules(tree_unflatten(switches))
    head_sizes = [size for cache in head_caches for size in _cache_sizes(cache)]
    return max(seen, default=0), sizes, head_sizes


def _kv_bytes(caches: list[CacheSize], context: int) -> int:
    rows = -(-max(context, 1) // KV_STEP) * KV_STEP
    return sum(cache.at(rows) for cache in caches)


def _cache_sizes(cache: Any) -> list[CacheSize]:
    if hasattr(cache, "caches"):
        return [size for c in cache.caches for size in _cache_sizes(c)]
    arrays = _arrays(cache)
    if not hasattr(cache, "keys"):
        return [CacheSize(sum(a.nbytes for a in arrays), 0)]
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return [CacheSize(0, sum(a.nbytes // a.shape[2] for a in arrays), limit)]


def _extrapolated(few: Any, many: Any) -> CacheSize:
    """Of a model's own kind of cache, from what it holds of 4 and of 8 steps of rows."""
    small, large = (sum(a.nbytes for a in _arrays(cache)) for cache in (few, many))
    row = -(-(large - small) // (4 * KV_STEP))
    return CacheSize(max(0, small - row * 4 * KV_STEP), row)


def _arrays(cache: Any) -> list[mx.array]:
    parts = [cache.keys, cache.values] if hasattr(cache, "keys") else cache.state
    return [array for array in dict(tree_flatten(list(parts))).values() if array is not None]


def _check_runs_here(path: Path, layers: list[LayerExperts]) -> None:
    """Raises CheckpointError where MLX has no product of these experts on this device."""
    if mx.default_device() == mx.Device(mx.gpu):
        return
    for layer in layers:
        kinds = {t.projection: t.held for t in layer.format if t.kind == "weight"}
        if any(kind in (mx.float16, mx.bfloat16) for kind in kinds.values()):
            raise CheckpointError(
                f"{path} holds 16-bit experts, which MLX multiplies in float32 only on this "
                "machine: leave --dtype at auto"
            )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
