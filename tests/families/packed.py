"""The quantized forms that some families were published in, which mlx-lm reads as they are.

Codes and scales keep their bytes; only names, shapes and element types differ
from mlx-lm's own. Two forms have no counterpart of equal bits in mlx-lm's own
layout: fp8 in 128x128 blocks (DeepSeek-V3) is dequantized on loading, and the
symmetric int4 of Kimi-K2.5 gets its biases computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .hf import Rule, Weights
from .parts import Config

_BLOCK = 128  # fp8: one scale for a block of 128 x 128 weights
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Packed:
    """quantization: as for `make_tiny`, the parameters an equal checkpoint in
    mlx-lm's layout has; rule: applied after the family's `HF` rules; config: its
    `quantization_config`.
    """

    quantization: dict[str, Any] | None
    rule: Rule
    config: dict[str, Any]


def _gpt_oss(weights: Weights, _: Config) -> Weights:
    """Experts stacked, gate and up interleaved row by row, 16 bytes of codes a block."""
    out: Weights = {}
    for name, array in weights.items():
        prefix, found, rest = name.partition(".experts.")
        projection, kind = rest.split(".") if found else ("", "")
        if not found:
            out[name] = array
        if not found or projection == "up_proj":
            continue
        if projection == "gate_proj":
            up = weights[f"{prefix}.experts.up_proj.{kind}"]
            array = mx.stack([array, up], axis=2).flatten(1, 2)
            projection = "gate_up_proj"
        if kind == "weight":
            array = array.view(mx.uint8).reshape(*array.shape[:2], -1, 16)
        suffix = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}[kind]
        out[f"{prefix}.experts.{projection}{suffix}"] = array
    return out


def _quantized(weight: str, scales: str, dtype: mx.Dtype | None) -> Rule:
    """Codes as `weight` of `dtype` and scales as `scales`, wherever a tensor has scales."""

    def rule(weights: Weights, _: Config) -> Weights:
        out: Weights = {}
        for name, array in weights.items():
            base, kind = name.rsplit(".", 1)
            if kind == "scales":
                out[f"{base}.{scales}"] = array
            elif f"{base}.scales" in weights and kind == "weight":
                out[f"{base}.{weight}"] = array.view(dtype) if dtype else array
            else:
                out[name] = array
        return out

    return rule


def _int4(weights: Weights, config: Config) -> Weights:
    packed = _quantized("weight_packed", "weight_scale", mx.int32)(weights, config)
    out = {n: a for n, a in packed.items() if not n.endswith(".biases")}
    for name, array in packed.items():
        if name.endswith(".weight_packed"):
            rows, words = array.shape
            out[name.removesuffix("_packed") + "_shape"] = mx.array([rows, words * 8])
    return out


def _fp8(weights: Weights, _: Config) -> Weights:
    out = dict(weights)
    for name, array in weights.items():
        if ".experts." not in name:
            continue
        rows, columns = (-(-n // _BLOCK) for n in array.shape)
        scale = mx.abs(array).max() / _E4M3_MAX
        out[name] = mx.to_fp8(array / scale)
        out[f"{name}_scale_inv"] = mx.full((rows, columns), scale)
    return out


_EXPERTS_ONLY = {"*.experts.*": True, "*.switch_mlp.*": True, "*": False}
_MXFP4_EXPERTS = {"mode": "mxfp4", "layers": _EXPERTS_ONLY}

PACKED: dict[str, Packed] = {
    "deepseek_v3": Packed(
        None, _fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_BLOCK, _BLOCK]}
    ),
    "deepseek_v41": Packed(
        {"mode": "mxfp4", "layers": {"*.experts.switch_mlp.*": True, "*": False}},
        _quantized("weight", "scale", mx.int8),
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]},
    ),
    "gpt_oss": Packed(_MXFP4_EXPERTS, _gpt_oss, {"quant_method": "mxfp4"}),
    "kimi_k25": Packed(
        {"bits": 4, "group_size": 32, "layers": _EXPERTS_ONLY},
        _int4,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "kimi_k3": Packed(
        _MXFP4_EXPERTS,
        _quantized("weight_packed", "weight_scale", mx.uint8),
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    ),
    "minimax_m3_vl": Packed(
        {"mode": "mxfp8", "layers": {"*.gate": False, "*embed_tokens": False, "*lm_head": False}},
        _quantized("weight", "weight_scale_inv", mx.uint8),
        {"quant_method": "mxfp8"},
    ),
}
