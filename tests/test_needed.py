"""A Python without the packages that we need: one line, exit code 2, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamer.needed import PACKAGES, told

DEMO = Path(__file__).resolve().parents[1] / "streamer" / "demo"
# read by every Python that starts, children included
LACKING = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder())
"""


def run(
    folder: Path, module: str, arguments: list[str], lacking: list[str]
) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(LACKING.format(lacking=lacking))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("lacking", [["mlx"], ["mlx_lm"], list(PACKAGES)], ids=["mlx", "lm", "all"])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("run", ["--prompt", "x"]),
        ("plan", []),
        ("profile", ["--json", "/dev/null"]),
        ("bench", []),
        ("convert", [str(DEMO), "/dev/null/there"]),
    ],
)
def test_one_line_says_what_to_do(
    tmp_path: Path, command: str, arguments: list[str], lacking: list[str]
) -> None:
    for module, given in ((f"streamer.{command}", arguments), ("streamer", [command, *arguments])):
        done = run(tmp_path, module, given, lacking)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: this Python has no ")
        assert f"{sys.executable} -m pip install" in done.stderr


@pytest.mark.smoke
def test_help_needs_none(tmp_path: Path) -> None:
    for module, arguments in (("streamer", ["--help"]), ("streamer.run", ["--help"])):
        done = run(tmp_path, module, arguments, list(PACKAGES))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert "usage" in done.stdout


@pytest.mark.smoke
def test_other_errors_are_not_taken_for_it() -> None:
    assert told(ModuleNotFoundError("No module named 'spam'", name="spam")) is None
    assert told(ValueError("mlx")) is None
    wheel = ImportError("libmlx.so: cannot open shared object file", name="mlx.core")
    assert "cannot import mlx: libmlx.so" in (told(wheel) or "")
