"""Rewrite a checkpoint whose experts cannot be paged in place into one that streams.

    python -m streamer.convert SRC DST
    python -m streamer.convert SRC DST --bits 4 --group-size 64

mlx-lm loads SRC lazily, with all it knows of the family's layouts and formats;
each parameter is then computed and written by itself, so that memory holds one
at a time, and the sources it is made from. A conversion that was cut short goes
on where it stopped; DST appears when every shard has been read back and
compared. MTP heads, which mlx-lm leaves out, are carried over as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint
from .console import Parser, bar, command, number, say
from .errors import CheckpointError, StreamerError, UsageError
from .header import Tensor
from .shards import Spec, header, pack, put_in_place, shard_name, small_files, write_index

DTYPES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.uint32: "U32", mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64",
    mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
}  # fmt: skip
JOURNAL = "journal.json"
SHARD = 2 << 30
PIECE = 16 << 20  # bytes copied or compared at once
Update = Callable[[int, int, str], None]


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="streamer convert", description="Rewrite a checkpoint so that it streams.")
    p.add_argument("src", type=Path)
    p.add_argument("dst", type=Path)
    p.add_argument("--bits", type=number(2, 8, int), help="quantize to this; left as it is if not")
    p.add_argument("--group-size", type=number(16, 128, int), default=64)
    p.add_argument("--mode", choices=("affine", "mxfp4", "mxfp8", "nvfp4"), default="affine")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--shard-bytes", type=number(1, 1 << 50, int), default=SHARD)
    args = p.parse_args(argv)
    options = {
        "bits": args.bits,
        "group_size": args.group_size,
        "mode": args.mode,
        "dtype": args.dtype,
        "shard_bytes": args.shard_bytes,
    }
    convert(args.src, args.dst, options)
    say(f"wrote {args.dst}")
    return 0


def convert(src: Path, dst: Path, options: dict[str, Any]) -> None:
    """Convert `src` to the new folder `dst`; see `main` for the options.

    Raises UsageError and CheckpointError.
    """
    if dst.exists():
        same = src.exists() and dst.samefile(src)
        raise UsageError(f"{dst} {'is the source' if same else 'exists'}; name a new folder")
    source = Checkpoint.open(src)
    parameters, config = _parameters(source, options)
    specs = [Spec(n, DTYPES[a.dtype], tuple(a.shape)) for n, a in parameters.items()]
    shards = pack(specs, options["shard_bytes"])
    head = [t for t in source.tensors.values() if "mtp." in t.name]

    aside = dst.parent / f".{dst.name}.partial"
    journal = _Journal(aside, {"source": source.fingerprint, **options})
    _check_disk(dst, sum(s.nbytes for s in specs) + sum(t.nbytes for t in head), journal)
    total = sum(spec.nbytes for spec in specs)
    with bar("convert") as update:
        done = 0
        for i, shard in enumerate(shards):
            name = shard_name(i, len(shards))
            arrays = [parameters.pop(spec.name) for spec in shard]
            if name not in journal.done:
                journal.add(name, _write_shard(aside / name, shard, arrays, update, done, total))
            done += sum(spec.nbytes for spec in shard)
    with bar("verify") as update:
        _verify(aside, journal.done, update)
    if head:
        _carry_over(head, aside / "mtp.safetensors")
        say(f"carried {len(head)} tensors of the MTP head over into mtp.safetensors, unchanged")
    write_index(aside, shards)
    (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for path in small_files(src):
        shutil.copyfile(path, aside / path.name)
    (aside / JOURNAL).unlink()
    put_in_place(aside, dst)


def _parameters(
    source: Checkpoint, options: dict[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The model's parameters by name, lazy, and the configuration that goes with them."""
    from mlx_lm.utils import load_model, quantize_model

    try:
        model, config = load_model(source.path, lazy=True)
        if options["dtype"] is not None:
            model.apply(lambda a: _cast(a, getattr(mx, options["dtype"])))
        if options["bits"] is not None:
            if any(hasattr(m, "bits") for _, m in model.named_modules()):
                raise UsageError(f"{source.path} is quantized already; leave --bits out")
            model, config = quantize_model(
                model, config, options["group_size"], options["bits"], mode=options["mode"]
            )
    except StreamerError:
        raise
    except Exception as error:  # a model file may stumble over a configuration anywhere
        text = " ".join(str(error).split())[:200]
        name = source.config["model_type"]
        raise CheckpointError(f"{source.path} does not load as {name!r}: {text}") from error
    return _named(model), _config(config)


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _named(model: nn.Module) -> dict[str, mx.array]:
    return {n: a for n, a in dict(tree_flatten(model.parameters())).items() if a is not None}


