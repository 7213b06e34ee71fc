"""`--kv-bits`: at how many bits a channel the history in the KV cache is held.

16 leaves mlx-lm's caches as they are, in the type that the model computes in; fewer bits make
those of full attention and of MLA's latents compressed ones, keys and values of every such layer
at the same number of bits (see cache/README.md). `auto` is 16 unless the plan says that the
context does not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Literal

from .errors import UsageError

FULL = 16
CODED = (8, 4, 3.5, 3, 2.5, 2)  # what auto goes through
KVBits = float | Literal["auto"]


def read_bits(text: object) -> KVBits:
    """'auto' or one of the numbers of bits. Raises UsageError."""
    if text == "auto":
        return "auto"
    for bits in (FULL, *CODED):
        if isinstance(text, str | int | float) and str(text).strip() in (str(bits), f"{bits:.1f}"):
            return bits
    known = ", ".join(map(str, (FULL, *CODED)))
    raise UsageError(f"KV bits are auto or one of {known}, not {text!r}")


def bits_option(text: str) -> KVBits:
    """An argparse type."""
    try:
        return read_bits(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def describe(cache: Sequence[Any], full_bits: int) -> dict[str, Any]:
    """The `kv_cache` block of `--stats`; full_bits: of a value in full precision."""
    from mlx_lm.models.cache import CacheList  # options are read without MLX

    from cache.compressed import CompressedKVCache

    flat = [one for c in cache for one in (c.caches if isinstance(c, CacheList) else [c])]
    coded = [c for c in flat if isinstance(c, CompressedKVCache)]
    return {
        "kind": "compressed" if coded else "full" if flat else "none",
        "bits": coded[0].keys.bits if coded else full_bits,
        "bytes": sum(c.nbytes for c in cache),
        "layers": [type(c).__name__ for c in cache],
    }
