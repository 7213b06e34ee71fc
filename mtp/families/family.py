"""What families of MTP heads have in common, and what each may change.

A family says which tensors of a checkpoint belong to its head, under which names
of `mtp.head.Unit` they go, and how a unit is made. The blocks come from a *stub*:
mlx-lm's own model of the family with as many layers as the unit has blocks. The
stub's `sanitize` turns the blocks' tensors into mlx-lm's form, as it does for the
trunk's layers, so that no layout rule is repeated here.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..head import Head, Hidden, Trunk, Unit

Config = dict[str, Any]
Weights = dict[str, mx.array]

OWN = re.compile(r"^mtp\.(units\.\d+\..+)$")  # as tools/extract_mtp.py names them
BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


class Family:
    """The head of one family, in its most common form; subclasses change what differs."""

    hidden: ClassVar[Hidden] = "post_norm"
    """Which hidden state the head was trained on; the subclass's docstring says who found out."""
    zero_centred: ClassVar[bool] = False
    """The original checkpoints hold the norms' weights less 1."""
    layers: ClassVar[str] = "model.layers"
    """Where the stub's layers lie."""
    names: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(pattern of a name in the checkpoint, name in the head); "" for a copy of the trunk's."""

    def name(self, name: str, config: Config) -> str | None:
        """'units.0.join.weight' for 'mtp.fc.weight'; "" for a tensor the trunk has too.

        None for a tensor that is not of the head. config: the text model's.
        """
        if not self.may_be(name, config):  # checkpoints have 100,000 names
            return None
        if match := OWN.match(name):
            return match[1]
        name = re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)
        name = re.sub(r"^(model|language_model)\.mtp\.", "mtp.", name)
        for pattern, to in self.names:
            if match := re.fullmatch(pattern, name):
                return self.place(match, to, config)
        return None

    def may_be(self, name: str, config: Config) -> bool:
        """Whether a tensor could be the head's, found out quickly."""
        return "mtp" in name

    def place(self, match: re.Match[str], to: str, config: Config) -> str | None:
        """The name in the head of what `names` matched."""
        return match.expand(to)

    def units(self, parts: dict[int, Weights]) -> dict[int, Weights]:
        """The tensors by unit, as `name` put them there, in the units that use them."""
        return parts

    def stub(self, config: Config, unit: int, names: Weights) -> nn.Module:
        """mlx-lm's model of the family, its layers those of the unit; nothing is read.

        names: the unit's tensors by name, without 'units.N.'; their shapes may be looked at.
        """
        return build(config, **self.changes(config, unit, names))

    def changes(self, config: Config, unit: int, names: Weights) -> Config:
        """Of the configuration, for a stub of one layer."""
        return {"num_hidden_layers": 1}

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> Any:
        """A unit around the stub's layers. names: as in `stub`."""
        return Unit(norms(config), config["hidden_size"], stub.layers)

    def head(self, trunk: Trunk, units: Sequence[Any]) -> Head:
        """The head of these units."""
        return Head(trunk, units, self.hidden)

    def sanitize(self, stub: nn.Module, weights: Weights) -> Weights:
        """A unit's tensors in mlx-lm's form. Norms are left as they are.

        mlx-lm adds 1 to norms where it takes a checkpoint for an original one;
        that is decided for the head as a whole instead.
        """
        kept = {n: a for n, a in weights.items() if is_norm(n, a)}
        inner = {self.inside(n): a for n, a in weights.items() if n not in kept}
        back = re.compile(re.escape(self.layers) + r"\.(\d+)\.(.+)")
        for name, array in stub.sanitize(inner).items():
            match = back.fullmatch(name)
            if match is None:
                raise ValueError(f"{name} is not a layer's")
            outside = match[2].startswith("unit.")
            to = match[2].removeprefix("unit.") if outside else f"blocks.{match[1]}.{match[2]}"
            kept[to] = array
        return kept

    def inside(self, name: str) -> str:
        """The name under which the stub knows a unit's tensor."""
        if match := BLOCK.match(name):
            return f"{self.layers}.{match[1]}.{match[2]}"
        return f"{self.layers}.0.unit.{name}"


def is_norm(name: str, array: mx.array) -> bool:
    return array.ndim == 1 and name.endswith("norm.weight")


def norms(config: Config) -> Callable[[], nn.Module]:
    """Makes RMSNorms of the model's width."""
    keys = ("rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon")
    eps = next((config[k] for k in keys if config.get(k) is not None), 1e-5)
    return partial(nn.RMSNorm, config["hidden_size"], eps=eps)


def arguments(config: Config, **changes: Any) -> Any:
    """mlx-lm's `ModelArgs` of the text model's configuration with changes."""
    config = copy.deepcopy({**config, **changes})
    return module_of(config).ModelArgs.from_dict(config)


def build(config: Config, **changes: Any) -> nn.Module:
    """mlx-lm's model of the configuration with changes; its parameters are never evaluated."""
    return module_of(config).Model(arguments(config, **changes))


def module_of(config: Mapping[str, Any]) -> Any:
    """mlx-lm's file of the family."""
    return importlib.import_module(f"mlx_lm.models.{config['model_type'].removesuffix('_text')}")
