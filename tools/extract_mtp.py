"""Take the MTP head out of an original checkpoint and put it beside a converted one.

    python -m tools.extract_mtp ORIGINAL --beside CONVERTED

Conversions for MLX leave the head out. ORIGINAL is a folder or a repository, of
which only the index and the shards that hold the head are fetched. The head goes
into CONVERTED/mtp.safetensors under this project's names: experts and linear
layers at 8 bits in groups of 64, `fc` (where embedding and hidden state meet),
routers and norms as they are, norms as they multiply. What is quantized already
stays as it is. 8 bits because an int4 head had 4% of its drafts accepted where an
int8 head had 59% (colibri). Tensors are computed piece by piece: memory holds
about twice the largest one written. ORIGINAL may be Gemma 4's assistant, a checkpoint
of its own, where CONVERTED is the model that it assists.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp.families.family import build
from mtp.find import HeadError, family_of, find_head, head_names, text_config
from mtp.head import Head
from streamer.checkpoint import INDEX, Checkpoint, read_config, weight_map
from streamer.console import Parser, bar, command, say
from streamer.convert import DTYPES
from streamer.errors import CheckpointError, UsageError
from streamer.header import Tensor, read_header
from streamer.hub import resolve
from streamer.opened import open_model
from streamer.pieces import Recipe, piecewise, recipe
from streamer.shards import Spec, header

SIDE = "mtp.safetensors"
BITS = 8
GROUPS = (64, 32)
KEPT = ("join", "gate", "centroids")  # ends of the names of layers that are not quantized
SAME = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")
ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")  # their whole checkpoint is a head
ASSISTED = ("gemma4", "gemma4_text")
SPARE = 64 << 20  # bytes left free on the disk


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="tools.extract_mtp", description="Put a model's MTP head beside a conversion.")
    p.add_argument("original", metavar="ORIGINAL", help="a folder or repository with the head")
    p.add_argument(
        "--beside", metavar="CONVERTED", type=Path, required=True, help="a checkpoint folder"
    )
    args = p.parse_args(argv)
    nbytes, notes = extract(args.original, args.beside)
    for note in notes:
        say(note)
    say(f"wrote {args.beside / SIDE}, {nbytes / 1e6:.1f} MB, experts and layers at {BITS} bits")
    return 0


def extract(original: str, beside: Path) -> tuple[int, list[str]]:
    """Write the head of `original` beside the checkpoint `beside`: bytes, and what was decided.

    Raises UsageError and CheckpointError; then nothing is left behind.
    """
    converted = Checkpoint.open(beside)
    side = beside / SIDE
    if side.exists():
        raise UsageError(f"{side} exists; remove it first")
    wanted = partial(_missing, assisted=converted)
    source = _source(resolve(original, ["config.json", INDEX], wanted), converted)
    _check_same(source, converted)
    before = mx.set_cache_limit(0)
    try:
        recipes, notes = _recipes(source, converted)
        specs = [Spec(n, DTYPES[r.dtype], r.shape) for n, r in recipes.items()]
        _write(side, specs, recipes)
    finally:
        mx.set_cache_limit(before)
    opened = open_model(beside, mtp=True)
    if opened.head is None:
        side.unlink()
        raise CheckpointError(f"{'; '.join(opened.head_notes)}; {side} was removed again")
    return side.stat().st_size, notes


def _missing(folder: Path, assisted: Checkpoint) -> list[str]:
    """Files of a repository that hold the head and are not here yet."""
    index = weight_map(folder)
    names = _named(folder, list(index), assisted) if index else {}
    wanted = {index[n] for n in names.values()} or {"model.safetensors"}
    return sorted(wanted - set(os.listdir(folder)))


def _named(folder: Path, names: list[str], assisted: Checkpoint) -> dict[str, str]:
    """Those of `names` that are the head's, by what the family calls them.

    Raises CheckpointError where there are none.
    """
    config = _config(folder, assisted)
    if family_of(config) is None:
        kind = config["model_type"]
        raise CheckpointError(f"{folder} is of a family, {kind!r}, whose MTP head is not known")
    prefix = "mtp." if config is assisted.config else ""
    called = {f"{prefix}{n}": n for n in names}
    if found := head_names(config, called):
        return {n: called[n] for n in found}
    raise CheckpointError(f"{folder} has no MTP head")


def _config(folder: Path, assisted: Checkpoint) -> dict[str, Any]:
    """What the head is read by: the folder's configuration, or that of the model it assists."""
    config = read_config(folder)
    if config["model_type"] not in ASSISTANTS:
        return config
    ours = text_config(assisted.config)
    width = config.get("backbone_hidden_size")
    if ours["model_type"] not in ASSISTED or ours.get("hidden_size") != width:
        raise CheckpointError(
            f"{folder} assists a Gemma 4 of hidden size {width}, and {assisted.path} is "
            f"{ours['model_type']!r} of hidden size {ours.get('hidden_size')}"
        )
    return assisted.config


