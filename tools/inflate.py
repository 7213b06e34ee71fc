"""Pad every routed expert with zeros: the same tokens, at the byte sizes of real models.

    python -m tools.inflate SRC DST --expert-bytes 1MB

The intermediate size of each expert grows by a whole factor. New rows of gate
and up are zero, and so are the columns of down that meet them, so that every
output keeps its bits. Reads a checkpoint with stacked experts (`switch_mlp` or
`experts`, quantized affine or not), those of its MTP head included.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from streamer.checkpoint import Checkpoint
from streamer.console import Parser, bar, command, number
from streamer.errors import UsageError
from streamer.footprint import parse_size
from streamer.header import BITS, Tensor
from streamer.shards import ShardWriter, Spec, small_files

EXPERT = re.compile(
    r"(?P<layer>.*\.(switch_mlp|experts))\.(?P<p>gate|up|down)_proj\.(?P<kind>\w+)$"
)
SIZES = ("moe_intermediate_size", "expert_intermediate_size")
PIECE = 64 << 20  # bytes written at once


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="tools.inflate", description="Zero-pad experts to real sizes.")
    p.add_argument("src", type=Path)
    p.add_argument("dst", type=Path)
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--expert-bytes", help="grow to at least this, e.g. 1MB")
    size.add_argument("--factor", type=number(1, 4096, int))
    args = p.parse_args(argv)
    source = Checkpoint.open(args.src)
    factor = args.factor or _factor(source, parse_size(args.expert_bytes))
    inflate(source, args.dst, factor)
    return 0


def inflate(source: Checkpoint, dest: Path, factor: int) -> None:
    """Write `source` with experts `factor` times as wide to `dest`."""
    tensors = list(source.tensors.values())
    if not any(_is_expert(t) for t in tensors):
        raise UsageError(f"{source.path} has no stacked experts to pad")
    specs = [Spec(t.name, t.dtype, _grown(t, factor)) for t in tensors]
    with ShardWriter(dest, specs) as writer, bar("inflating") as update:
        for tensor in tensors:
            for piece in _pieces(tensor, factor if _is_expert(tensor) else 1):
                writer.write(piece)
                update(writer.written, writer.total, "MB")
        writer.finish(_config(source.config, factor), small_files(source.path))


def _is_expert(tensor: Tensor) -> bool:
    return bool(EXPERT.match(tensor.name))


def _factor(source: Checkpoint, wanted: int) -> int:
    trunk = (t for n, t in source.tensors.items() if "mtp." not in n)
    first = next((t for t in trunk if _is_expert(t)), None)
    if first is None:
        raise UsageError(f"{source.path} has no stacked experts to pad")
    layer = EXPERT.match(first.name)["layer"]  # type: ignore[index]
    parts = [t for n, t in source.tensors.items() if n.startswith(f"{layer}.")]
    return max(1, -(-wanted * first.shape[0] // sum(t.nbytes for t in parts)))


def _axis(tensor: Tensor) -> int | None:
    """The axis that the intermediate size lies on, or None for an output bias."""
    match = EXPERT.match(tensor.name)
    assert match
    if match["p"] == "down":
        return None if match["kind"] == "bias" else 2
    return 1


def _grown(tensor: Tensor, factor: int) -> tuple[int, ...]:
    axis = _axis(tensor) if _is_expert(tensor) else None
    return tuple(n * factor if i == axis else n for i, n in enumerate(tensor.shape))


def _pieces(tensor: Tensor, factor: int) -> Any:
    """The tensor's bytes, padded, expert by expert or in bounded pieces."""
    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
    axis = _axis(tensor) if factor > 1 else None
    if axis is None:
        for at in range(0, len(data), PIECE):
            yield np.ascontiguousarray(data[at : at + PIECE])
        return
    experts, rows = tensor.shape[0], tensor.shape[1]
    view = data.reshape(experts, rows, -1)
    row_bytes = view.shape[2]
    assert row_bytes * 8 >= BITS[tensor.dtype]
    for expert in view:
        shape = (rows * factor, row_bytes) if axis == 1 else (rows, row_bytes * factor)
        padded = np.zeros(shape, np.uint8)
        padded[:rows, :row_bytes] = expert
        yield padded


def _config(config: dict[str, Any], factor: int) -> dict[str, Any]:
    grown = copy.deepcopy(config)
    found = False
    for part in (grown, grown.get("text_config") or {}):
        for key in SIZES:
            if isinstance(part.get(key), int):
                part[key] *= factor
                found = True
    if not found:
        raise UsageError("the configuration names no intermediate size of experts")
    return grown


if __name__ == "__main__":
    sys.exit(main())
