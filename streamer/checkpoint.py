"""A checkpoint folder: its configuration and where every tensor lies.

    python -c "from streamer.checkpoint import Checkpoint; print(Checkpoint.open('PATH').nbytes)"

Only config.json, the index and the shards' headers are read, whatever the
size. The shards are those that mlx-lm loads, `model*.safetensors`; files
beside them, such as `mtp.safetensors`, are `side_files`. What the index names
must be there, in whichever file; what it leaves out is loaded all the same.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .header import Tensor, read_header, shown

INDEX = "model.safetensors.index.json"
MOST = 1 << 16  # experts of a layer
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# read by mlx-lm and transformers, which do not say which file stops them
LINK = "its link leads nowhere"
SETTINGS = ("generation_config.json", "tokenizer_config.json", "hf_quant_config.json")


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
        with _collection_paused():
            return cls._open(Path(path))

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        _check_folder(path)
        config = read_config(path)
        for name in SETTINGS:
            if os.path.lexists(path / name):
                _check_end_token(path / name, _object(path / name, LINK))
        index = weight_map(path)
        _check_files(path, index)
        files = tuple(sorted(path.glob("model*.safetensors")))
        if not files:
            raise CheckpointError(f"{path} has no model*.safetensors{_instead(path)}")
        beside = (p for p in path.glob("*.safetensors") if not p.name.startswith("."))
        side_files = tuple(sorted(set(beside) - set(files)))
        headers = {file.name: read_header(file) for file in files}
        tensors = _merge(path, headers)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors")
        _check_index(path, index, headers)
        _check_packing(path, tensors)
        _check_counts(path / "config.json", config, len(tensors))
        return cls(path, config, tensors, files, side_files)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell this checkpoint from others without reading its weights.

        Of the configuration, names, dtypes, shapes, files and offsets; these
        fix the files' sizes, as tensors leave no holes. Equal wherever the folder lies.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for t in sorted(self.tensors.values(), key=lambda t: t.name):
            digest.update(f"{t.name} {t.dtype} {t.shape} {t.path.name} {t.offset}\n".encode())
        return digest.hexdigest()[:16]


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """100,000 new tensors make the collector walk the process: 1.1 s to open, 0.65 without."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _check_folder(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise CheckpointError(f"no such folder: {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        return
    if path.suffix == ".gguf":
        hint = "GGUF is not read, give a folder with config.json and model*.safetensors"
    else:
        hint = f"give the folder that holds it, {path.parent}"
    raise CheckpointError(f"{path} is a file, not a checkpoint folder: {hint}")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises CheckpointError."""
    config = _object(path / "config.json", "a checkpoint folder has one")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CheckpointError(f"{path / 'config.json'} names no model_type")
    _check_end_token(path / "config.json", config)
    return config


def _check_counts(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Of what a model file makes loops of, until memory is full."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, value in part.items():
            if not isinstance(value, int | float):
                continue
            wrong = name.endswith("experts") and value > MOST
            if name == "num_experts_per_tok":
                # none a token would be all of them, by NumPy's rules for ranges
                wrong = value < 0 or (value == 0 and _experts(part) > 0)
            if name in DEPTHS and value > tensors:
                raise CheckpointError(f"{path}: {name} is {value}, and there are {tensors} tensors")
            if wrong:
                raise CheckpointError(f"{path}: {name} is {value}")


def _experts(config: dict[str, Any]) -> float:
    """The most of a layer that a configuration names; 0 of a dense model."""
    named = (n for name, n in config.items() if name.endswith("experts"))
    return max((n for n in named if isinstance(n, int | float)), default=0)


def _check_end_token(path: Path, settings: dict[str, Any]) -> None:
    tokens = settings.get("eos_token_id")
    if any(type(t) is not int for t in (tokens if isinstance(tokens, list) else [tokens or 0])):
        raise CheckpointError(
            f"{path}: eos_token_id is {json.dumps(tokens)[:60]}, not a token's number or a list"
        )


def _object(path: Path, why: str) -> dict[str, Any]:
    found = _json(path, why)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


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


def weight_map(path: Path) -> dict[str, str]:
    """File names by tensor name, empty where there is no index. Raises CheckpointError."""
    if not os.path.lexists(path / INDEX):
        return {}
    index = _json(path / INDEX, LINK)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(file, str) and file.isprintable() for file in weights.values()
    ):
        raise CheckpointError(f"{path / INDEX} has no weight_map of names to files")
    return weights


def _check_files(path: Path, index: dict[str, str]) -> None:
    try:
        missing = sorted(set(index.values()) - set(os.listdir(path)))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{path / missing[0]} is named by the index and missing{more}")


def _merge(path: Path, headers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                first = tensors[name].path.name
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} stands in both {first} and {file}"
                )
            tensors[name] = tensor
    return tensors


def _check_packing(path: Path, tensors: dict[str, Tensor]) -> None:
    packed = (n for n in tensors if n.endswith(".qweight") and ".experts." in n)
    if name := min(packed, default=None):
        raise CheckpointError(
            f"{path}: {shown(name)} is packed by AWQ or GPTQ, which mlx-lm does not read in "
            "experts; use a conversion made for MLX, or the unquantized model"
        )


def _check_index(path: Path, index: dict[str, str], headers: dict[str, dict[str, Tensor]]) -> None:
    """`headers` by file name; side files that the index names are read too."""
    held = headers | {
        file: read_header(path / file) for file in set(index.values()) - headers.keys()
    }
    for name, file in index.items():
        if name not in held[file]:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is not in {file}, where the index puts it"
            )
