"""Find a model's MTP head among a checkpoint's weights and build it.

    names = head_names(config, names_of_the_checkpoint)
    head = find_head(model, config, {name: array for name in names})

Weights may be lazy and nothing but norms is evaluated. How a tensor is packed is
read off its shape; whether norms lack their 1 is read off their values. Where the
weights come from is the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING, infer_quant_config

from .families import FAMILIES, Family
from .families.family import Config, Weights, is_norm
from .head import Head, trunk_of

# Means of input_layernorm and post_attention_layernorm in published heads of Qwen's: 0.04 to 0.39
# less 1, 0.87 to 1.28 as they multiply. Others overlap: mtp.norm is 1.25 to 2.58 less 1, and the
# norms before mtp.fc multiply by 0.27 (MTPLX #301, omlx #3750).
CENTRED_BELOW = 0.62
TEXT_TYPES = {"gemma4": "gemma4_text"}  # mlx-lm's file of the text model alone
GOOD_BITS = 8  # an int4 head had 4% of its drafts accepted where an int8 head had 59% (colibri)
_TELLING = re.compile(r"blocks\.\d+\.(input_layernorm|post_attention_layernorm)\.weight$")
_UNIT = re.compile(r"units\.(\d+)\.(.+)")


class HeadError(ValueError):
    """Weights that look like a head and do not make one. One sentence, without the place."""


def text_config(config: Config) -> Config:
    """The text model's part of a configuration, its type as mlx-lm calls it."""
    kind = config["model_type"]
    inner = config.get("text_config") or config
    kind = MODEL_REMAPPING.get(kind, kind)
    return {**inner, "model_type": TEXT_TYPES.get(kind, kind)}


def family_of(config: Config) -> Family | None:
    """The family of a checkpoint's configuration, None where its heads are not known."""
    kind = config["model_type"]
    return FAMILIES.get(MODEL_REMAPPING.get(kind, kind))


def head_names(config: Config, names: Iterable[str]) -> list[str]:
    """Those of `names` that are the head's, its copies of the trunk's tensors among them."""
    family = family_of(config)
    if family is None:
        return []
    text = text_config(config)
    return [n for n in names if family.name(n, text) is not None]


def find_head(
    model: nn.Module,
    config: Config,
    weights: Weights,
    note: Callable[[str], None] = lambda line: None,
) -> Head | None:
    """The head that `weights` hold for mlx-lm's `model`, or None where there is none.

    config: the checkpoint's; its `mtp_norms_zero_centred` overrules what norms look
    like. weights: by the checkpoint's names; others than the head's are passed over.
    note: told, one line each, what was decided on the way; `Head.notes` keeps it too.
    Raises HeadError when a tensor is missing, left over or of another shape.
    """
    family = family_of(config)
    text = text_config(config)
    if family is None:
        return None
    named = {family.name(n, text): a for n, a in weights.items()}
    parts: dict[int, Weights] = {}
    for name, array in named.items():
        if match := _UNIT.fullmatch(name or ""):
            parts.setdefault(int(match[1]), {})[match[2]] = array
    if not parts:
        return None
    parts = family.units(parts)
    if sorted(parts) != list(range(len(parts))):
        raise HeadError(f"the MTP head has unit {max(parts)} and not all before it")
    head, packed = _assemble(model, family, text, parts)
    centred = _zero_centred(family, config, packed)
    if centred:
        packed = {n: a + 1 if is_norm(n, a) else a for n, a in packed.items()}
    _quantize(head, packed)
    _load(head, packed)
    head.eval()  # as mlx-lm leaves its models: kernels stand aside in training
    for line in _lines(head, family, packed, centred):
        head.notes.append(line)
        note(line)
    return head


def _assemble(
    model: nn.Module, family: Family, text: Config, parts: dict[int, Weights]
) -> tuple[Head, Weights]:
    """The head, its parameters still mlx's own, and its weights in mlx-lm's form."""
    trunk = trunk_of(model)
    units: list[Any] = []
    packed: Weights = {}
    for i, weights in sorted(parts.items()):
        try:
            stub = family.stub(text, i, weights)
            units.append(family.unit(stub, text, trunk, weights))
            clean = family.sanitize(stub, weights)
        except Exception as error:  # a model file may stumble over a head anywhere
            raise HeadError(f"the MTP head does not load: {_line(error)}") from error
        packed |= {f"units.{i}.{name}": array for name, array in clean.items()}
    return family.head(trunk, units), packed


def _zero_centred(family: Family, config: Config, weights: Weights) -> bool:
    """Whether the norms lack their 1: as configured, else judged by the blocks' own norms."""
    if not family.zero_centred:
        return False
    stated = config.get("mtp_norms_zero_centred")
    if isinstance(stated, bool):
        return stated
    telling = [a for n, a in weights.items() if _TELLING.search(n)]
    if not telling:
        return False
    means = mx.stack([a.astype(mx.float32).mean() for a in telling])
    return bool(means.mean() < CENTRED_BELOW)


def _quantize(head: Head, weights: Weights) -> None:
    """Make a quantized module of each whose scales are there, as packed."""

    def rule(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights or not hasattr(module, "to_quantized"):
            return False
        return infer_quant_config(path, module, weights)

    try:
        nn.quantize(head, class_predicate=rule)
    except Exception as error:  # shapes that no packing explains
        raise HeadError(f"the MTP head does not load: {_line(error)}") from error


def _load(head: Head, weights: Weights) -> None:
    have = dict(tree_flatten(head.parameters()))
    if missing := sorted(have.keys() - weights.keys()):
        raise HeadError(f"the MTP head lacks {_named(missing)}")
    if surplus := sorted(weights.keys() - have.keys()):
        raise HeadError(f"the MTP head has no place for {_named(surplus)}")
    for name, array in weights.items():
        if array.shape != have[name].shape:
            raise HeadError(
                f"{name} of the MTP head is {tuple(array.shape)} and should be "
                f"{tuple(have[name].shape)}"
            )
    head.load_weights(list(weights.items()))


def _lines(head: Head, family: Family, weights: Weights, centred: bool) -> list[str]:
    bits = sorted({m.bits for _, m in head.named_modules() if hasattr(m, "bits")})
    form = " and ".join(f"{b}" for b in bits) + " bits" if bits else "not quantized"
    units = "1 unit" if head.depth == 1 else f"{head.depth} units"
    where = "after" if head.hidden == "post_norm" else "before"
    lines = [f"MTP head: {units}, {form}, takes hidden states {where} the final norm"]
    if bits and min(bits) < GOOD_BITS:
        lines.append(f"fewer than {GOOD_BITS} bits let few of its drafts be accepted")
    if family.zero_centred:
        stored = "zero-centred, 1 added" if centred else "as they multiply, nothing added"
        lines.append(f"its norms are stored {stored}")
    return lines


def _named(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
