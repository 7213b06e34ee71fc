"""Prompt caches on disk: a prefix that need not be read again.

A safetensors file: every array of every layer's cache, recurrent states included, and a header
that says the format's version, what the prefix belongs to (a model, its bits), its tokens, how the
arrays go together, and a SHA-256 of it all. Written aside, array by array so that
nothing is held twice, fsynced and renamed. A file that is cut short, damaged, of another version
or that belongs to something else is refused with a sentence; nothing in it is run. Only mlx-lm's
cache classes named in KINDS, and ours, are made from it.

    save("prefix.safetensors", Prefix(cache, tokens), {"model": "a"})
    prefix = load("prefix.safetensors", {"model": "a"})
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from .attention import install
from .compressed import CompressedKVCache

VERSION = 4
NAME = "moe-streamer prompt cache"
PIECE = 1 << 20  # bytes of an array that are made contiguous at a time
LONGEST = 100_000_000  # bytes of a header, safetensors' own limit
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
TYPES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.bool_: "BOOL",
    mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.uint32: "U32", mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64",
}  # fmt: skip


class PromptCacheError(Exception):
    """A prompt cache that cannot be used. One sentence."""


@dataclass
class Prefix:
    """What a file holds. cache: mlx-lm's, with the first `tokens` in it.

    notes: anything that JSON can say, the caller's. drafting: caches and arrays of a drafter that
    has followed `tokens`, and drafter: what it belongs to.
    """

    cache: list[Any]
    tokens: list[int]
    notes: Any = None
    drafting: tuple[list[Any], Any] | None = None
    drafter: str = ""


@dataclass(frozen=True)
class Header:
    """What can be said of a file without its arrays."""

    tokens: list[int] = field(repr=False)
    notes: Any
    belongs: dict[str, str]
    nbytes: int


def saveable(cache: Sequence[Any]) -> str | None:
    """The name of a kind of cache in `cache` that cannot be saved, or None."""
    for one in cache:
        if isinstance(one, mlx_cache.CacheList):
            if (name := saveable(one.caches)) is not None:
                return name
        elif KINDS.get(type(one).__name__) is not type(one):
            return type(one).__name__
    return None


def save(path: str | Path, prefix: Prefix, belongs: Mapping[str, str]) -> None:
    """Write `prefix` to `path`; what was there stays until it is whole.

    belongs: names what the cache depends on, by words for people. Raises PromptCacheError.
    """
    path = Path(path)
    arrays: dict[str, mx.array] = {}
    header = {
        "name": NAME,
        "version": VERSION,
        "belongs": dict(belongs),
        "tokens": list(prefix.tokens),
        "notes": prefix.notes,
        "layers": [_describe(one, arrays) for one in prefix.cache],
    }
    if prefix.drafting:
        caches, state = prefix.drafting
        header["drafter"] = prefix.drafter
        header["drafting"] = {
            "caches": [_describe(one, arrays) for one in caches],
            "state": _flat(state, arrays),
        }
    mx.eval(arrays)
    target = Path(os.path.realpath(path))  # a link stays
    try:
        handle, aside = beside(target)
        try:
            with os.fdopen(handle, "wb") as file:
                _write(file, header, arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        raise PromptCacheError(f"{path} cannot be written: {_line(error)}") from error


def beside(path: str | Path) -> tuple[int, str]:
    """A new file to write aside, open, and its path. Raises OSError."""
    folder, name = os.path.split(os.path.realpath(path))
    return tempfile.mkstemp(".partial", f".{name}.", folder)


def peek(path: str | Path, belongs: Mapping[str, str]) -> Header:
    """What `path` says of itself, if it is whole in length and belongs to that.

    Only the names in `belongs` are compared. Raises PromptCacheError.
    """
    path = Path(path)
    header, _, size = _opened(path)
    _check(path, header, belongs)
    try:
        tokens = [int(t) for t in header["tokens"]]
        return Header(tokens, header.get("notes"), header["belongs"], size)
    except (KeyError, TypeError, ValueError) as error:
        raise PromptCacheError(f"{path} is damaged: {_line(error)}") from error


def load(path: str | Path, belongs: Mapping[str, str]) -> Prefix:
    """The prefix. Raises PromptCacheError."""
    path = Path(path)
    header, entries, _ = _opened(path)
    _check(path, header, belongs)
    try:
        arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
        mx.eval(arrays)
        digest = hashlib.sha256()
        for name in entries:
            for part in _pieces(arrays[name]):
                digest.update(part)
        sealed = _sealed(digest, header, entries)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise PromptCacheError(f"{path} cannot be read: {_line(error)}") from error
    if header.get("sha256") != sealed:
        raise PromptCacheError(f"{path} is damaged: its checksum is not that of its contents")
    install()
    try:
        prefix = Prefix(
            [_build(one, arrays) for one in header["layers"]],
            [int(t) for t in header["tokens"]],
            header["notes"],
        )
        if (saved := header.get("drafting")) is not None:
            caches = [_build(one, arrays) for one in saved["caches"]]
            prefix.drafting = caches, _whole(saved["state"], arrays)
            prefix.drafter = str(header["drafter"])
        return prefix
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise PromptCacheError(f"{path} is damaged: {_line(error)}") from error


def _check(path: Path, header: dict[str, Any], belongs: Mapping[str, str]) -> None:
    if header.get("name") != NAME:
        raise PromptCacheError(f"{path} is not a prompt cache")
    if header.get("version") != VERSION:
        raise PromptCacheError(
            f"{path} is a prompt cache of version {_word(header.get('version'))}; this is {VERSION}"
        )
    theirs = header.get("belongs")
    for name, ours in belongs.items():
        other = theirs.get(name) if isinstance(theirs, dict) else None
        if other != ours:
            raise PromptCacheError(
                f"{path} is the prompt cache of another {name}: {_word(other)}, where this one is "
                f"{ours}"
            )


def _write(file: IO[bytes], header: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """The file's text with a place for the checksum, the arrays, and then the checksum."""
    header = {**header, "sha256": "0" * 64}
    entries: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        shape = list(array.shape)
        entries[name] = {"dtype": TYPES[array.dtype], "shape": shape, "data_offsets": [start, end]}
    # the checksum comes last and is of fixed length, so its place is known
    text = json.dumps({**entries, "__metadata__": {"prompt_cache": json.dumps(header)}}).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    digest = hashlib.sha256()
    for array in arrays.values():
        for part in _pieces(array):
            digest.update(part)
            file.write(part)
    file.seek(8 + text.rindex(b"0" * 64))
    file.write(_sealed(digest, header, entries).encode())


