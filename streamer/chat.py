"""A conversation in the terminal, with line editing and history.

The model's chat template makes the prompt; what the KV cache already holds is
not computed again, nor is what --prompt-cache kept of an earlier conversation,
which goes on. /reset starts over, /exit or end of file leaves, Ctrl-C ends a
reply.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from .console import as_utf8, say, write_json
from .errors import UsageError
from .heat import cache_folder
from .session import Session, chat_tokens


def converse(session: Session, args: argparse.Namespace) -> int:
    """Read turns until end of file. Raises UsageError without a chat template, or room."""
    from .run import print_reply

    if not session.tokenizer.has_chat_template:
        raise UsageError("this model has no chat template; use --prompt")
    if args.max_tokens >= session.streamer.budget.context:
        raise UsageError(
            f"--max-tokens {args.max_tokens} leaves no room for a turn within the planned "
            f"{session.streamer.budget.context} tokens; give less, or a larger --context"
        )
    if sys.stdin.isatty():
        say("/reset starts over, /exit or Ctrl-D leaves, Ctrl-C ends a reply")
    with _line_editing():
        messages = _resume(session, args) or _start(args)
        while (line := _ask()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = _start(args)
                continue
            if not line.strip():
                continue
            line = as_utf8(line, "the line")
            messages.append({"role": "user", "content": line})
            tokens = chat_tokens(session.tokenizer, messages)
            if len(tokens) + args.max_tokens > session.streamer.budget.context:
                messages.pop()
                say(
                    f"this turn would pass the planned {session.streamer.budget.context} tokens; "
                    "/reset, or start with a larger --context"
                )
                continue
            text = print_reply(session, tokens, live=args.live)
            print(flush=True)
            say(session.closing())
            messages.append({"role": "assistant", "content": text})
            session.save_chat(messages)
    if args.stats:
        write_json(args.stats, session.stats())
    return 0


def _start(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _resume(session: Session, args: argparse.Namespace) -> list[dict[str, str]] | None:
    """The conversation in the prompt cache, if there is one. Raises UsageError."""
    kept = session.kept
    if kept is None or kept.notes is None:
        return None
    messages = list(kept.notes)
    if args.system and messages[:1] != _start(args):
        raise UsageError(f"the conversation in {kept.path} has another --system; leave it out")
    turns = sum(message["role"] == "user" for message in messages)
    say(f"{kept.path}: a conversation of {turns} turns, {len(kept.tokens)} tokens, goes on")
    return messages


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeError:  # where the locale's decoder is strict
        raise UsageError("the line is not UTF-8") from None
    except KeyboardInterrupt:
        print()
        return "/exit"


@contextlib.contextmanager
def _line_editing():  # type: ignore[no-untyped-def]
    if not sys.stdin.isatty():
        yield
        return
    import readline

    try:
        history = cache_folder() / "history"
    except RuntimeError:  # a user without a home
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
