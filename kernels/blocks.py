"""mlx-lm's layers in fewer operations: what stands between the products of a block, in one each.

`places` lists what `kernels.fast` puts in: dense linears, routed experts (`kernels.routed`) and
SwiGLU of every family, of Qwen3-Next and Qwen3.5 also the layers (`kernels.qwen`) and the model
(`kernels.plans`). Float32 on the CPU; what else comes (training, masks, padded batches, other
activations) goes to mlx-lm's own code, which is also the reference. Rows give the same bits
whatever comes with them.

    python -m pytest tests/test_kernels_blocks.py
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next, switch_layers

from . import backend, plans, qwen, routed
from .weights import MLXLM, float32


def places() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of all that is replaced, in the modules loaded so far."""
    found: list[tuple[Any, str, Any]] = [
        (nn.Linear, "__call__", linear),
        (switch_layers.SwitchGLU, "__call__", routed.switch),
        (qwen3_next.Qwen3NextMLP, "__call__", routed.mlp),
        (qwen3_next.Qwen3NextSparseMoeBlock, "__call__", routed.moe),
        (qwen3_next.Qwen3NextRMSNormGated, "__call__", qwen.norm),
        (qwen3_5.GatedDeltaNet, "__call__", qwen.delta),
        (qwen3_5.DecoderLayer, "__call__", qwen.layer),
        (qwen3_5.TextModel, "__call__", plans.text_model),
    ]
    # Families import these two by name.
    by_name = {"swiglu": swiglu, "gated_delta_update": qwen.gated_delta_update}
    for path, module in list(sys.modules.items()):
        if path.startswith("mlx_lm.models."):
            for name, function in by_name.items():
                if vars(module).get(name) in (MLXLM[name], function):
                    found.append((module, name, function))
    return found


def linear(self: nn.Module, x: mx.array) -> mx.array:
    """A dense nn.Linear: x [..., K] -> [..., N]."""
    weight = self["weight"]
    if self.training or not x.size or not x.ndim or not float32(x, weight):
        return MLXLM["linear"](self, x)
    y = backend.native().linear(x, weight)  # type: ignore[union-attr]
    return y + self["bias"] if "bias" in self else y


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    if gate.shape == x.shape and gate.size and float32(gate, x):
        return backend.native().swiglu(gate, x)  # type: ignore[union-attr,no-any-return]
    return MLXLM["swiglu"](gate, x)
