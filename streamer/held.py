"""In which dtype each parameter is held in memory: as it is stored, or wider.

    held = Held.of(model, mx.float32)
    held("model.layers.0.mlp.gate.scales", mx.bfloat16)     # bfloat16 where our kernels run

On the CPU everything that floats is held as float32, but for scales and biases of
quantized layers: our kernels widen them in registers, which is exact, so that the
bits are those of widened ones, for half a bit a weight less (groups of 64). Where the
kernels don't run, MLX would widen them anew at each call, whole pools of them: they are
held wide there.

Limits: mlx-lm's and MLX's own layers only; a layer of a model's own kind is held wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from kernels import backend
from kernels.weights import form_of

_LAYERS = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Held:
    """widen: what floating parameters are held in, None: as stored; narrow: paths as stored."""

    widen: mx.Dtype | None
    narrow: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, widen: mx.Dtype | None) -> Held:
        if widen is None or widen != mx.float32 or not backend.available():
            return cls(widen, frozenset())
        layers = [path for path, module in model.named_modules() if _for_kernels(module)]
        return cls(widen, frozenset(f"{p}.{kind}" for p in layers for kind in ("scales", "biases")))

    def __call__(self, path: str, stored: mx.Dtype) -> mx.Dtype:
        """The dtype of the parameter at `path`, which is stored as `stored`."""
        if self.widen is None or not mx.issubdtype(stored, mx.floating) or path in self.narrow:
            return stored
        return self.widen


def _for_kernels(layer: nn.Module) -> bool:
    """Whether our kernels do all that is done with this layer's scales."""
    if type(layer) not in _LAYERS or layer.mode != "affine" or "global_scale" in layer:
        return False
    return form_of(layer.mode, layer.group_size, layer.bits) is not None


class WideEmbedding(nn.QuantizedEmbedding):
    """Rows in float32 of an embedding whose scales are held narrower."""

    gives = mx.float32  # told to kernels that look rows up themselves

    def __call__(self, x: mx.array) -> mx.array:
        """x [...] integers -> [..., D] float32."""
        return mx.dequantize(
            self["weight"][x],
            scales=self["scales"][x].astype(mx.float32),
            biases=self["biases"][x].astype(mx.float32),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


def widen_embeddings(model: nn.Module, held: Held) -> None:
    """Make embeddings with narrow scales give float32; they stay the objects that they are."""
    for path, module in model.named_modules():
        kind = type(module)
        if f"{path}.scales" in held.narrow and kind is nn.QuantizedEmbedding:
            module.__class__ = WideEmbedding
