"""The header of a safetensors file: names, dtypes, shapes and byte ranges, no data.

    python -c "from streamer.header import read_header; print(read_header('model.safetensors'))"

Everything that the header claims is checked against the file's size before it
is believed. Stricter than the safetensors library in two points: unknown keys of
a tensor, and keys that stand twice, are refused. Format: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_HEADER = 100_000_000  # the reference library's limit, bytes
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file. dtype: safetensors' name; offset: absolute, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of `path` by name, in file order. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is not a safetensors file: {size} bytes long")
            (length,) = struct.unpack("<Q", prefix)
            if not 2 <= length <= MAX_HEADER:
                raise CheckpointError(f"{path} has a header of {length} bytes, which cannot be")
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is cut off: its header needs {8 + length} bytes, it has {size}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    tensors = _parse(path, text, 8 + length, size)
    _check_cover(path, tensors, 8 + length, size)
    return {t.name: t for t in tensors}


def _parse(path: Path, text: bytes, data: int, size: int) -> list[Tensor]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {str(error)[:100]}") from error
    if not isinstance(header, dict) or text[:1] != b"{":
        raise CheckpointError(f"{path} has a damaged header: not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path} has damaged metadata: not strings by name")
    tensors = [_tensor(path, name, entry, data, size) for name, entry in header.items()]
    return sorted(tensors, key=lambda t: (t.offset, t.nbytes))


class _Duplicate(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Duplicate("a key stands twice")
    return made


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise bad("has a shape or offsets that are not lists of sizes")
    bits = math.prod(shape) * BITS[dtype]
    begin, end = offsets
    if bits % 8:
        raise bad(f"has {bits} bits, not whole bytes")
    if end < begin or end - begin != bits // 8:
        raise bad(f"takes bytes {begin} to {end} but its {dtype} {shape} needs {bits // 8}")
    if data + end > size:
        raise bad(f"ends at byte {data + end} of a file that has {size}: the file is cut off")
    return Tensor(name, dtype, tuple(shape), path, data + begin, end - begin)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_cover(path: Path, tensors: list[Tensor], data: int, size: int) -> None:
    """Tensors follow one another without overlap or hole, to the end of the file."""
    at, last = data, "the header"
    for tensor in tensors:
        if tensor.offset < at:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} overlaps {last}")
        if tensor.offset > at:
            raise CheckpointError(f"{path}: a hole of {tensor.offset - at} bytes follows {last}")
        at, last = tensor.offset + tensor.nbytes, repr(tensor.name)
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes that no tensor names follow {last}")
