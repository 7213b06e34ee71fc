"""`--prompt-cache`: written, reused, refused; what follows is as if nothing had been saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from families import make_tiny
from mlx_lm.models.cache import ChunkedKVCache, can_trim_prompt_cache

from cache import prompt_file
from cache.prompt_file import PromptCacheError, peek
from streamer import run
from streamer.identity import identity
from streamer.opened import open_model
from streamer.run import DEMO, parser
from streamer.session import open_session

TEXT = "import os\nimport sys\n\n\ndef main(argv=None):\n    parser = ArgumentParser()\n" * 8
# can be cut back; cannot: gated delta nets, a rotating window; latents; a list of caches
KINDS = ["qwen3_moe", "qwen3_5_moe", "afmoe", "deepseek_v3", "deepseek_v32"]


def session_for(model: Path, *options: str) -> Any:
    argv = ["--model", str(model), "--prompt", "x", "--memory", "50%", "--max-tokens", "12"]
    return open_session(parser().parse_args([*argv, *options]), "x", DEMO)


def reply(session: Any, tokens: list[int]) -> list[int]:
    list(session.reply(tokens, lambda done, total: None))
    return list(session.tokens)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param) / "m")


@pytest.mark.parametrize("bits", ["16", "3.5"])
def test_a_prefix_is_read_once(model: Path, bits: str, tmp_path: Path) -> None:
    file = str(tmp_path / "p")
    options = ("--context", "600", "--kv-bits", bits)
    fresh = session_for(model, *options)
    text = [int(t) % 250 for t in fresh.tokenizer.encode("a prefix to read once, " * 12)]
    first, second, third = [*text, 7, 8, 9], text + [1, 2] * 9, text + [3, 4] * 7
    files = ("--prompt-cache", file)

    def ask(tokens: list[int]) -> tuple[list[int], int, int]:
        session = session_for(model, *options, *files)
        out = reply(session, tokens)
        return out, session.reused, len(session.kept.tokens)

    out, reused, held = ask(first)
    assert (reused, held) == (0, len(first) - 1)
    assert out == reply(fresh, first)
    again, reused, held = ask(first)  # nothing but the last token is read
    assert again == out and reused == held == len(first) - 1
    trims = can_trim_prompt_cache(fresh._cache)
    # another question: cut back where that is possible; otherwise the file becomes what is shared
    want = reply(session_for(model, *options), second)
    out, reused, held = ask(second)
    assert (reused, held) == ((len(text), len(second) - 1) if trims else (0, len(text)))
    got, reused, held = ask(third)
    assert reused == len(text)
    assert held == (len(third) - 1 if trims else len(text))
    if bits == "16":  # what is coded depends on where passes began
        assert out == want and got == reply(session_for(model, *options), third)


def test_chunked_caches_are_cut_back_within_a_chunk(tmp_path: Path) -> None:
    """llama4: the rows before a chunk's first are gone, whatever mlx-lm says of its cache."""
    model, options = make_tiny("llama4", tmp_path / "m"), ("--context", "600")
    session, text = session_for(model, *options), list(range(3, 203))  # chunks have 16 tokens
    whole = text + reply(session, text)
    # 208 begins a chunk; then rows up to 204 are gone; a chunk that is not full has all of its own
    for tokens, reused in ((whole[:210], 209), (whole[:206], 0), (text[:3], 0), ([3, 4, 9], 2)):
        assert reply(session, tokens) == reply(session_for(model, *options), tokens)
        assert session.reused == reused
    options = (*options, "--prompt-cache", str(tmp_path / "p"))
    # the file becomes what is shared, and is kept for that
    for last, reused, held in ((1, 0, 199), (2, 0, 130), (3, 130, 130), (4, 130, 130)):
        tokens = text[:130] + [last] * 70
        session = session_for(model, *options)
        assert reply(session, tokens) == reply(session_for(model, *options[:2]), tokens)
        assert (session.reused, len(session.kept.tokens)) == (reused, held)


def test_mlx_lm_would_cut_a_chunk_back_to_rows_it_dropped() -> None:
    # fails when its answer is right: then the session asks no more than that
    cache = ChunkedKVCache(16)
    for _ in range(3):
        cache.maybe_trim_front()
        cache.update_and_fetch(mx.zeros((1, 1, 16, 8)), mx.zeros((1, 1, 16, 8)))
    assert cache.start_position > 0 and cache.is_trimmable()


def test_a_penalty_is_for_the_prefix_too(tmp_path: Path) -> None:
    options = ("--context", "900", "--repetition-penalty", "1.8")
    fresh = session_for(DEMO, *options)
    tokens = fresh.tokenizer.encode(TEXT)
    answer = reply(fresh, tokens)
    options = (*options, "--prompt-cache", str(tmp_path / "p"))
    assert reply(session_for(DEMO, *options), tokens) == answer
    again = session_for(DEMO, *options)
    assert reply(again, tokens) == answer and again.reused == len(tokens) - 1


