"""Safetensors files being written: which are finished, with their sizes and hashes.

    with Journal(folder, {"source": "..."}) as journal:
        journal.write("a.safetensors", specs, chunks, tick)
        journal.verify(update)

Lives as `.journal.json` in the hidden folder that the files are written to, so
that a job cut short goes on with the next file. A folder belongs to one job and,
while it is open, to one process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from .errors import CheckpointError, UsageError
from .shards import Spec, header

NAME = ".journal.json"
PIECE = 1 << 20  # bytes compared at once


class Journal:
    """done: finished files by name, `{"size": bytes, "sha256": hex}`.

    Raises UsageError when `folder` belongs to another job, or to another
    process, or is not a journal's; OSError when it cannot be written.
    """

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        self._job = job
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open()
        except BlockingIOError:
            self._unlock()
            raise UsageError(f"another process is writing to {folder}") from None
        except BaseException:
            self._unlock()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes on disk that need not be written again."""
        return sum(entry["size"] for entry in self.done.values())

    def write(
        self,
        name: str,
        specs: Sequence[Spec],
        chunks: Iterable[Any],
        tick: Callable[[int], None],
    ) -> None:
        """Write one file from the tensors' bytes in order; `tick` gets the bytes of each chunk."""
        digest = hashlib.sha256()
        with open(self.folder / name, "wb") as file:
            start = header(specs)
            file.write(start)
            digest.update(start)
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                tick(len(chunk))
                del chunk
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        wanted = len(start) + sum(spec.nbytes for spec in specs)
        if size != wanted:
            raise CheckpointError(f"{name} has {size} bytes where {wanted} were announced")
        self.done[name] = {"size": size, "sha256": digest.hexdigest()}
        self._save()

    def verify(self, update: Callable[[int, int, str], None]) -> None:
        """Read every file back. Raises CheckpointError, and forgets a file that differs."""
        total, at = self.nbytes, 0
        for name, entry in list(self.done.items()):
            digest = hashlib.sha256()
            with open(self.folder / name, "rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
                    at += len(piece)
                    update(at, total, "MB")
            if digest.hexdigest() != entry["sha256"]:
                del self.done[name]
                self._save()
                raise CheckpointError(
                    f"{self.folder / name} reads back different from what was written; "
                    "the same command writes it again"
                )

    def forget(self, folder: Path) -> None:
        """Remove the journal from its folder, renamed to `folder` by now."""
        (folder / NAME).unlink()
        for path in (folder, folder.parent):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def drop_if_empty(self) -> None:
        """Leave nothing behind of a job that never wrote a file."""
        if not self.done:
            (self.folder / NAME).unlink()
            self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _unlock(self) -> None:
        os.close(self._lock)

    def _open(self) -> None:
        path = self.folder / NAME
        if not path.exists():
            if any(self.folder.iterdir()):
                raise UsageError(f"{self.folder} holds files of another program; remove it")
            self._save()
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            job, done = found["job"], found["done"]
            if not all(isinstance(entry["sha256"], str) for entry in done.values()):
                raise TypeError
            kept = {name: entry for name, entry in done.items() if self._whole(name, entry["size"])}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is damaged; remove {self.folder}") from error
        if job != self._job:
            raise UsageError(f"{self.folder} holds another conversion, cut short; remove it")
        self.done = kept

    def _whole(self, name: str, size: int) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == size

    def _save(self) -> None:
        aside = self.folder / f"{NAME}.partial"
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"job": self._job, "done": self.done}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.folder / NAME)
