"""Rewrite a checkpoint whose experts cannot be paged in place into one that streams.

    python -m streamer.convert SRC DST
    python -m streamer.convert SRC DST --bits 4 --group-size 64

mlx-lm loads SRC lazily, with all it knows of the family's layouts and formats;
each parameter is then computed and written by itself, large ones piece by
piece (`streamer.pieces`), so that memory holds at most about twice the largest
tensor written. A conversion cut short goes on where it stopped when the command
is given again; DST appears when every file has been read back and compared, and
the whole opens for streaming. MTP heads, which mlx-lm leaves out, are carried
over unchanged into mtp.safetensors.

Quantizing follows mlx-lm's rules for the family; what is quantized already is
dequantized first, apart from latent attention's per-head matrices. Weights with
a global scale, and models that bring their own code, are refused.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from .checkpoint import Checkpoint
from .console import Parser, bar, command, number, say
from .errors import CheckpointError, StreamerError, UsageError
from .header import Tensor, read_header
from .hub import resolve
from .journal import Journal
from .pieces import PIECE, Recipe, piecewise, recipe
from .shards import Spec, pack, put_in_place, shard_name, small_files, write_index

DTYPES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.uint32: "U32", mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64",
    mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
}  # fmt: skip
FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
HEAD = "mtp.safetensors"
SHARD = 2 << 30
SPARE = 64 << 20  # bytes left free on the disk
LAYER = re.compile(r"^(?:language_model\.)?model\.layers\.(\d+)\.")
# read by mlx-lm as a description of quantized weights, which may be so no longer
STALE = "hf_quant_config.json"


@dataclass(frozen=True)
class Options:
    """bits, group_size, mode: None for what mode defaults to; all None: keep what it is.

    dtype: of floating tensors, e.g. "bfloat16"; None: keep. shard_bytes: size of a file.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    dtype: str | None = None
    shard_bytes: int = SHARD

    @property
    def quantizes(self) -> bool:
        return (self.bits, self.group_size, self.mode) != (None, None, None)

    def check(self) -> None:
        """Raises UsageError where MLX has no such format."""
        if self.mode in FIXED:
            bits, group = FIXED[self.mode]
            if self.bits not in (None, bits) or self.group_size not in (None, group):
                raise UsageError(f"--mode {self.mode} is {bits} bits in groups of {group} only")
        elif self.group_size == 16:
            raise UsageError("--group-size 16 goes with --mode nvfp4 only")


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="streamer convert", description="Rewrite a checkpoint so that it streams.")
    p.add_argument("src", metavar="SRC", help="a checkpoint folder or repository")
    p.add_argument("dst", metavar="DST", type=Path, help="a folder that does not exist yet")
    p.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize to this")
    p.add_argument("--group-size", type=int, choices=(16, 32, 64, 128), help="weights per scale")
    p.add_argument("--mode", choices=("affine", *FIXED), help="number format; default affine")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="floating tensors")
    p.add_argument("--shard-bytes", type=number(1, 1 << 50, int), default=SHARD, help="file size")
    args = p.parse_args(argv)
    options = Options(args.bits, args.group_size, args.mode, args.dtype, args.shard_bytes)
    options.check()
    if os.path.lexists(args.dst):
        same = os.path.exists(args.src) and args.dst.exists() and args.dst.samefile(args.src)
        raise UsageError(f"{args.dst} {'is the source' if same else 'exists'}; name a new folder")
    inside = Path(os.path.realpath(args.dst)).is_relative_to(os.path.realpath(args.src))
    if inside and os.path.exists(args.src):
        raise UsageError(f"{args.dst} is inside the source; name a folder elsewhere")
    try:
        convert(resolve(args.src), args.dst, options)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        raise
    say(f"wrote {args.dst}")
    return 0


def convert(src: Path, dst: Path, options: Options) -> None:
    """Convert the checkpoint folder `src` to the new folder `dst`.

    Raises UsageError and CheckpointError. What is finished stays in a hidden
    folder beside `dst` for the next call.
    """
    dst = dst.absolute()
    source = Checkpoint.open(src)
    before = mx.set_cache_limit(0)
    try:
        parameters, config = _parameters(source, options)
        specs = [Spec(n, DTYPES[a.dtype], a.shape) for n, a in parameters.items()]
        shards = pack(specs, options.shard_bytes)
        head = _head(source, set(parameters))
        job = {"source": source.fingerprint, **asdict(options)}
        with Journal(dst.parent / f".{dst.name}.partial", job) as journal:
            _check_disk(dst, shards, head, journal)
            _write(journal, shards, parameters, head)
            with bar("verify") as update:
                journal.verify(update)
            _finish(journal.folder, shards, config, src)
            put_in_place(journal.folder, dst)
            journal.forget(dst)
    except OSError as error:
        where = error.filename or dst
        raise CheckpointError(f"{where}: {error.strerror}; nothing finished is lost") from error
    finally:
        mx.set_cache_limit(before)