def _sealed(digest: Any, header: dict[str, Any], entries: dict[str, Any]) -> str:
    """The checksum of a file: of its arrays' bytes, of their names, types, shapes and places, and
    of its header without it."""
    digest = digest.copy()
    rest = {name: value for name, value in header.items() if name != "sha256"}
    digest.update(json.dumps([entries, rest], sort_keys=True).encode())
    return digest.hexdigest()


def _pieces(array: mx.array) -> Iterator[memoryview]:
    """The bytes of `array` in order, of few of its rows at a time where they lie apart."""
    axis = next((i for i, n in enumerate(array.shape) if n > 1), None)
    if array.nbytes <= PIECE or axis is None:
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        mx.eval(flat)
        yield memoryview(flat)  # type: ignore[arg-type]
        return
    middle = array.shape[axis] // 2
    for part in mx.split(array, [middle], axis=axis):
        yield from _pieces(part)


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(our header, the arrays' entries in order, bytes of the file).

    MLX reads lazily: a file that is too short has to be found first.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST):
                raise PromptCacheError(f"{path} is cut short or not a prompt cache")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        ends = {name: entry["data_offsets"][1] for name, entry in entries.items()}
        wanted = 8 + length + max(ends.values(), default=0)
        if wanted != size:
            how = "cut short" if size < wanted else "too long"
            raise PromptCacheError(f"{path} is {how}: {size} bytes where it names {wanted}")
        header = json.loads(metadata.get("prompt_cache", "{}"))
        if not isinstance(header, dict):
            raise PromptCacheError(f"{path} is not a prompt cache")
        return header, {name: entries[name] for name in sorted(ends, key=ends.__getitem__)}, size
    except FileNotFoundError:
        raise PromptCacheError(f"{path} does not exist") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise PromptCacheError(f"{path} is not a prompt cache: {_line(error)}") from error
    except OSError as error:
        raise PromptCacheError(f"{path} cannot be read: {_line(error)}") from error


def _describe(cache: Any, arrays: dict[str, mx.array]) -> Any:
    """What `_build` needs; arrays go into `arrays`."""
    if isinstance(cache, mlx_cache.CacheList):
        return {"kind": "CacheList", "state": [_describe(one, arrays) for one in cache.caches]}
    if (name := saveable([cache])) is not None:
        raise PromptCacheError(f"a {name} cannot be saved")
    return {"kind": type(cache).__name__, "state": _flat(cache.state, arrays)}


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


def _word(value: Any) -> str:
    """What a file says of itself, on one line."""
    text = str(value)
    return text if text.isprintable() and len(text) < 80 else reprlib.repr(text)


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
