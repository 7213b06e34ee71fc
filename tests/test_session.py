"""A conversation: turns, the cache between them, interruption, pipes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamer import chat, run
from streamer.console import Interrupted
from streamer.engine import Timing
from streamer.run import DEMO, parser
from streamer.session import open_session


def session_for(*options: str) -> Any:
    args = parser().parse_args(["--chat", "--memory", "50%", "--max-tokens", "12", *options])
    return open_session(args, None, DEMO)


def reply(session: Any, tokens: list[int]) -> list[int]:
    list(session.reply(tokens, lambda done, total: None))
    return list(session.tokens)


def test_a_turn_reads_only_what_is_new() -> None:
    session, fresh = session_for(), session_for()
    first = session.tokenizer.encode("import os\n\ndef main(")
    answer = reply(session, first)
    second = first + answer + session.tokenizer.encode("\n\nclass A:\n    ")
    assert reply(session, second) == reply(fresh, second)
    assert session.timing.prompt_tokens < fresh.timing.prompt_tokens == len(second)


@pytest.mark.parametrize("mtp", ["off", "4"])
def test_a_penalty_is_for_what_is_cached_too(mtp: str) -> None:
    options = ("--repetition-penalty", "1.5", "--mtp", mtp)
    session, fresh = session_for(*options), session_for(*options)
    tokens = session.tokenizer.encode("import os\n\ndef main(")
    tokens += reply(session, tokens) + session.tokenizer.encode("\nx")
    assert reply(session, tokens) == reply(fresh, tokens)
    assert session.timing.prompt_tokens < 10


@pytest.mark.parametrize("mtp", ["1", "4", "auto"])
def test_turns_after_rejected_drafts(mtp: str) -> None:
    session, plain = session_for("--mtp", mtp), session_for("--mtp", "off")
    turns = ["import os\n\ndef main(", "\n\nclass A:\n    ", "\nfor x in range(", "\nreturn "]
    tokens: list[int] = []
    for turn in turns:
        tokens += session.tokenizer.encode(turn)
        answer = reply(session, tokens)
        assert answer == reply(plain, tokens)
        tokens += answer
        assert session.timing.cached <= len(tokens)
        assert session.speculation.drafter.rows <= len(tokens)
    assert session.timing.prompt_tokens < 10, "what was cached is not read again"
    if mtp != "auto":
        assert session.drafts.drafted > session.drafts.accepted > 0


@pytest.mark.parametrize("read", range(1, 7))
def test_an_interrupted_block_leaves_a_usable_session(read: int) -> None:
    session, plain = session_for("--mtp", "4"), session_for("--mtp", "off")
    tokens = session.tokenizer.encode("import os\n\ndef main(")
    pieces = session.reply(tokens, lambda done, total: None)
    for _ in range(read):
        next(pieces)
    pieces.close()
    longer = tokens + session.tokens + session.tokenizer.encode("\n\nclass A:")
    assert reply(session, longer) == reply(plain, longer)


def test_an_edited_turn_starts_anew() -> None:
    session, fresh = session_for(), session_for()
    tokens = session.tokenizer.encode("import os\n\ndef main(")
    reply(session, tokens)
    changed = [*tokens[:3], tokens[5], *tokens[3:]]
    assert reply(session, changed) == reply(fresh, changed)


def test_an_interrupted_turn_leaves_a_usable_session() -> None:
    session, fresh = session_for(), session_for()
    tokens = session.tokenizer.encode("import os\n\ndef main(")
    pieces = session.reply(tokens, lambda done, total: None)
    next(pieces)
    next(pieces)
    pieces.close()
    assert reply(session, tokens) == reply(fresh, tokens)


@pytest.mark.smoke
def test_chat_over_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stats = tmp_path / "s.json"
    command = [sys.executable, "-m", "streamer.run", "--chat", "--memory", "50%"]
    command += ["--max-tokens", "8", "--stats", str(stats)]
    done = subprocess.run(
        command,
        input="import os\n/reset\nclass A\n\n/exit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tok/s") == 2
    assert json.loads(stats.read_text())["generated_tokens"] == 8


def test_where_the_history_of_lines_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the user's cache, and nowhere for a user without one."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with chat._line_editing():
        pass
    assert (tmp_path / "streamer" / "history").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with chat._line_editing():
        pass


@pytest.mark.smoke
def test_a_prompt_from_stdin(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamer.run", "--memory", "50%", "--max-tokens", "8"]
    piped = subprocess.run(
        [*command, "--prompt", "-"], input="import ", capture_output=True, text=True, check=True
    )
    given = subprocess.run(
        [*command, "--prompt", "import "], capture_output=True, text=True, check=True
    )
    assert piped.stdout == given.stdout != ""
    assert "\x1b" not in piped.stdout + piped.stderr  # no bars when it is not a terminal


@pytest.mark.parametrize("mtp", ["off", "4"])
def test_a_reply_ends_where_the_context_is_full(
    mtp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "s.json"
    argv = ["--memory", "50%", "--prompt", "def main(", "--mtp", mtp, "--stats", str(stats)]

    def told(*options: str) -> tuple[int, str, list[int]]:
        assert run.main([*argv, *options]) == 0
        got = json.loads(stats.read_text())
        return got["prompt_tokens"], capsys.readouterr().err, got["tokens"]

    prompt, err, tokens = told("--max-tokens", "20")
    assert "ended by" not in err
    for room in (1, 9, 19, 20):
        context = str(prompt + room)
        _, err, cut = told("--max-tokens", "20", "--context", context)
        assert cut == tokens[:room]
        assert (f"\nended by --context {context}: " in err) == (room < 20)


def test_interrupting_ends_the_text_cleanly(tmp_path: Path) -> None:
    stats = tmp_path / "s.json"
    command = [sys.executable, "-m", "streamer.run", "--memory", "50%", "--prompt", "def "]
    process = subprocess.Popen(
        [*command, "--max-tokens", "30000", "--stats", str(stats)],  # for many seconds
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert 0 < json.loads(stats.read_text())["generated_tokens"] < 30000


def test_a_prompt_that_is_interrupted_has_no_first_token() -> None:
    session = session_for()

    def pressed(done: int, total: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        list(session.reply(list(range(1, 40)), pressed))
    assert "0 prompt tokens, 0 tokens, " in session.closing()
    reply(session, [1, 2, 3])
    assert "3 prompt tokens, first token after " in session.closing()


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    command = f"{sys.executable} -m streamer.run --memory 50% --prompt 'def ' | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_seeds_are_respected(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str, *options: str) -> str:
        argv = ["--memory", "50%", "--prompt", "def ", "--max-tokens", "16", *options]
        assert run.main([*argv, "--temp", "1", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1") != sample("2")
    assert sample("1", "--mtp", "3") == sample("1", "--mtp", "off")


def test_seeds_are_respected_in_turns_that_end_early() -> None:
    """What is resident and what drafts change no later turn, though passes are queued ahead."""

    def turns(memory: str, mtp: str, end: int | None = None) -> list[list[int]]:
        options = ("--memory", memory, "--temp", "0.9", "--seed", "5", "--mtp", mtp)
        session = session_for(*options)
        if end is not None:
            session.tokenizer.eos_token_ids = {end}
        texts = map(session.tokenizer.encode, ("import os\n\ndef main(", "class A:\n    "))
        return [reply(session, text) for text in texts]

    end = turns("50%", "off")[0][7]
    expected = turns("50%", "off", end)
    assert len(expected[0]) <= 8
    for memory, mtp in (("100%", "off"), ("50%", "3"), ("100%", "3")):
        assert turns(memory, mtp, end) == expected


def test_timing_of_nothing() -> None:
    assert Timing().decode_rate == 0.0