def _parameters(source: Checkpoint, options: Options) -> tuple[dict[str, Recipe], dict[str, Any]]:
    """How to make the model's parameters, by name, and the configuration that goes with them."""
    from .opened import load_lazily  # imports what `command` prepares for

    try:
        with piecewise(source):
            model, config = load_lazily(source.path)
            if options.dtype is not None:
                _cast(model, getattr(mx, options.dtype))
            if options.quantizes:
                model, config = _quantized(model, config, options, source.path)
    except StreamerError:
        raise
    except Exception as error:  # a model file may stumble over a configuration anywhere
        text = " ".join(str(error).split())[:200]
        name = source.config["model_type"]
        raise CheckpointError(f"{source.path} does not load as {name!r}: {text}") from error
    parameters = dict(tree_flatten(model.parameters()))
    return {n: recipe(a) for n, a in parameters.items() if a is not None}, _config(config, options)


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    keeps = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating and keeps(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantized(
    model: nn.Module, config: dict[str, Any], options: Options, path: Path
) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import dequantize_model, quantize_model

    if any(getattr(m, "global_scale", None) is not None for _, m in model.named_modules()):
        raise UsageError(f"{path} has global scales, which cannot be re-quantized")
    model = dequantize_model(model)
    config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    with contextlib.redirect_stdout(io.StringIO()):
        return quantize_model(
            model, config, options.group_size, options.bits, mode=options.mode or "affine"
        )


def _config(config: dict[str, Any], options: Options) -> dict[str, Any]:
    """Without the source's own quantization, which the written weights no longer have."""
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
    for part in (config, config.get("text_config") or {}):
        method = (part.get("quantization_config") or {}).get("quant_method")
        if method != "bitnet":  # mlx-lm builds its layers from this
            part.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if options.dtype is not None and key in part:
                part[key] = options.dtype
    return config


def _head(source: Checkpoint, used: set[str]) -> list[Tensor]:
    """The tensors of MTP heads: named mtp, lying past the last layer, or in a side file."""
    text = source.config.get("text_config") or source.config
    layers = text.get("num_hidden_layers")
    found = {}
    for name, tensor in source.tensors.items():
        layer = LAYER.match(name)
        past = bool(layer) and isinstance(layers, int) and int(layer[1]) >= layers  # type: ignore[index]
        if (past or name.startswith("mtp") or ".mtp" in name) and name not in used:
            found[name] = tensor
    for file in source.side_files:
        for name, tensor in read_header(file).items():
            if file.name.startswith("mtp") or name.startswith("mtp"):
                found.setdefault(name, tensor)
    return list(found.values())


def _check_disk(
    dst: Path, shards: Sequence[Sequence[Spec]], head: Sequence[Tensor], journal: Journal
) -> None:
    nbytes = sum(s.nbytes for shard in shards for s in shard) + sum(t.nbytes for t in head)
    needed = nbytes - journal.nbytes + SPARE
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        journal.drop_if_empty()
        raise CheckpointError(
            f"{dst} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        )


def _write(
    journal: Journal,
    shards: Sequence[Sequence[Spec]],
    parameters: dict[str, Recipe],
    head: Sequence[Tensor],
) -> None:
    total = sum(s.nbytes for shard in shards for s in shard) + sum(t.nbytes for t in head)
    done = 0
    with bar("convert") as update:

        def tick(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            update(done, total, "MB")

        for i, shard in enumerate(shards):
            name = shard_name(i, len(shards))
            if name in journal.done:
                for spec in shard:
                    del parameters[spec.name]
                    tick(spec.nbytes)
                continue
            journal.write(name, shard, _computed(shard, parameters), tick)
        if head and HEAD not in journal.done:
            specs = [Spec(t.name, t.dtype, t.shape) for t in head]
            journal.write(HEAD, specs, _stored(head), tick)
            say(f"carried {len(head)} tensors of the MTP head over into {HEAD}, unchanged")


def _computed(shard: Sequence[Spec], parameters: dict[str, Recipe]) -> Iterator[memoryview]:
    """The bytes of a shard's tensors in order; each tensor leaves `parameters`."""
    for spec in shard:
        yield from parameters.pop(spec.name).bytes_of(spec.name)


def _stored(tensors: Sequence[Tensor]) -> Iterator[bytes]:
    for tensor in tensors:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            left = tensor.nbytes
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise CheckpointError(f"{tensor.path} was cut off while it was read")
                left -= len(piece)
                yield piece


def _finish(
    folder: Path, shards: Sequence[Sequence[Spec]], config: dict[str, Any], src: Path
) -> None:
    """Add what goes with the shards, and open the whole as the loader will."""
    from mlx_lm.utils import save_config

    from .opened import open_model

    write_index(folder, shards)
    save_config(config, folder / "config.json", keep_vision_config=True)
    for path in (*small_files(src), *sorted(src.glob("*.py"))):
        if path.name != STALE:
            shutil.copyfile(path, folder / path.name)
    try:
        open_model(folder)
    except StreamerError as error:
        raise CheckpointError(f"what was converted does not stream: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
