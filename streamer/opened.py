"""A checkpoint opened without reading its weights: the model's shape and sizes.

`open_model(path)` builds mlx-lm's own model with lazy parameters, finds where
every expert lies, and knows what the trunk weighs and what a token of context
costs. The planner and the loader both start here, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from .checkpoint import Checkpoint
from .errors import CheckpointError, StreamerError
from .experts import (
    ExpertFormat,
    LayerExperts,
    extras,
    find_experts,
    is_switch,
    projections,
    stored_bytes,
)
from .trace import plain, tracing

KV_STEP = 256  # mlx-lm's caches grow by this many tokens


@dataclass
class Opened:
    """A model whose weights are still on disk.

    layers: its MoE layers, empty for a dense model; top_k: experts a row asks
    of each layer; widen: dtype that floating tensors are held in, or None.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    model: nn.Module
    layers: list[LayerExperts]
    top_k: int
    widen: mx.Dtype | None
    _caches: list[Any]

    @property
    def groups(self) -> dict[ExpertFormat, list[LayerExperts]]:
        """Layers by expert format; each group shares a pool."""
        groups: dict[ExpertFormat, list[LayerExperts]] = {}
        for layer in self.layers:
            groups.setdefault(layer.format, []).append(layer)
        return groups

    @property
    def experts(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def expert_file_bytes(self) -> int:
        return sum(layer.count * stored_bytes(layer.format) for layer in self.layers)

    @property
    def trunk_bytes(self) -> int:
        """Held bytes of everything that is not a routed expert."""
        return sum(_held(p, self.widen) * p.size for _, p in trunk_parameters(self.model))

    def kv_bytes(self, context: int) -> int:
        """Bytes of the caches at `context` tokens, as mlx-lm allocates them."""
        rows = -(-max(context, 1) // KV_STEP) * KV_STEP
        return sum(_cache_bytes(cache, rows) for cache in self._caches)

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


def open_model(path: Path, dtype: str = "auto") -> Opened:
    """Open a checkpoint folder. Raises CheckpointError and LayoutError."""
    checkpoint = Checkpoint.open(path)
    widen = compute_dtype(dtype)
    try:
        with tracing(checkpoint):
            model, config = mlx_lm.utils.load_model(path, lazy=True)
        top_k, caches = _shapes(model)
    except StreamerError:
        raise
    except Exception as error:  # a model file may stumble over a configuration anywhere
        name = checkpoint.config["model_type"]
        raise CheckpointError(f"{path} does not load as {name!r}: {_line(error)}") from error
    layers = find_experts(model, path, widen)
    _check_runs_here(path, layers)
    return Opened(path, checkpoint, config, model, layers, top_k, widen, caches)


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


def load_trunk(opened: Opened, progress: Callable[[int], None]) -> None:
    """Read the trunk into memory; `progress` is called with the bytes of each step."""
    loaded = []
    for path, parameter in trunk_parameters(opened.model):
        array = plain(parameter)
        if opened.widen is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(opened.widen)
        mx.eval(array)
        loaded.append((path, array))
        progress(array.nbytes)
    opened.model.update(tree_unflatten(loaded))


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


def _shapes(model: nn.Module) -> tuple[int, list[Any]]:
    """The routers' top-k and caches of two tokens, from a pass that is never evaluated."""
    switches = [(path, m) for path, m in model.named_modules() if is_switch(m)]
    seen: list[int] = []
    caches = make_prompt_cache(model)
    try:
        model.update_modules(tree_unflatten([(path, _Recorder(seen, m)) for path, m in switches]))
        model(mx.zeros((1, 2), dtype=mx.int32), cache=caches)
    finally:
        model.update_modules(tree_unflatten(switches))
    return max(seen, default=0), caches


def _cache_bytes(cache: Any, rows: int) -> int:
    if hasattr(cache, "caches"):
        return sum(_cache_bytes(c, rows) for c in cache.caches)
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    total = 0
    for array in _cache_arrays(cache):
        if array.ndim == 4 and hasattr(cache, "keys"):
            total += array.nbytes // array.shape[2] * min(rows, (limit or rows) + KV_STEP)
        else:
            total += array.nbytes
    return total


def _cache_arrays(cache: Any) -> list[mx.array]:
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
