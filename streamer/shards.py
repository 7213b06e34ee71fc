"""Write a checkpoint of any size in bounded memory: shards, index, config.

Tensors are announced first and then written in that order, piece by piece. All
of it lands in a hidden folder beside the destination, which is renamed into
place at the end; a failure leaves nothing behind.

    with ShardWriter(dest, [Spec("w", "F32", (2, 2))]) as writer:
        writer.write(b"\\0" * 16)
        writer.finish({"model_type": "..."})
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from .checkpoint import INDEX
from .errors import CheckpointError, UsageError
from .header import BITS

SHARD_BYTES = 5 << 30


class Spec(NamedTuple):
    """A tensor to come. dtype: safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


class ShardWriter:
    """Writes `specs` in order into shards of about `shard_bytes`.

    Raises UsageError when `dest` exists and CheckpointError when the disk is
    too full, before anything is written.
    """

    def __init__(self, dest: Path, specs: Sequence[Spec], shard_bytes: int = SHARD_BYTES):
        if dest.exists():
            raise UsageError(f"{dest} exists; name a folder that does not")
        self.dest = dest
        self.total = sum(spec.nbytes for spec in specs)
        self.written = 0
        dest.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dest.parent).free
        if free < self.total + (64 << 20):
            raise CheckpointError(
                f"{dest} needs {self.total / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
            )
        self._aside = dest.parent / f".{dest.name}.partial"
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir()
        self._shards = pack(specs, shard_bytes)
        self._next = 0
        self._left = 0
        self._file: BinaryIO | None = None

    def write(self, data: Any) -> None:
        """The next bytes (anything with a buffer), which must not pass the end of a shard."""
        view = memoryview(data).cast("B")
        if self._left == 0:
            self._open()
        if view.nbytes > self._left:
            raise ValueError("a piece crosses the end of its shard")
        assert self._file is not None
        self._file.write(view)
        self._left -= view.nbytes
        self.written += view.nbytes
        if self._left == 0:
            self._sync()

    def finish(self, config: dict[str, Any], copy: Iterable[Path] = ()) -> None:
        """Add index, config and small files, and put the folder in place."""
        if self.written != self.total:
            raise ValueError(f"{self.written} of {self.total} bytes were written")
        write_index(self._aside, self._shards)
        (self._aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for path in copy:
            shutil.copyfile(path, self._aside / path.name)
        put_in_place(self._aside, self.dest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _name(self, i: int) -> str:
        return shard_name(i, len(self._shards))

    def _open(self) -> None:
        shard = self._shards[self._next]
        self._file = open(self._aside / self._name(self._next), "wb")  # noqa: SIM115
        self._file.write(header(shard))
        self._left, self._next = sum(spec.nbytes for spec in shard), self._next + 1

    def _sync(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


def small_files(folder: Path) -> list[Path]:
    """What goes along with the weights: tokenizer, templates, generation settings."""
    suffixes = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".md"}
    skip = {"config.json", INDEX}
    return [p for p in sorted(folder.iterdir()) if p.suffix in suffixes and p.name not in skip]


def pack(specs: Sequence[Spec], limit: int = SHARD_BYTES) -> list[list[Spec]]:
    """Tensors by shard, in order, each shard at most `limit` bytes or one tensor."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05}-of-{count:05}.safetensors"


def header(shard: Sequence[Spec]) -> bytes:
    """Length and header of a file that holds these tensors one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for spec in shard:
        offsets = [at, at + spec.nbytes]
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_index(folder: Path, shards: Sequence[Sequence[Spec]]) -> None:
    """model.safetensors.index.json of the shards."""
    weights = {
        spec.name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for spec in shard
    }
    total = sum(spec.nbytes for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def put_in_place(aside: Path, dest: Path) -> None:
    """Sync every file of `aside` and rename the folder to `dest`."""
    for path in aside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(aside, dest)