def _source(folder: Path, assisted: Checkpoint) -> Checkpoint:
    """The head's files alone, as a checkpoint: the others may not have been fetched."""
    index = weight_map(folder)
    if index:
        names = _named(folder, list(index), assisted)
        files = sorted({folder / index[n] for n in names.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_header(file)
    kept = {tensors[n].path for n in _named(folder, list(tensors), assisted).values()}
    holding = tuple(f for f in files if f in kept)
    return Checkpoint(folder, _config(folder, assisted), tensors, holding, ())


def _check_same(source: Checkpoint, converted: Checkpoint) -> None:
    theirs, ours = text_config(source.config), text_config(converted.config)
    for key in SAME:
        if theirs.get(key) != ours.get(key):
            raise CheckpointError(
                f"{source.path} is not what {converted.path} was made from: "
                f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
            )


def _recipes(source: Checkpoint, converted: Checkpoint) -> tuple[dict[str, Recipe], list[str]]:
    """How to make the tensors to be written, by name; what was decided."""
    config = source.config
    try:
        with piecewise(source):
            weights: dict[str, mx.array] = {}
            for file in source.files:
                weights |= cast(dict[str, mx.array], mx.load(str(file)))
            names = _named(source.path, list(weights), converted)
            named = {name: weights[n] for name, n in names.items()}
            head = find_head(build(text_config(config)), config, named)
            if head is None:
                raise HeadError("only copies of the trunk's tensors are there")
            kept = _quantize(head)
            parameters = dict(tree_flatten(head.parameters()))
    except HeadError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    notes = [*head.notes, *(f"{name} is kept as it is: no group of {GROUPS}" for name in kept)]
    return {f"mtp.{n}": recipe(a) for n, a in parameters.items()}, notes


def _quantize(head: Head) -> list[str]:
    """Quantize all but `join` and routers; the names of layers whose width no group divides."""
    kept = []

    def rule(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or path.endswith(KEPT):
            return False
        width = module.weight.shape[-1]
        group = next((g for g in GROUPS if width % g == 0), None)
        if group is None:
            kept.append(path)
            return False
        return {"group_size": group, "bits": BITS}

    nn.quantize(head, class_predicate=rule)
    return kept


def _write(side: Path, specs: list[Spec], recipes: dict[str, Recipe]) -> None:
    """Write aside, sync, rename."""
    total = sum(spec.nbytes for spec in specs)
    free = shutil.disk_usage(side.parent).free
    if free < total + SPARE:
        raise CheckpointError(
            f"{side} needs {total / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        )
    aside = side.with_name(f".{side.name}.partial")
    try:
        with bar("extract") as update, open(aside, "wb") as file:
            file.write(header(specs))
            done = 0
            for spec in specs:
                for data in recipes.pop(spec.name).bytes_of(spec.name):
                    file.write(data)
                    done += len(data)
                    update(done, total, "MB")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, side)
    except OSError as error:
        raise CheckpointError(f"{side} cannot be written: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
