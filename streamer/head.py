"""Read a model's MTP head from where its checkpoint keeps it, without reading its weights.

    python -m streamer.head --model PATH      # what is found, or why nothing is

A side file beside the checkpoint (`mtp.safetensors`, as tools/extract_mtp.py and
the converter write it) goes before tensors inside it, which mlx-lm leaves out.
The head is loaded like the trunk, lazily and with the place of every byte, so
that its experts are paged through the same store.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mtp.find import HeadError, find_head, head_names
from mtp.head import Head

from .checkpoint import Checkpoint
from .console import Parser, command
from .errors import CheckpointError
from .header import read_header
from .trace import tracing


@dataclasses.dataclass(frozen=True)
class Found:
    """head: None where there is none that works; files: the checkpoint's and the head's own.

    notes: what was decided while it was built, or the one reason for there being none.
    """

    head: Head | None
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @classmethod
    def none(cls, checkpoint: Checkpoint, *notes: str) -> Found:
        return cls(None, checkpoint.files, notes)


def read_head(checkpoint: Checkpoint, model: nn.Module, config: dict[str, Any]) -> Found:
    """The head of `checkpoint`, built for mlx-lm's `model`; its parameters are lazy.

    A head that is damaged is not used, and `notes` says why.
    """
    try:
        held, names = _holder(checkpoint, config)
        if not names:
            return Found.none(checkpoint, f"{checkpoint.path.name} has no MTP head")
        with tracing(held):
            head = find_head(model, config, _lazy(held, names))
        if head is None:
            raise HeadError("only copies of the trunk's tensors are there")
    except (CheckpointError, HeadError) as error:
        return Found.none(checkpoint, f"{checkpoint.path.name} is used without MTP head: {error}")
    return Found(head, held.files, tuple(head.notes))


def advice(path: Path) -> str:
    """The command that makes a side file of the head which `path` itself has."""
    folder = shlex.quote(str(path))
    return f"python -m tools.extract_mtp {folder} --beside {folder}"


def _holder(checkpoint: Checkpoint, config: dict[str, Any]) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint, with the side file that has the head where there is one.

    And names as stored by the head's names, which mtp*.safetensors may hold without "mtp.".
    """
    beside = sorted(checkpoint.side_files, key=lambda p: (not p.name.startswith("mtp"), p.name))
    for file in beside:
        header = read_header(file)
        names = {n: n for n in head_names(config, header)}
        if not names and file.name.startswith("mtp"):
            bare = {f"mtp.{n}": n for n in header}
            names = {n: bare[n] for n in head_names(config, bare)}
        if names:
            held = dataclasses.replace(
                checkpoint,
                tensors=checkpoint.tensors | header,
                files=(*checkpoint.files, file),
            )
            return held, names
    return checkpoint, {n: n for n in head_names(config, checkpoint.tensors)}


def _lazy(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, mx.array]:
    stored: dict[str, mx.array] = {}
    for file in {checkpoint.tensors[name].path for name in names.values()}:
        stored |= cast(dict[str, mx.array], mx.load(str(file)))
    return {name: stored[at] for name, at in names.items()}


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="streamer.head", description="Show a checkpoint's MTP head.")
    parser.add_argument("--model", required=True, help="folder or repository")
    args = parser.parse_args(argv)
    from .hub import resolve
    from .opened import open_model

    opened = open_model(resolve(args.model), mtp=True)
    print("; ".join(opened.head_notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
