"""`--prompt-cache FILE`: a prefix kept between runs, so that it is not read again.

`run` keeps the prompt and `--chat` the conversation, turn by turn. Caches that can be cut back
serve every prompt that begins alike. Recurrent states, full windows and chunks cannot: there the
file serves prompts that begin with all of it, and is kept for them; a prompt that shares at least
half with it makes it the file of what they share.

The MTP head's cache is kept with it and used where the head is the same; otherwise the head
starts without the prefix, which costs acceptance and changes no token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from cache import prompt_file
from cache.prompt_file import Prefix, PromptCacheError

from .budget import Budget
from .errors import UsageError
from .identity import head_identity, identity
from .kv import FULL
from .opened import Opened
from .speculate import Speculation


class PromptCache:
    """The file of one run. tokens: those that it holds now; notes: a chat's messages, or None."""

    def __init__(self, path: Path, opened: Opened):
        """Raises UsageError for a file of another model, and where none could be written."""
        self.path, self._opened = path, opened
        self.tokens: list[int] = []
        self.notes: Any = None
        self._belongs = {
            "model": identity(opened.checkpoint),
            "dtype": str(opened.widen or "stored").split(".")[-1],
        }
        if name := prompt_file.saveable(make_prompt_cache(opened.model)):
            raise UsageError(f"--prompt-cache: {opened.name} has a {name}, which cannot be saved")
        if why := _unwritable(path):
            raise UsageError(f"--prompt-cache {path} cannot be written: {why}")
        if path.exists():
            with _refusing():
                header = prompt_file.peek(path, self._belongs)
            self.tokens, self.notes = header.tokens, header.notes
            self._bits = header.belongs.get("number of KV bits", "")

    def check(self, budget: Budget) -> None:
        """Raises UsageError where the file does not go with what was planned."""
        ours = str(FULL if budget.kv_bits == FULL else budget.kv_bits)
        self._belongs["number of KV bits"] = ours
        if not self.tokens:
            return
        if self._bits != ours:
            raise UsageError(
                f"{self.path} is the prompt cache of other KV bits: {self._bits}, where this run "
                f"has {ours}; --kv-bits {self._bits} uses it"
            )
        if len(self.tokens) > budget.context:
            raise UsageError(
                f"{self.path} holds {len(self.tokens)} tokens and --context is {budget.context}"
            )

    def load(self, model: Any, speculation: Speculation | None) -> list[Any]:
        """The caches; the head goes on where it was. Raises UsageError for a damaged file."""
        with _refusing():
            prefix = prompt_file.load(self.path, self._belongs)
        wanted = [type(one) for one in make_prompt_cache(model)]
        if [type(one) for one in prefix.cache] != wanted:
            raise UsageError(f"{self.path} is the prompt cache of another version of this program")
        self.tokens = prefix.tokens
        if speculation is not None:
            same = prefix.drafting and prefix.drafter == self._head()
            speculation.resume(len(self.tokens), prefix.drafting if same else None)
        return prefix.cache

    def save(
        self,
        cache: Sequence[Any],
        tokens: Sequence[int],
        speculation: Speculation | None,
        notes: Any = None,
    ) -> None:
        """Write the first `tokens` of a conversation, which `cache` holds. Raises UsageError."""
        prefix = Prefix(list(cache), list(tokens), notes)
        if speculation is not None:
            drafter = speculation.drafter
            if prompt_file.saveable(drafter.cache) is None:
                prefix.drafting = drafter.cache, drafter.state
                prefix.drafter = self._head()
        with _refusing():
            prompt_file.save(self.path, prefix, self._belongs)
        self.tokens, self.notes = list(tokens), notes

    def _head(self) -> str:
        return head_identity(self._opened.checkpoint, self._opened.files)


def _unwritable(path: Path) -> str:
    """Why no file can be written there, or nothing where one can."""
    try:
        if path.is_dir():
            return "it is a folder"
        if path.exists() and not path.is_file():
            return "it is no file, but a pipe or a device"
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}"
        handle, aside = prompt_file.beside(path)
        os.close(handle)
        os.unlink(aside)
    except OSError as error:
        return str(error.strerror)
    return ""


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many tokens both begin."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except PromptCacheError as error:
        raise UsageError(str(error)) from error
