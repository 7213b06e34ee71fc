"""What the routers chose, pass by pass: a recording to replay pools and policies on.

    routes = Routes.load(Path("demo.routes"))
    routes.calls[0].layer, routes.calls[0].experts        # 0, uint16 [rows, k]

One file, NumPy's .npz without pickled objects: a versioned header as JSON and flat
arrays, a few bytes per (row, layer). A recording holds no weights and no text, but
the token ids that were put in. `tools.trace record` makes one.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import StreamerError
from .files import replaced

FORMAT, VERSION = "moe-routes", 1
# what zipfile, NumPy and json raise of files that are not theirs
DAMAGE = (
    ValueError, LookupError, TypeError, ArithmeticError, OSError, EOFError, RuntimeError,
    SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
KINDS = ("prefill", "decode", "verify", "draft")


class RoutesError(StreamerError):
    """A recording that cannot be read, or does not fit what is asked of it."""


class Group(NamedTuple):
    """Layers that share a pool. layers: indices; slots: of the recorded run; sizes in bytes."""

    layers: tuple[int, ...]
    slots: int
    expert_bytes: int


class Call(NamedTuple):
    """One layer's router in one pass. experts: uint16 [rows, k]; step: index into `passes`."""

    step: int
    layer: int
    experts: np.ndarray


class Pass(NamedTuple):
    """kind: of KINDS; sequence: of which prompt; tokens: put in, int32 [rows]; kept: leading
    rows that stayed (of a verify pass the accepted ones), 0 for the head's own passes."""

    kind: str
    sequence: int
    tokens: np.ndarray
    kept: int


@dataclass
class Routes:
    """counts: experts of each layer; head: layers of the MTP head, from this index on;
    hits, misses: the recorded run's own, distinct experts per layer and pass."""

    model: str
    fingerprint: str
    counts: tuple[int, ...]
    head: int
    top_k: int
    groups: tuple[Group, ...]
    hits: int = 0
    misses: int = 0
    calls: list[Call] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Routed experts over all layers."""
        return sum(self.counts)

    @property
    def slots(self) -> int:
        """Of the recorded run, over all groups."""
        return sum(group.slots for group in self.groups)

    @property
    def tokens(self) -> int:
        """Tokens that decoding gave after each prompt's first."""
        return sum(p.kept for p in self.passes if p.kind in ("decode", "verify"))

    def save(self, path: Path) -> None:
        """Whole or not at all. Raises RoutesError when it cannot be written."""
        head = asdict(self)
        for name in ("calls", "passes"):
            del head[name]
        head |= {"format": FORMAT, "version": VERSION, "kinds": KINDS}
        arrays: dict[str, Any] = {
            "header": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
            "call_step": np.array([c.step for c in self.calls], dtype=np.int32),
            "call_layer": np.array([c.layer for c in self.calls], dtype=np.uint16),
            "call_shape": np.array([c.experts.shape for c in self.calls], np.int32).reshape(-1, 2),
            "experts": _flat([c.experts for c in self.calls], np.uint16),
            "pass_kind": np.array([KINDS.index(p.kind) for p in self.passes], dtype=np.uint8),
            "pass_sequence": np.array([p.sequence for p in self.passes], dtype=np.int32),
            "pass_rows": np.array([len(p.tokens) for p in self.passes], dtype=np.int32),
            "pass_kept": np.array([p.kept for p in self.passes], dtype=np.int32),
            "tokens": _flat([p.tokens for p in self.passes], np.int32),
        }
        try:
            replaced(path, lambda file: np.savez_compressed(file, **arrays))
        except OSError as error:
            raise RoutesError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Routes:
        """Raises RoutesError for a file that is missing, damaged or of another version."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RoutesError(f"cannot read {path}: {error.strerror}") from error
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(arrays["header"].tobytes())
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']!r}")
            if head["version"] != VERSION:
                raise RoutesError(
                    f"{path} is a recording of version {head['version']}; this program reads "
                    f"version {VERSION}"
                )
            return _read(head, arrays)
        except RoutesError:
            raise
        except DAMAGE as error:
            raise RoutesError(f"{path} is no recording of routes, or a damaged one") from error


def _flat(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(p.reshape(-1).astype(dtype) for p in parts)])


def _read(head: dict[str, Any], arrays: dict[str, np.ndarray]) -> Routes:
    shapes = arrays["call_shape"].astype(np.int64)
    if (shapes < 0).any() or shapes.prod(axis=1).sum() != len(arrays["experts"]):
        raise ValueError("calls and experts disagree")
    rows = arrays["pass_rows"].astype(np.int64)
    if (rows < 0).any() or rows.sum() != len(arrays["tokens"]):
        raise ValueError("passes and tokens disagree")
    routes = Routes(
        model=str(head["model"]),
        fingerprint=str(head["fingerprint"]),
        counts=tuple(int(n) for n in head["counts"]),
        head=int(head["head"]),
        top_k=int(head["top_k"]),
        groups=tuple(Group(tuple(g[0]), int(g[1]), int(g[2])) for g in head["groups"]),
        hits=int(head["hits"]),
        misses=int(head["misses"]),
    )
    experts = np.split(arrays["experts"], shapes.prod(axis=1).cumsum()[:-1])
    steps, layers = arrays["call_step"].tolist(), arrays["call_layer"].tolist()
    for step, layer, chosen, shape in zip(steps, layers, experts, shapes, strict=bool(len(shapes))):
        if chosen.size and chosen.max() >= routes.counts[layer]:
            raise ValueError(f"layer {layer} has no expert {chosen.max()}")
        routes.calls.append(Call(step, layer, chosen.reshape(shape)))
    tokens = np.split(arrays["tokens"], rows.cumsum()[:-1])
    kinds = [KINDS[i] for i in arrays["pass_kind"].tolist()]
    sequences, kept = arrays["pass_sequence"].tolist(), arrays["pass_kept"].tolist()
    for kind, sequence, put_in, stayed in zip(
        kinds, sequences, tokens, kept, strict=bool(len(rows))
    ):
        routes.passes.append(Pass(kind, sequence, put_in, stayed))
    if any(not 0 <= c.step < len(routes.passes) for c in routes.calls):
        raise ValueError("a call belongs to no pass")
    return routes
