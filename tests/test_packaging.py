"""The wheel: what it holds, and that it works installed, away from the checkout."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import link_requirements, pip
from families import make_tiny

import streamer
from streamer.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"streamer", "mtp", "cache", "kernels"}


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel and what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    link_requirements(zipfile.ZipFile(wheel), next(folder.glob("lib/python*/site-packages")))
    return folder


def run(fresh: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed console script."""
    return subprocess.run(
        [fresh / "bin" / "streamer", *arguments],
        cwd=cwd,
        env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


# The checkout


@pytest.mark.smoke
def test_the_readme_and_ci_set_up_with_the_same_command() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == commands[1]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.smoke
def test_the_readme_begins_with_the_main_job_on_the_demo() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "streamer.run --memory" in commands[0] and "--model" not in commands[0]
    assert (ROOT / "streamer" / "demo" / "config.json").exists()


# The wheel


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel: Path) -> None:
    inside = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.startswith("kernels/native.")  # tests/test_kernels_build.py
    }
    info = {name for name in inside if ".dist-info/" in name}
    assert {name.split("/")[0] for name in inside - info} == PACKAGES
    tracked = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
        if not path.name.startswith("native.")
    }
    assert inside - info == tracked
    assert {"streamer/demo/config.json", "streamer/demo/model.safetensors"} <= inside


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"moe_streamer-{streamer.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Version"] == streamer.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {streamer.__version__}" in changes


# Installed


def test_the_demo_runs_from_another_folder(fresh: Path, tmp_path: Path) -> None:
    done = run(
        fresh, tmp_path,
        "run", "--memory", "50%", "--prompt", "def ", "--max-tokens", "8", "--stats", "stats.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["generated_tokens"] == 8
    assert stats["experts"]["slots"] < stats["experts"]["total"]


def test_a_checkpoint_is_named_relative_to_where_one_is(fresh: Path, tmp_path: Path) -> None:
    make_tiny("qwen3_moe", tmp_path / "tiny")
    done = run(
        fresh, tmp_path, "run", "--model", "tiny", "--memory", "min", "--prompt", "a",
        "--max-tokens", "4", "--stats", "stats.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "stats.json").read_text())["tokens"]) == 4


def test_the_installed_package_is_the_one_that_ran(fresh: Path, tmp_path: Path) -> None:
    script = "import streamer, mtp, cache; print(streamer.__file__, mtp.__file__, cache.__file__)"
    done = subprocess.run(
        [fresh / "bin" / "python", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(file).is_relative_to(fresh) for file in done.stdout.split())


def test_importing_loads_nothing_until_load_is_used(fresh: Path, tmp_path: Path) -> None:
    script = """
import sys
import streamer
print(sorted({"mlx", "mlx_lm", "numpy", "transformers"} & set(sys.modules)))
print(streamer.load.__module__, "mlx" in sys.modules)
"""
    done = subprocess.run(
        [fresh / "bin" / "python", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\nstreamer.loading True\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command: str, fresh: Path, tmp_path: Path) -> None:
    done = run(fresh, tmp_path, command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: streamer {command}")


def test_the_script_names_its_commands_and_refuses_others(fresh: Path, tmp_path: Path) -> None:
    listed = run(fresh, tmp_path, "--help").stdout
    assert all(command in listed for command in COMMANDS)
    for arguments in ([], ["walk"]):
        done = run(fresh, tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
