"""A checkpoint folder: its configuration and where every tensor lies.

    python -c "from streamer.checkpoint import Checkpoint; print(Checkpoint.open('PATH').nbytes)"

Only config.json, the index and the shards' headers are read, whatever the
size. The shards are those that mlx-lm loads, `model*.safetensors`; files
beside them, such as `mtp.safetensors`, are `side_files`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .header import Tensor, read_header

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """path: the folder; tensors by name; files: the shards, in name order."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    side_files: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises CheckpointError, one sentence naming the file, for anything amiss."""
        path = Path(path)
        _check_folder(path)
        config = _config(path)
        files = tuple(sorted(path.glob("model*.safetensors")))
        side_files = tuple(sorted(set(path.glob("*.safetensors")) - set(files)))
        if not files:
            raise CheckpointError(f"{path} has no model*.safetensors{_instead(path)}")
        _check_shards(path, files)
        tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"tensor {name!r} stands in both {tensors[name].path.name} and {file.name}"
                    )
                tensors[name] = tensor
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors")
        _check_index(path, tensors)
        return cls(path, config, tensors, files, side_files)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell this checkpoint from others without reading its weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for t in sorted(self.tensors.values(), key=lambda t: t.name):
            digest.update(f"{t.name} {t.dtype} {t.shape} {t.path.name} {t.offset}\n".encode())
        return digest.hexdigest()[:16]


def _check_folder(path: Path) -> None:
    if path.is_file():
        kind = path.suffix.lstrip(".") or "file"
        hint = "GGUF is not read" if kind == "gguf" else "give the folder that holds it"
        raise CheckpointError(f"{path} is a {kind}, not a checkpoint folder: {hint}")
    if not path.is_dir():
        raise CheckpointError(f"no such folder: {path}")


def _config(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json", "a checkpoint folder has one")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type")
    return config


def _json(path: Path, why: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {why}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {str(error)[:100]}") from error


def _instead(path: Path) -> str:
    for pattern, what in (("*.gguf", "GGUF"), ("*.bin", "PyTorch"), ("*.pth", "PyTorch")):
        if any(path.glob(pattern)):
            return f", only {what} files, which are not read"
    return ""


def _weight_map(path: Path) -> dict[str, str]:
    if not (path / INDEX).exists():
        return {}
    index = _json(path / INDEX, "")
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(f"{path / INDEX} has no weight_map of names to files")
    return weights


def _check_shards(path: Path, files: tuple[Path, ...]) -> None:
    present = {file.name for file in files}
    for name in sorted(set(_weight_map(path).values())):
        if name not in present and not (path / name).exists():
            raise CheckpointError(f"{path / name} is named by the index and missing")


def _check_index(path: Path, tensors: dict[str, Tensor]) -> None:
    present = {t.path.name for t in tensors.values()}
    for name, file in _weight_map(path).items():
        if file in present and (name not in tensors or tensors[name].path.name != file):
            raise CheckpointError(f"tensor {name!r} is not in {file}, where the index puts it")
