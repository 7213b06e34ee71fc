"""The header of a safetensors file: names, dtypes, shapes and byte ranges, no data.

    python -c "from streamer.header import read_header; print(read_header('model.safetensors'))"

Everything that the header claims is checked against the file's size before it
is believed. Like the safetensors library, holes between tensors and bytes that
no tensor names are refused. Stricter than the library, on purpose: keys that
stand twice, unknown keys of a tensor, a tensor given as a list or its dtype as
an object, and anything before the opening brace. More lenient: -0 is a zero.
Format: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_HEADER = 100_000_000  # the reference library's limit, bytes
MAX_SIZE = (1 << 64) - 1  # the format counts in 64 bits
GIT_LFS = b"version "  # what a clone without git-lfs holds in place of a file
KEYS = {"dtype", "shape", "data_offsets"}
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


class _Damage(ValueError):
    """What is wrong; the caller adds where."""


def read_header(path: str | Path) -> dict[str, Tensor]:
    """The tensors of `path` by name, in file order. Raises CheckpointError."""
    path = Path(path)
    text, size = _read(path)
    data = 8 + len(text)
    tensors = []
    for name, entry in _parse(path, text).items():
        try:
            dtype, shape, begin, end = _layout(entry)
            if data + end > size:
                raise _Damage(
                    f"ends at byte {data + end} of a file that has {size}: the file is cut off"
                )
        except _Damage as damage:
            raise CheckpointError(f"{path}: tensor {shown(name)} {damage}") from None
        tensors.append(Tensor(name, dtype, shape, path, data + begin, end - begin))
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_cover(path, tensors, data, size)
    return {t.name: t for t in tensors}


def _read(path: Path) -> tuple[bytes, int]:
    """The header's text and the size of the whole file, bytes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is not a safetensors file: {size} bytes long")
            if prefix == GIT_LFS:
                raise CheckpointError(
                    f"{path} is a git-lfs pointer, not the file: run 'git lfs pull' in its folder"
                )
            (length,) = struct.unpack("<Q", prefix)
            if not 2 <= length <= MAX_HEADER:
                raise CheckpointError(f"{path} has a header of {length} bytes, which cannot be")
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is cut off: its header needs {8 + length} bytes, it has {size}"
                )
            return file.read(length), size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The entries of the tensors by name; the metadata is checked and dropped."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs)
        if not isinstance(header, dict) or text[:1] != b"{":
            raise _Damage("not a JSON object")
        metadata = header.pop("__metadata__", None)
        words = _strings({} if metadata is None else metadata)
        "".join([*header, *words]).encode()  # JSON can spell half a surrogate pair, UTF-8 cannot
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {str(error)[:200]}") from error
    return header


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Damage(f"the key {shown(twice)} stands twice")
    return made


def _strings(metadata: Any) -> list[str]:
    if not isinstance(metadata, dict):
        raise _Damage("__metadata__ is not an object")
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise _Damage(f"__metadata__ {shown(name)} is not a string")
    return [*metadata, *metadata.values()]


def _layout(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin, end (bytes, relative) of one entry. Raises _Damage."""
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise _Damage("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Damage(f"has the unknown dtype {reprlib.repr(dtype)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _Damage("has a shape or offsets that are not lists of sizes")
    elements = 1
    for n in shape:  # the order matters: a later 0 does not mend an overflow
        elements *= n
        if elements > MAX_SIZE:
            break
    bits = elements * BITS[dtype]
    if bits > MAX_SIZE:
        raise _Damage(f"has the shape {reprlib.repr(shape)}, more than 64 bits can count")
    if bits % 8:
        raise _Damage(f"has {bits} bits, not whole bytes")
    begin, end = offsets
    if end - begin != bits // 8:
        raise _Damage(
            f"takes bytes {begin} to {end} but its {dtype} {reprlib.repr(shape)} needs {bits // 8}"
        )
    return dtype, tuple(shape), begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_SIZE for n in value)


def _check_cover(path: Path, tensors: list[Tensor], data: int, size: int) -> None:
    """Tensors follow one another without overlap or hole, to the end of the file."""
    at = data
    last: str | None = None
    for tensor in tensors:
        if tensor.offset != at:
            name = shown(tensor.name)
            before = "the header" if last is None else shown(last)
            if tensor.offset < at:
                raise CheckpointError(f"{path}: tensor {name} overlaps {before}")
            raise CheckpointError(
                f"{path}: a hole of {tensor.offset - at} bytes lies between {before} and {name}"
            )
        at, last = tensor.offset + tensor.nbytes, tensor.name
    if at != size:
        raise CheckpointError(f"{path}: no tensor names the last {size - at} bytes")


def shown(name: str) -> str:
    """A tensor's name as errors quote it: one line, not too long."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."
