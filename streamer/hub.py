"""Turn what the user names into a folder: a path as it is, a repository by download."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import CheckpointError

PATTERNS = [
    "*.json", "model*.safetensors", "mtp*.safetensors", "*.jinja", "*.txt", "*.tiktoken",
    "tokenizer.model",
]  # fmt: skip
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve(model: str) -> Path:
    """The checkpoint folder of a local path or `owner/name[@revision]`.

    A repository is fetched into the hub's cache, only what is needed, going on
    where an earlier fetch stopped. Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not REPOSITORY.fullmatch(model) or model.startswith((".", "/", "~")):
        raise CheckpointError(f"no such folder: {model}")
    name, _, revision = model.partition("@")
    return _fetch(name, revision or None)


def _fetch(name: str, revision: str | None) -> Path:
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError as error:
        raise CheckpointError(f"{name} asks for a licence to be accepted on the hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no repository {name} on the hub") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor in the local cache, and the hub cannot be reached"
        ) from error
    except Exception as error:  # httpx, OSError: the network has many ways to fail
        text = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{name} could not be fetched: {text}") from error
