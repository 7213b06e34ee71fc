"""Files written whole or not at all.

    replaced(Path("a.json"), b"{}")

Written aside under a name that no other writer has, synced and renamed. What a link leads to is
written, and the link stays; a pipe or a device is written to, and never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replaced(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Make `path` hold `data`, or what that writes into the file given to it. Raises OSError."""
    aside = beside(path)
    try:
        with open(aside or path, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(file)
            file.flush()
            if aside is not None:
                os.fsync(file.fileno())
        if aside is not None:
            os.replace(aside, os.path.realpath(path))
    except BaseException:
        if aside is not None:
            with contextlib.suppress(OSError):
                aside.unlink()
        raise


def beside(path: Path) -> Path | None:
    """Where to write aside; None for a pipe or a device. Raises IsADirectoryError."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():
        return None
    return target.with_name(f"{target.name}.{os.getpid()}-{threading.get_native_id()}.partial")
