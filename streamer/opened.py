"""A checkpoint opened without reading its weights: the model's shape and sizes.

`open_model(path)` builds mlx-lm's own model with lazy parameters, finds where
every expert lies, and knows what the trunk weighs and what a token of context
costs. The planner and the loader both start here, so they cannot disagree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path, PosixPath
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import _BaseCache, make_prompt_cache

from cache.make import kinds_of
from kernels import latent
from mtp.find import head_names
from mtp.head import Head

from .cache_size import KV_STEP, CacheSize, extrapolated, sizes_of
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
from .held import Held
from .hub import called
from .kv import FULL
from .trace import tracing

HEAD = "mtp"  # the model's child that is its MTP head


@dataclass
class Opened:
    """A model whose weights are still on disk.

    layers: its MoE layers, the head's last, empty for a dense model; top_k: experts
    a row asks of each layer; widen: dtype that floating tensors are held in, or None, and
    held: the same of each parameter; files: those that hold weights, a head's side file
    last; head: the MTP head, also `model.mtp`, where it was asked for and is there;
    head_notes: what was decided about it, or why there is none.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    model: nn.Module
    layers: list[LayerExperts]
    top_k: int
    widen: mx.Dtype | None
    held: Held
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
        parameters = [(n, p) for n, p in trunk_parameters(self.model) if in_head(n) == head]
        return sum(self.held(n, p.dtype).size * p.size for n, p in parameters)

    def kv_bytes(self, context: int, bits: float = FULL) -> int:
        """Bytes of the trunk's caches at `context` tokens, as they are allocated."""
        return sum(cache.at(context, bits) for cache in self._caches)

    @property
    def fixed_kv_bytes(self) -> int:
        """Bytes of the caches that no context makes larger: the states of recurrent layers."""
        return sum(cache.fixed for cache in self._caches if not cache.row)

    def coding_bytes(self, rows: int, context: int, bits: float) -> int:
        """What a pass of `rows` rows takes of coded caches besides, bytes."""
        if bits >= FULL:
            return 0
        coded = [cache.coded for cache in self._caches if cache.coded]
        return max((size.transient(rows, context, bits) for size in coded), default=0)

    def growth_bytes(self, context: int, bits: float) -> int:
        """What a cache in full precision takes besides while it grows, bytes."""
        return max((c.growth(context, bits) for c in self._caches if c.row), default=0)

    @property
    def coded_layers(self) -> tuple[int, int]:
        """How many caches can be compressed, of how many that grow with the context."""
        growing = [c for c in self._caches if c.row]
        return sum(c.coded is not None for c in growing), len(growing)

    @property
    def state_bytes(self) -> int:
        """The largest state of a layer whose cache does not grow."""
        return max((cache.fixed for cache in self._caches), default=0)

    @property
    def cache_row(self) -> int:
        """Bytes of the largest cache per token."""
        return max((cache.row for cache in self._caches), default=0)

    @cached_property
    def over_latents(self) -> bool:
        """Whether attention of several rows is over the latents that its cache holds."""
        return latent.replaced(self.model)

    def head_kv_bytes(self, context: int) -> int:
        """Bytes of the MTP head's caches at `context` tokens."""
        return sum(cache.at(context) for cache in self._head_caches)

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
        top_k, caches, head_caches = _shapes(model, found.head, widen)
    except StreamerError:
        raise
    except Exception as error:  # a model file may stumble over a configuration anywhere
        name = checkpoint.config["model_type"]
        raise CheckpointError(f"{path} does not load as {name!r}: {_line(error)}") from error
    held = Held.of(model, widen)
    layers = find_experts(model, path, held)
    _check_runs_here(path, layers)
    return Opened(
        path=path,
        checkpoint=checkpoint,
        config=config,
        model=model,
        layers=layers,
        top_k=top_k,
        widen=widen,
        held=held,
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
        find_experts(found.head, checkpoint.path, Held.of(found.head, widen))
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


def _shapes(
    model: nn.Module, head: Head | None, widen: mx.Dtype | None
) -> tuple[int, list[CacheSize], list[CacheSize]]:
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
        kinds = kinds_of(model, caches)
        sizes = [
            size
            for cache, kind in zip(caches, kinds, strict=True)
            for size in sizes_of(cache, widen, kind)
        ]
        if not all(isinstance(cache, _BaseCache) for cache in caches):
            few, many = passed(4 * KV_STEP), passed(8 * KV_STEP)
            sizes = [extrapolated(a, b, widen) for a, b in zip(few, many, strict=True)]
        if head:
            tokens = mx.zeros((1, 2), dtype=mx.int32)
            hidden = head.trunk.embed(tokens)
            for step in range(head.depth):
                head(hidden, tokens, head_caches, step)
    finally:
        model.update_modules(tree_unflatten(switches))
    head_sizes = [size for cache in head_caches for size in sizes_of(cache, widen)]
    return max(seen, default=0), sizes, head_sizes


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
    if isinstance(error, KeyError):
        text = f"there is no {text} where one is needed"
    return text if len(text) <= 300 else text[:297] + "..."
