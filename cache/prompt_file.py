"""Prompt caches on disk: a prefix that need not be read again.

A safetensors file: every array of every layer's cache, recurrent states included, and a header
that says the format's version, which model the prefix belongs to, its tokens, how the arrays go
together, and a SHA-256 of the arrays' bytes. Written aside, fsynced and renamed. A file that is
cut short, damaged, of another version or of another model is refused with a sentence; nothing
in it is run. Only mlx-lm's cache classes named in KINDS, and ours, are made from it.

    save("prefix.safetensors", cache, tokens, fingerprint)
    cache, tokens = load("prefix.safetensors", fingerprint)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from .attention import install
from .compressed import CompressedKVCache

VERSION = 1
NAME = "moe-streamer prompt cache"
KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        CompressedKVCache,
        mlx_cache.KVCache,
        mlx_cache.RotatingKVCache,
        mlx_cache.QuantizedKVCache,
        mlx_cache.ChunkedKVCache,
        mlx_cache.ArraysCache,
    )
}


class PromptCacheError(Exception):
    """A prompt cache that cannot be used. One sentence."""


def save(path: str | Path, cache: Sequence[Any], tokens: Sequence[int], fingerprint: str) -> None:
    """Write `cache`, which holds `tokens`, to `path`; what was there stays until it is whole.

    fingerprint: names the model and what else the cache depends on. Raises PromptCacheError.
    """
    path = Path(path)
    arrays: dict[str, mx.array] = {}
    layers = [_describe(one, arrays) for one in cache]
    mx.eval(arrays)
    header = {
        "name": NAME,
        "version": VERSION,
        "fingerprint": fingerprint,
        "tokens": list(tokens),
        "layers": layers,
        "sha256": _digest(arrays),
    }
    try:
        handle, aside = tempfile.mkstemp(".safetensors", f".{path.name}.", path.parent)
        os.close(handle)
        try:
            mx.save_safetensors(aside, arrays, {"prompt_cache": json.dumps(header)})
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        raise PromptCacheError(f"{path} cannot be written: {_line(error)}") from error


def load(path: str | Path, fingerprint: str) -> tuple[list[Any], list[int]]:
    """The caches and the tokens that they hold. Raises PromptCacheError."""
    path = Path(path)
    header, arrays = _read(path)
    if header.get("name") != NAME:
        raise PromptCacheError(f"{path} is not a prompt cache")
    if header.get("version") != VERSION:
        raise PromptCacheError(
            f"{path} is a prompt cache of version {header.get('version')}; this is {VERSION}"
        )
    if header.get("fingerprint") != fingerprint:
        raise PromptCacheError(f"{path} is the prompt cache of another model or of other settings")
    if header.get("sha256") != _digest(arrays):
        raise PromptCacheError(f"{path} is damaged: its checksum is not that of its contents")
    install()
    try:
        return [_build(one, arrays) for one in header["layers"]], [int(t) for t in header["tokens"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PromptCacheError(f"{path} is damaged: {_line(error)}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:  # MLX reads lazily: a short file has to be found first
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise PromptCacheError(f"{path} is cut short or not a prompt cache")
            entries = json.loads(file.read(length))
        ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise PromptCacheError(f"{path} is cut short")
        header = json.loads(entries.get("__metadata__", {}).get("prompt_cache", "{}"))
        arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
        mx.eval(arrays)
        return header, arrays
    except FileNotFoundError:
        raise PromptCacheError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PromptCacheError(f"{path} cannot be read: {_line(error)}") from error


def _describe(cache: Any, arrays: dict[str, mx.array]) -> Any:
    """What `_build` needs; arrays go into `arrays`."""
    if isinstance(cache, mlx_cache.CacheList):
        return {"kind": "CacheList", "state": [_describe(one, arrays) for one in cache.caches]}
    kind = type(cache).__name__
    if KINDS.get(kind) is not type(cache) or not hasattr(cache, "state"):
        raise PromptCacheError(f"a {kind} cannot be saved")
    return {"kind": kind, "state": _flat(cache.state, arrays)}


def _flat(value: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, mx.array):
        if value.size == 0:  # safetensors has no use for them
            return {"empty": list(value.shape), "dtype": str(value.dtype).split(".")[-1]}
        name = f"array.{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, list | tuple):
        return {"items": [_flat(v, arrays) for v in value]}
    return {"value": value}


def _build(saved: Any, arrays: dict[str, mx.array]) -> Any:
    if saved["kind"] == "CacheList":
        return mlx_cache.CacheList(*(_build(one, arrays) for one in saved["state"]))
    return KINDS[saved["kind"]].from_state(_whole(saved["state"], arrays))  # type: ignore[attr-defined]


def _whole(saved: Any, arrays: dict[str, mx.array]) -> Any:
    if "array" in saved:
        return arrays[saved["array"]]
    if "empty" in saved:
        return mx.zeros(saved["empty"], getattr(mx, saved["dtype"]))
    if "items" in saved:
        return [_whole(v, arrays) for v in saved["items"]]
    return saved["value"]


def _digest(arrays: dict[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        digest.update(memoryview(flat))  # type: ignore[arg-type]
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
