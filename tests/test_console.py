"""What the command lines share: where they write, closed and full streams, warnings, options."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from stores import linux

from streamer import cli, run
from streamer.console import check_writable, command, write_json, write_text
from streamer.errors import UsageError

pytestmark = pytest.mark.smoke


def test_a_file_is_replaced_whole_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "link").symlink_to("a.json")
    for path in (tmp_path / "link", tmp_path / "new"):
        check_writable(path)
        write_json(path, {"a": 1})
        assert path.read_text() == '{\n "a": 1\n}\n'
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link", "new"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "hello")
    reader.join(10)
    assert got == ["hello"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["", "folder", "no/such/file", "a/b"])
def test_where_nothing_can_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_text("a file")
    for act in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(UsageError, match="cannot write"):
            act(tmp_path / name if name else Path(name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str] | None = None) -> int:
        warnings.warn("it is slow", RuntimeWarning, stacklevel=1)
        return 0

    assert main([]) == 0
    assert capsys.readouterr().err == "warning: it is slow\n"


def script(end: str) -> list[str]:
    """A command that prints a line, with streams as the shell's `end` leaves them."""
    code = (
        "import sys; from streamer import console\n"
        "@console.command\n"
        "def main(argv=None):\n"
        "    import tempfile; file = tempfile.TemporaryFile()\n"
        "    print(console.prompt_of('-') if argv else 'text'); console.say('told')\n"
        "    file.seek(0)\n"
        "    return 3 if file.read() else 0\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return ["sh", "-c", f'"$0" -c "$1" {end}', sys.executable, code]


@pytest.mark.parametrize(
    ("end", "code", "out", "err"),
    [
        (">&-", 0, "", "told\n"),
        ("2>&-", 0, "text\n", ""),
        (">&- 2>&- <&-", 0, "", ""),
        ("- <&-", 2, "", "error: the prompt is empty\n"),
        pytest.param(
            ">/dev/full", 2, "", "error: cannot write: No space left on device\n", marks=linux
        ),
    ],
)
def test_streams_that_are_closed_or_full(end: str, code: int, out: str, err: str) -> None:
    done = subprocess.run(script(end), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("module", ["run", "plan", "profile", "bench"])
def test_options_are_read_before_anything_heavy(module: str) -> None:
    """So that `command` comes before transformers, whose import it prepares."""
    code = f"import sys, streamer.{module}; print({{'mlx', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("module", ["streamer.convert", "tools.make_checkpoint"])
def test_transformers_comes_after_what_prepares_its_import(module: str) -> None:
    """Where torch is installed it took 200 MB that were promised to nobody."""
    code = f"import sys, {module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "moe-streamer 0.1.0\n"


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (("--seed", "x"), "'x' is not a whole number"),
        (("--context", "8k"), "'8k' is not a whole number"),
        (("--temp", "x"), "'x' is not a number"),
        (("--max-tokens", "0"), "from 1 to 1073741824"),
        (("--max-tokens", "1" * 400), "from 1 to 1073741824"),
        (("--mtp", "on"), "'on' is none of auto, off and 1 to 8"),
        (("--mtp", "9"), "'9' is none of"),
        (("--heat", "on"), "'on' is none of auto, off and a file"),
        (("--heat", ""), "is none of"),
        (("--model", ""), "the name is empty"),
        (("--memory", "50"), "--memory 50 is in bytes; write 50GB or 50%"),
        (("--memory", "1" * 5000), "is not a memory size"),
        (("--system", "\udcff"), "--system is not UTF-8"),
        (("--guess", "router,oracle"), "no guesser 'oracle'"),
        (("--system", "Be brief."), "--system goes with --chat"),
        (("--stats", ""), "--stats: the name is empty"),
        (("--prompt-cache", ""), "--prompt-cache: the name is empty"),
        (("--prompt-cache", "/"), "it is a folder"),
        (("--prompt-cache", "/no/such/file"), "there is no folder /no/such"),
        (("--prompt-cache", "a" * 300), "cannot be written: File name too long"),
        (("--prompt-cache", "a" * 240), "cannot be written: File name too long"),
    ],
)
def test_options(argv: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--prompt", "x", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and what in err


def test_what_is_hardly_meant_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "def ", "--max-tokens", "1", "--context", "5000"]
    assert run.main([*options, "--memory", "900TB", "--kv-bits", "2"]) == 0
    err = capsys.readouterr().err
    assert "warning: 5000 tokens are planned, the model was made for 4096" in err
    assert "available" not in err  # 900 TB are allowed, not used
    assert "1 token, " in err and "tok/s" not in err


def test_a_chat_in_which_no_turn_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--chat", "--context", "200"]) == 2
    told = "error: --max-tokens 256 leaves no room for a turn within the planned 200 tokens"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
def test_one_line_of_a_chat_that_is_not_utf8(errors: str) -> None:
    """As in the locale C.UTF-8, and as in others, such as en_US.UTF-8."""
    done = subprocess.run(
        [sys.executable, "-m", "streamer.run", "--chat", "--memory", "50%"],
        input=b"\xff\xfe\n",
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.endswith(b"error: the line is not UTF-8\n")
