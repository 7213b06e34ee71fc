"""Turn what the user names into a folder: a path as it is, a repository by download.

    python -c "from streamer.hub import resolve; print(resolve('OWNER/NAME'))"

Without a network the cache answers, or an error within PATIENCE seconds. No
setting of huggingface_hub does that: its first request has no timeout, whatever
HF_HUB_ETAG_TIMEOUT says, and a name server's silence falls under none. So the
hub is asked once beforehand, in a thread that is not waited for longer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm, validate_repo_id

from .checkpoint import weight_map
from .errors import CheckpointError

PATIENCE = 10.0  # seconds
PATTERNS = [
    "*.json", "model*.safetensors", "mtp*.safetensors", "*.jinja", "*.txt", "*.tiktoken",
    "tokenizer.model", "tiktoken.model",
]  # fmt: skip


def missing(folder: Path) -> list[str]:
    """Files that the index of `folder` names and that are not there."""
    return sorted(set(weight_map(folder).values()) - set(os.listdir(folder)))


def resolve(
    model: str,
    patterns: list[str] = PATTERNS,
    more: Callable[[Path], list[str]] = missing,
) -> Path:
    """The checkpoint folder of a local path or `owner/name[@revision]`.

    A repository is fetched into the hub's cache, only what is needed: files like
    `patterns`, then those that `more` asks for when it sees them. Files that an
    earlier fetch finished are kept, one cut in the middle starts again (hub 2.x).
    Raises CheckpointError.
    """
    path = os.path.expanduser(model)
    if os.path.exists(path):
        return Path(path)
    name, at, revision = model.partition("@")
    if not _is_repository(name) or (at and not revision):
        raise CheckpointError(f"no such folder: {model or 'the name is empty'}")
    return _fetch(model, name, revision or None, patterns, more)


def called(folder: Path) -> str:
    """The name that leads to `folder`: of its repository where it lies in the hub's cache."""
    *_, repository, kind, _ = ("", "", *folder.absolute().parts)
    parts = repository.split("--")
    return "/".join(parts[1:]) if (kind, parts[0]) == ("snapshots", "models") else str(folder)


class _TerminalBar(tqdm):
    """The hub's bars, none of which is drawn into a file or a pipe."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("disable", None)
        super().__init__(*args, **kwargs)


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _fetch(
    model: str,
    name: str,
    revision: str | None,
    patterns: list[str],
    more: Callable[[Path], list[str]],
) -> Path:
    unreachable = _unreachable(name, revision)

    def snapshot(patterns: list[str]) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=unreachable is not None,
            tqdm_class=_TerminalBar,
        )
        return Path(folder)

    try:
        folder = snapshot(patterns)
        named = more(folder)
        return snapshot([escape(file) for file in named]) if named else folder
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(f"{model} asks for a licence to be accepted on the hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is neither a folder here nor a repository that the hub shows you"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        partly = hasattr(error, "snapshot_path")
        where = "only partly" if partly else "neither a folder here nor"
        raise CheckpointError(
            f"{model} is {where} in the local cache, and the hub cannot be reached: "
            f"{unreachable or _line(error)}"
        ) from error
    except Exception as error:  # httpx, OSError: the network has many ways to fail
        raise CheckpointError(f"{model} could not be fetched: {_line(error)}") from error


def _unreachable(name: str, revision: str | None) -> str | None:
    """Why the hub does not answer; None where it does, be it with a refusal."""
    answer: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(name, revision=revision, timeout=PATIENCE)
            answer.append(None)
        except HfHubHTTPError:
            answer.append(None)
        except Exception as error:
            answer.append(_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else f"no answer within {PATIENCE:g} seconds"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