def test_coded_prefixes_are_as_they_were_in_memory(model: Path, tmp_path: Path) -> None:
    options = ("--context", "600", "--kv-bits", "2.5")
    whole = session_for(model, *options, "--chat", "--prompt-cache", str(tmp_path / "p"))
    tokens = [int(t) % 250 for t in whole.tokenizer.encode("a prefix to read once, " * 12)]
    tokens += reply(whole, tokens)
    whole.save_chat([])
    later = session_for(model, *options, "--chat", "--prompt-cache", str(tmp_path / "p"))
    for more in ([5, 6, 7] * 30, [8, 9], [10]):
        tokens += more
        answer = reply(whole, tokens)
        assert reply(later, tokens) == answer and later.reused == whole.reused > 200
        tokens += answer


@pytest.mark.parametrize("bits", ["16", "3.5"])
def test_the_head_goes_on_where_it_was(bits: str, tmp_path: Path) -> None:
    options = ("--context", "900", "--kv-bits", bits, "--mtp", "3")
    files = ("--chat", "--prompt-cache", str(tmp_path / "p"), "--max-tokens", "40")
    whole = session_for(DEMO, *options, *files)
    tokens = whole.tokenizer.encode(TEXT)
    tokens += reply(whole, tokens)
    whole.save_chat([])
    later = session_for(DEMO, *options, *files)
    drafter = later.speculation.drafter
    assert drafter.rows == len(later.kept.tokens) == whole.speculation.drafter.rows
    assert drafter.cache[0].offset == whole.speculation.drafter.cache[0].offset > 100
    tokens += whole.tokenizer.encode("\n\nclass A:\n    ")
    before = whole.drafts.drafted, whole.drafts.accepted
    answer = reply(whole, tokens)
    assert reply(later, tokens) == answer
    drafted, accepted = later.drafts.drafted, later.drafts.accepted
    assert (before[0] + drafted, before[1] + accepted) == (
        whole.drafts.drafted,
        whole.drafts.accepted,
    )
    headless = session_for(DEMO, *options[:4], *files)
    assert reply(headless, tokens) == answer


def test_a_head_that_was_not_there_starts_without(tmp_path: Path) -> None:
    file = ("--prompt-cache", str(tmp_path / "p"), "--context", "900", "--max-tokens", "40")
    plain = session_for(DEMO, *file)
    tokens = plain.tokenizer.encode(TEXT)
    answer = reply(plain, tokens)
    later = session_for(DEMO, *file, "--mtp", "2")
    assert later.speculation.drafter.rows == len(tokens) - 1
    assert reply(later, tokens) == answer and later.reused == len(tokens) - 1
    assert later.drafts.accepted > 0
    edited = tokens[:200] + tokens[100:140]
    assert reply(later, edited) == reply(session_for(DEMO, *file[2:]), edited)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run.main(list(argv)) == 2
    out, err = capsys.readouterr()
    lines = [x for x in err.strip().splitlines() if ": budget " not in x]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


def test_what_does_not_belong_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = (make_tiny("qwen3_moe", tmp_path / name, seed=seed) for name, seed in
                    (("a", 0), ("b", 1)))  # fmt: skip
    file = tmp_path / "p"
    prompt = ["--raw", "--prompt", "one two three " * 20, "--max-tokens", "2"]
    argv = ["--model", str(model), *prompt, "--prompt-cache", str(file), "--memory", "50%"]
    assert run.main([*argv, "--kv-bits", "3.5"]) == 0
    capsys.readouterr()
    assert "--kv-bits 3.5 uses it" in refused(capsys, *argv)
    assert "another model" in refused(capsys, "--model", str(other), *argv[2:], "--kv-bits", "3.5")
    assert "another dtype" in refused(capsys, *argv, "--kv-bits", "3.5", "--dtype", "stored")
    argv += ["--kv-bits", "3.5"]
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert str(file) in refused(capsys, *argv)
    damaged = bytearray(whole)
    damaged[-300] ^= 1
    file.write_bytes(damaged)
    assert "checksum" in refused(capsys, *argv)
    file.write_text("not a cache")
    refused(capsys, *argv)
    file.write_bytes(whole)
    assert "--context is 50" in refused(
        capsys, *argv[:2], "--prompt", "x", *argv[5:], "--context", "50"
    )
    assert run.main([*argv]) == 0
    capsys.readouterr()
    argv[argv.index("--prompt-cache") + 1] = str(tmp_path)
    assert "cannot be written" in refused(capsys, *argv)
    argv[argv.index("--prompt-cache") + 1] = str(tmp_path / "no" / "p")
    assert "cannot be written" in refused(capsys, *argv)
    os.mkfifo(tmp_path / "pipe")
    argv[argv.index("--prompt-cache") + 1] = str(tmp_path / "pipe")
    assert "a pipe or a device" in refused(capsys, *argv)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "p", "pipe"]


