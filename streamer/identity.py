"""What tells one model from another of the same shape, without reading its weights.

    python -c "from streamer.identity import identity; print(identity(open_model(path)))"

`Checkpoint.fingerprint` is of names, shapes and places, which fine-tunes share; this adds a few
bytes out of the middle of tensors all over the files. 100,000 tensors cost no more than SAMPLES.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .header import Tensor, read_header

SAMPLES = 512  # tensors that are looked into, spread evenly over their names
BYTES = 64  # of each


def identity(checkpoint: Checkpoint) -> str:
    """16 hex digits. Raises CheckpointError where a file cannot be read."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    _sample(digest, sorted(checkpoint.tensors.values(), key=lambda t: t.name))
    return digest.hexdigest()[:16]


def head_identity(checkpoint: Checkpoint, files: Sequence[Path]) -> str:
    """Of a model with its MTP head, whose own file is among `files`."""
    digest = hashlib.sha256(identity(checkpoint).encode())
    for file in files:
        if file not in checkpoint.files:
            _sample(digest, sorted(read_header(file).values(), key=lambda t: t.name))
    return digest.hexdigest()[:16]


def _sample(digest: hashlib._Hash, tensors: Sequence[Tensor]) -> None:
    step = max(1, len(tensors) // SAMPLES)
    files: dict[Path, int] = {}
    try:
        for tensor in tensors[::step]:
            if tensor.path not in files:
                files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            count = min(BYTES, tensor.nbytes)
            start = tensor.offset + (tensor.nbytes - count) // 2
            digest.update(tensor.name.encode() + os.pread(files[tensor.path], count, start))
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    finally:
        for file in files.values():
            os.close(file)
