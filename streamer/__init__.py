"""Run mixture-of-experts language models larger than memory.

    from streamer import load
    model, tokenizer = load("path/or/owner/name", memory="8GB")

`import streamer` loads nothing; `load` brings in MLX when it is first used.
"""

from __future__ import annotations

from typing import Any

from .errors import StreamerError

__version__ = "0.1.0"
__all__ = ["StreamerError", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .loading import load

        return load
    raise AttributeError(f"module 'streamer' has no attribute {name!r}")