def test_a_full_disk_loses_no_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.json"
    argv = ["--prompt", TEXT, "--memory", "50%", "--max-tokens", "12", "--stats", str(stats)]
    assert run.main(argv) == 0
    expected = capsys.readouterr().out

    def full(*_: Any) -> None:
        raise PromptCacheError("the disk is full")

    monkeypatch.setattr(prompt_file, "save", full)
    stats.unlink()
    assert run.main([*argv, "--prompt-cache", str(tmp_path / "p")]) == 2
    out, err = capsys.readouterr()
    assert out == expected and err.splitlines()[-1] == "error: the disk is full"
    assert json.loads(stats.read_text())["prompt_cache"]["held_tokens"] == 0


def test_caches_of_a_model_s_own_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_tiny("deepseek_v41", tmp_path / "m")
    message = refused(capsys, "--model", str(path), "--prompt", "x", "--prompt-cache", "p")
    assert "LayerCache, which cannot be saved" in message


def chat(file: Path, text: str, *options: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "streamer.run", "--chat", "--memory", "50%", *options]
    command += ["--max-tokens", "8", "--prompt-cache", str(file)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_conversation_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = tmp_path / "s.json"
    together, _ = chat(tmp_path / "a", "import os\nclass A\ndef f(\n", "--kv-bits", "4")
    one, _ = chat(tmp_path / "b", "import os\nclass A\n", "--kv-bits", "4")
    two, err = chat(tmp_path / "b", "def f(\n", "--kv-bits", "4", "--stats", str(stats))
    assert one + two == together
    assert "a conversation of 2 turns" in err
    got = json.loads(stats.read_text())["prompt_cache"]
    assert 0 < got["reused_tokens"] < got["held_tokens"]
    assert peek(tmp_path / "a", {}).tokens == peek(tmp_path / "b", {}).tokens
    other = ["--chat", "--system", "else", "--prompt-cache", str(tmp_path / "b"), "--kv-bits", "4"]
    assert "another --system" in refused(capsys, *other)
    argv = ["--prompt", "x", "--prompt-cache", str(tmp_path / "b"), "--kv-bits", "4"]
    assert "--chat goes on" in refused(capsys, *argv)
    assert "--chat goes on" in refused(capsys, *argv, "--context", "900")
    argv = ["--prompt-cache", str(tmp_path / "c"), "--kv-bits", "4"]
    assert run.main([*argv, "--prompt", "import os", "--max-tokens", "1"]) == 0
    capsys.readouterr()
    prompt = (tmp_path / "c").read_bytes()
    assert "a prompt, which --chat would replace" in refused(capsys, "--chat", *argv)
    assert (tmp_path / "c").read_bytes() == prompt


def test_the_budget_holds_while_it_is_written_and_read(tmp_path: Path) -> None:
    changes = {"num_key_value_heads": 4, "head_dim": 256}  # 24 kB a token: 48 MB
    path, stats = make_tiny("qwen3_moe", tmp_path / "m", changes=changes), tmp_path / "s.json"
    command = [sys.executable, "-m", "streamer.run", "--model", str(path), "--raw", "--memory"]
    command += ["min", "--prompt", "some words to read first, " * 77, "--max-tokens", "20"]
    command += ["--stats", str(stats), "--prompt-cache", str(tmp_path / "p")]
    # what compiles modules leaves more of the heap free at its end
    fresh = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "none")}
    fresh["PYTHONDONTWRITEBYTECODE"] = "1"
    for reused in (False, True):
        subprocess.run(command, capture_output=True, check=True, env=fresh)
        got = json.loads(stats.read_text())
        assert got["peak_bytes"] <= got["budget_bytes"]
        assert bool(got["prompt_cache"]["reused_tokens"]) == reused
        assert got["kv_cache"]["bytes"] > 44e6


def test_fine_tunes_have_names_of_their_own(tmp_path: Path) -> None:
    a, b = (make_tiny("qwen3_moe", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    names = [open_model(path).checkpoint for path in (a, b)]
    assert names[0].fingerprint == names[1].fingerprint
    assert identity(names[0]) != identity(names[1])
    moved = shutil.copytree(a, tmp_path / "moved")
    assert identity(open_model(moved).checkpoint) == identity(names[0])