def _config(config: dict[str, Any]) -> dict[str, Any]:
    """Without the source's own quantization, which the written weights no longer have."""
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
        config["text_config"].pop("quantization_config", None)
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]
    return config


class _Journal:
    """What of a conversion is on disk: shard names and their SHA-256."""

    def __init__(self, aside: Path, job: dict[str, Any]):
        self._path = aside / JOURNAL
        self._job = job
        self.done: dict[str, str] = {}
        try:
            aside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {aside.parent}: {error.strerror}") from error
        if self._path.exists():
            try:
                found = json.loads(self._path.read_text())
                begun, self.done = found["job"], found["done"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{aside} is damaged; remove it") from error
            if begun != job:
                raise UsageError(f"{aside} holds another conversion, begun earlier; remove it")
            say(f"going on after {len(self.done)} shards")
        else:
            self._save()

    def add(self, name: str, digest: str) -> None:
        self.done[name] = digest
        self._save()

    def _save(self) -> None:
        aside = self._path.with_suffix(".new")
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"job": self._job, "done": self.done}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self._path)


def _check_disk(dst: Path, nbytes: int, journal: _Journal) -> None:
    aside = dst.parent / f".{dst.name}.partial"
    there = sum((aside / name).stat().st_size for name in journal.done if (aside / name).exists())
    free = shutil.disk_usage(dst.parent).free
    if free < nbytes - there + (64 << 20):
        raise CheckpointError(
            f"{dst} needs {(nbytes - there) / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        )


def _write_shard(
    path: Path, shard: Sequence[Spec], arrays: list[mx.array], update: Update, done: int, total: int
) -> str:
    """Compute and write one shard; its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        start = header(shard)
        file.write(start)
        digest.update(start)
        for spec in shard:
            array = mx.contiguous(arrays.pop(0))
            mx.eval(array)
            # one flat byte view serves dtypes that NumPy lacks
            flat: Any = array.reshape(-1).view(mx.uint8)
            data = memoryview(flat) if array.size else b""
            file.write(data)
            digest.update(data)
            del array, flat, data
            mx.clear_cache()
            done += spec.nbytes
            update(done, total, "MB")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _verify(aside: Path, done: dict[str, str], update: Update) -> None:
    total = sum((aside / name).stat().st_size for name in done)
    at = 0
    for name, wanted in done.items():
        digest = hashlib.sha256()
        with open(aside / name, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                at += len(piece)
                update(at, total, "MB")
        if digest.hexdigest() != wanted:
            raise CheckpointError(f"{aside / name} is not what was written; remove {aside}")


def _carry_over(tensors: Sequence[Tensor], path: Path) -> None:
    with open(path, "wb") as out:
        out.write(header([Spec(t.name, t.dtype, t.shape) for t in tensors]))
        for tensor in tensors:
            with open(tensor.path, "rb") as file:
                file.seek(tensor.offset)
                left = tensor.nbytes
                while left and (piece := file.read(min(left, PIECE))):
                    out.write(piece)
                    left -= len(piece)


if __name__ == "__main__":
    sys.exit(main())
