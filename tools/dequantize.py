"""Undo a Qwen3.5-MoE package for MLX: the same weights in float32, under Hugging Face names.

Quantized tensors are multiplied out; experts are fused and stacked, norms zero-centred and the
convolution laid out as transformers' `Qwen3_5MoeForCausalLM.from_pretrained` loads them. The MTP
head goes along as `mtp.*`. Needs no torch. Holds one layer's experts at a time.

    python -m tools.dequantize streamer/demo out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from streamer.checkpoint import Checkpoint
from streamer.errors import CheckpointError, StreamerError
from streamer.shards import ShardWriter, Spec, small_files

PREFIX = "language_model."
EXPERTS = ".mlp.switch_mlp."
# RMSNorms that mlx-lm holds as 1 + weight; the gated norm of the delta net is not among them.
SHIFTED = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "q_norm.weight",
    "k_norm.weight",
    "model.norm.weight",
    "mtp.norm.weight",
    "pre_fc_norm_embedding.weight",
    "pre_fc_norm_hidden.weight",
)


def dequantize(package: Path, dest: Path) -> None:
    """Write `package`, a folder that mlx-lm loads, to the new folder `dest`.

    Raises CheckpointError when the package is none of Qwen3.5-MoE, UsageError when `dest` exists.
    """
    source = Checkpoint.open(package)
    if source.config["model_type"] != "qwen3_5_moe" or "text_config" not in source.config:
        raise CheckpointError(f"{package} is no Qwen3.5-MoE package for MLX")
    weights: dict[str, mx.array] = {}
    for file in source.files:
        weights.update(cast(dict[str, mx.array], mx.load(str(file))))
    plan = _plan(weights, source.config)
    specs = [Spec(name, "F32", tensor.shape) for name, tensor in plan.items()]
    with ShardWriter(dest, specs) as writer:
        for name in list(plan):
            tensor = mx.contiguous(plan.pop(name))
            mx.eval(tensor)
            writer.write(tensor)
        tokenizer = [p for p in small_files(package) if p.name.startswith("tokenizer")]
        writer.finish(_config(source.config), tokenizer)


def _plan(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """Lazy float32 tensors by Hugging Face name."""
    dense: dict[str, mx.array] = {}
    for name in sorted(weights):
        if not name.endswith((".scales", ".biases")):
            dense[name.removeprefix(PREFIX)] = _dense(name, weights, config)
    plan: dict[str, mx.array] = {}
    for name, tensor in dense.items():
        if name.endswith(EXPERTS + "gate_proj.weight"):
            up = dense[name.replace("gate_proj", "up_proj")]
            fused = mx.concatenate([tensor, up], axis=-2)
            plan[name.split(EXPERTS)[0] + ".mlp.experts.gate_up_proj"] = fused
        elif name.endswith(EXPERTS + "down_proj.weight"):
            plan[name.split(EXPERTS)[0] + ".mlp.experts.down_proj"] = tensor
        elif name.endswith("conv1d.weight"):
            plan[name] = mx.moveaxis(tensor, 1, 2)
        elif name.endswith(SHIFTED):
            plan[name] = tensor - 1.0
        elif EXPERTS not in name:
            plan[name] = tensor
    return plan


def _dense(name: str, weights: dict[str, mx.array], config: dict[str, Any]) -> mx.array:
    """The tensor multiplied out by its own quantization entry, or else by the default."""
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in weights:
        return weights[name].astype(mx.float32)
    block = config["quantization"]
    block = {**block, **block.get(module, {})}
    return mx.dequantize(
        weights[name],
        weights[f"{module}.scales"].astype(mx.float32),
        weights[f"{module}.biases"].astype(mx.float32),
        group_size=block["group_size"],
        bits=block["bits"],
    )


def _config(config: dict[str, Any]) -> dict[str, Any]:
    dropped = {"quantization", "quantization_config", "mtp_norms_zero_centred"}
    return {k: v for k, v in config.items() if k not in dropped} | {"dtype": "float32"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write an MLX package's weights unquantized.")
    parser.add_argument("package", type=Path)
    parser.add_argument("dest", type=Path)
    options = parser.parse_args(arguments)
    try:
        dequantize(options.package, options.dest)
    except StreamerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
