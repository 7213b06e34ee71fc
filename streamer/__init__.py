"""Run mixture-of-experts language models larger than memory.

    from streamer import load
    model, tokenizer = load("path/or/owner/name", memory="8GB")

`import streamer` loads nothing; `load` and `stream_generate` (mlx_lm's, drafting with the
model's own MTP head) bring in MLX when they are first used.
"""

from __future__ import annotations

from typing import Any

# first: they see to Ctrl-C while the others are imported, and to what cannot be
from . import interrupted, needed  # noqa: F401
from .errors import StreamerError

__version__ = "0.1.0"
__all__ = ["StreamerError", "load", "stream_generate"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .loading import load

        return load
    if name == "stream_generate":
        from .generate import stream_generate

        return stream_generate
    raise AttributeError(f"module 'streamer' has no attribute {name!r}")
