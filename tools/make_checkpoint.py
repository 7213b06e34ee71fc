"""Write random weights at a published model's true shapes, as a checkpoint mlx-lm loads.

    python -m tools.make_checkpoint --like qwen3.5-35b-a3b --out DIR --layers 4
    python -m tools.make_checkpoint --like deepseek-v3 --out DIR --dry-run

For planning, start-up, prefill and I/O: what it says is noise. Names, shapes
and dtypes are mlx-lm's own, from a model whose parameters are never computed;
quantized weights are random bits with scales that keep activations in bounds.
A few megabytes are in memory at once.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from streamer.console import Parser, bar, command, number, say
from streamer.convert import DTYPES
from streamer.errors import UsageError
from streamer.footprint import format_size
from streamer.shards import ShardWriter, Spec
from tools.shapes import SHAPES

PIECE = 8 << 20  # bytes made at once
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
SCALES = {"mxfp4": (118, 121), "mxfp8": (121, 123), "nvfp4": (3, 6)}  # codes of 1/256 to 1/32


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="tools.make_checkpoint", description="Random weights at true shapes.")
    p.add_argument("--like", choices=sorted(SHAPES), required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--layers", type=number(1, 1000, int), help="fewer than the model has")
    p.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8, 16), default=4)
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64)
    p.add_argument("--mode", choices=("affine", *MODES), default="affine")
    p.add_argument("--seed", type=number(0, 1 << 32, int), default=0)
    p.add_argument("--dry-run", action="store_true", help="print sizes and write nothing")
    args = p.parse_args(argv)
    config = shrunk(SHAPES[args.like], args.layers)
    model, config = skeleton(config, args.bits, args.group_size, args.mode)
    specs = [
        Spec(n, DTYPES[a.dtype], tuple(a.shape))
        for n, a in dict(tree_flatten(model.parameters())).items()
        if a is not None
    ]
    total = sum(s.nbytes for s in specs)
    experts = sum(s.nbytes for s in specs if is_expert(s))
    say(f"{args.like}: {format_size(total)}, of which experts {format_size(experts)}")
    if args.dry_run:
        return 0
    rng = np.random.default_rng(args.seed)
    with ShardWriter(args.out, specs) as writer, bar("writing") as update:
        for spec in specs:
            for piece in noise(spec, rng, args.mode):
                writer.write(piece)
                update(writer.written, writer.total, "MB")
        writer.finish(config)
    write_tokenizer(args.out)
    return 0


def shrunk(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The configuration with its first `layers` layers. Raises UsageError for too few."""
    config = copy.deepcopy(config)
    part = config.get("text_config", config)
    if layers is not None:
        kinds = 2 if "sliding_window" in part else 1  # every other layer slides in gpt-oss
        least = part.get("full_attention_interval", part.get("first_k_dense_replace", 0) + kinds)
        if not least <= layers <= part["num_hidden_layers"]:
            raise UsageError(f"--layers goes from {least} to {part['num_hidden_layers']}")
        part["num_hidden_layers"] = layers
    return config


def skeleton(
    config: dict[str, Any], bits: int, group_size: int, mode: str
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model with lazy bfloat16 parameters, quantized by its own rules, and its config."""
    from mlx_lm.utils import _get_classes, quantize_model

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.apply(lambda a: a.astype(mx.bfloat16) if mx.issubdtype(a.dtype, mx.floating) else a)
    if mode != "affine":
        bits, group_size = MODES[mode]
    if bits != 16:
        model, config = quantize_model(model, config, group_size, bits, mode=mode)
    return model, config


def is_expert(spec: Spec) -> bool:
    return len(spec.shape) >= 2 and any(
        f".{part}." in spec.name for part in ("switch_mlp", "experts", "switch_glu")
    )


def noise(spec: Spec, rng: np.random.Generator, mode: str) -> Iterator[np.ndarray]:
    """The tensor's bytes in pieces, of a spread that keeps a layer's output near its input."""
    words = spec.nbytes // 2 if spec.dtype in ("BF16", "F16") else spec.nbytes
    fan_in = spec.shape[-1] if spec.shape else 1
    for at in range(0, words, PIECE // 2):
        n = min(PIECE // 2, words - at)
        if spec.dtype not in ("BF16", "F16"):
            if mode != "affine" and spec.name.endswith("scales"):
                yield rng.integers(*SCALES[mode], n, dtype=np.uint8)
            else:
                codes = rng.integers(0, 256, n, dtype=np.uint8)
                yield codes & 0xBF if mode == "mxfp8" else codes  # of size 2 at most, none a NaN
            continue
        yield _half(_values(spec, n, fan_in, rng), spec.dtype)


def _values(spec: Spec, n: int, fan_in: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [n]; 4-bit noise times 0.001 less 0.0075 deviates by about 1/sqrt(hidden)."""
    if spec.name.endswith(".scales"):
        return np.full(n, 0.001, np.float32)
    if spec.name.endswith(".biases"):
        return np.full(n, -0.0075, np.float32)
    if len(spec.shape) < 2:
        near = 0.0 if spec.name.endswith("bias") else 1.0
        return near + 0.02 * rng.standard_normal(n, np.float32)
    return rng.standard_normal(n, np.float32) / math.sqrt(fan_in)


def _half(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "F16":
        return values.astype(np.float16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 257 tokens, so that the runtime starts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
