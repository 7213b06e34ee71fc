"""A Python without MLX, or another package that we need: one line and exit code 2.

Commands import what they need when they need it, so that `--help` and wrong options are answered
without. What is not there by then is told as any error is, wherever it was imported: within a
command (`told`), or by `python -m streamer.COMMAND` before its `main`.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from types import TracebackType

from .interrupted import is_command

PACKAGES = ("mlx", "mlx_lm", "numpy", "psutil", "rich", "safetensors", "huggingface_hub")
CODE = 2


def told(error: BaseException) -> str | None:
    """What to do, in a line, where one of our packages could not be imported; else None."""
    if not isinstance(error, ImportError):
        return None
    name = (error.name or "").split(".")[0]
    if name not in PACKAGES and "libmlx" not in str(error):
        return None
    absent = isinstance(error, ModuleNotFoundError) and error.name == name
    what = (
        f"has no {name.replace('_', '-')}" if absent else f"cannot import {name or 'mlx'}: {error}"
    )
    return (
        f"this Python {what}; run the one that streamer was installed for, or install what it "
        f"needs: {installing()}"
    )


def installing(extra: str = "") -> str:
    """The command that installs us for this Python, with `[extra]`."""
    root = Path(__file__).resolve().parent.parent
    here = str(root) if (root / "pyproject.toml").exists() else "moe-streamer"
    return f"{sys.executable or 'python3'} -m pip install {shlex.quote(here + extra)}"


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if line := told(error):
        print("error:", " ".join(line.split()), file=sys.stderr, flush=True)
        os._exit(CODE)  # an exception that nobody caught would end with 1
    sys.__excepthook__(kind, error, trace)


if is_command(sys.orig_argv):
    sys.excepthook = _hook
