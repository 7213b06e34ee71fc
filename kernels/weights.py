"""What ops read of mlx-lm's layers, and ops that are kept while a layer's arrays are the same.

group(attention.q_proj, attention.k_proj)    # one argument of an op, None without a kernel
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, gated_delta, qwen3_5, qwen3_next, switch_layers

from . import backend

MLXLM = {
    "linear": nn.Linear.__call__,
    "swiglu": activations.swiglu,
    "gated_delta_update": gated_delta.gated_delta_update,
    "switch": switch_layers.SwitchGLU.__call__,
    "mlp": qwen3_next.Qwen3NextMLP.__call__,
    "moe": qwen3_next.Qwen3NextSparseMoeBlock.__call__,
    "norm": qwen3_next.Qwen3NextRMSNormGated.__call__,
    "delta": qwen3_5.GatedDeltaNet.__call__,
    "layer": qwen3_5.DecoderLayer.__call__,
    "text": qwen3_5.TextModel.__call__,
}
BITS = frozenset({2, 3, 4, 5, 6, 8})
GROUPS = frozenset({32, 64, 128})
FIXED = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # group size, bits

Arrays = tuple[mx.array, mx.array, mx.array | None]
Form = tuple[int, int, str]  # group size, bits, mode


def float32(*arrays: mx.array | None) -> bool:
    """Whether all are float32 (or not there)."""
    for a in arrays:  # noqa: SIM110 - a generator takes twice as long, for every operation
        if a is not None and a.dtype != mx.float32:
            return False
    return True


def form_of(mode: str, group_size: int | None, bits: int | None) -> Form | None:
    """(group size, bits, mode) where the kernels know the layout."""
    if mode in FIXED:
        return (*FIXED[mode], mode)
    group_size, bits = group_size or 64, bits or 4
    known = mode == "affine" and group_size in GROUPS and bits in BITS
    return (group_size, bits, mode) if known else None


def alike(*layers: nn.Module) -> Form | None:
    """The form of quantized layers without biases, if all have the same one."""
    first = layers[0]
    if "scales" not in first:
        return None
    mode, group_size, bits = first.mode, first.group_size, first.bits
    for layer in layers:
        if "scales" not in layer or "bias" in layer or "global_scale" in layer:
            return None
        if layer.bits != bits or layer.group_size != group_size or layer.mode != mode:
            return None
    return form_of(mode, group_size, bits)


def arrays(layer: nn.Module) -> Arrays:
    """What a product reads of a quantized layer."""
    return layer["weight"], layer["scales"], layer.get("biases")


def products(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """layer(x) for each, in one operation where they are quantized alike."""
    form = alike(*layers)
    if form is None:
        return [layer(x) for layer in layers]
    return backend.native().linears(  # type: ignore[union-attr,no-any-return]
        x, [arrays(layer) for layer in layers], group_size=form[0], bits=form[1], mode=form[2]
    )


def group(*layers: nn.Module) -> tuple[Any, ...] | None:
    """Weights of layers that are quantized alike, and their form, as one argument of an op."""
    form = alike(*layers)
    return None if form is None else ([arrays(layer) for layer in layers], *form)


# Ops with their weights bound, by the module they are made of; each with the arrays it has.
_kept: dict[int, tuple[weakref.ref[Any], list[Any], Any]] = {}


def kept(owner: nn.Module, key: list[Any], make: Callable[[], Any]) -> Any:
    """make(), or what it gave for this module while the arrays in `key` were the same ones.

    An op whose weights have yet to be evaluated is not kept: it would hold what they come from.
    """
    found = _kept.get(id(owner))
    if found is not None and len(found[1]) == len(key) and all(map(operator.is_, found[1], key)):
        return found[2]
    op = make()
    if op is not None and op.kept:
        number = id(owner)
        _kept[number] = (weakref.ref(owner, lambda _: _kept.pop(number, None)), key, op)
    return op


def parts(*layers: nn.Module) -> list[Any]:
    """All arrays of layers: an op made of the same ones is the same op."""
    found: list[Any] = []
    for layer in layers:
        found += (layer["weight"], layer.get("scales"), layer.get("biases"))
    return found


# Plans by the module they are of and what else they are for, each with its parts.
_plans: dict[int, tuple[weakref.ref[Any], dict[Hashable, tuple[tuple[Any, ...], Any, Any]]]] = {}


def unchanged(
    owner: nn.Module, key: Hashable, parts: tuple[Any, ...], make: Callable[[], Any]
) -> Any:
    """make(), or what it gave for this module and key while all in `parts` holds what it held.

    Modules, dictionaries and lists are looked through; None may be kept, too. What is not `kept`,
    as its weights have yet to be evaluated, would hold what they come from: None then.
    """
    number = id(owner)
    if number not in _plans:
        _plans[number] = weakref.ref(owner, lambda _: _plans.pop(number, None)), {}
    plans = _plans[number][1]
    held = plans.get(key)
    if held is None or not (all(map(operator.is_, held[0], parts)) and held[1].holds()):
        plan = make()
        if plan is not None and not plan.kept:
            return None
        containers = [c for part in parts for c in _containers(part)]
        same = backend.native().Unchanged(containers)  # type: ignore[union-attr]
        held = plans[key] = parts, same, plan
    return held[2]


def _containers(found: Any) -> Iterator[Any]:
    """All modules, dictionaries and lists in `found`."""
    if isinstance(found, dict | list):
        yield found
        for value in found.values() if isinstance(found, dict) else found:
            yield from _containers(value)
