"""Test-wide settings (no network, quiet) and the package as pip installs it."""

from __future__ import annotations

import contextlib
import email
import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["STREAMER_HEAT"] = "off"  # what one test leaves must not be there for the next
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side: not all cores for each
    os.environ.setdefault("STREAMER_THREADS", "2")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it in the background,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for every process begun by a test

with contextlib.suppress(ImportError):  # before anything takes Python's own distutils,
    importlib.import_module("setuptools")  # whose it is from then on

from kernels import fast, latent

for family in latent.MODELS:  # whose attention is replaced once their modules are there
    importlib.import_module(f"mlx_lm.models.{family}")
fast.install()  # as loading does: references by mlx-lm alone are computed with the same products

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built offline from a copy, so that no build folder is left."""
    missing = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"building a wheel needs {' and '.join(missing)}")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building a wheel needs setuptools 77")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all that run side by side
        shared = shared.parent
    folder = shared / "wheel"
    with open(shared / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
            shutil.copytree(ROOT, folder / "source", ignore=ignored, dirs_exist_ok=True)
            offline = ("--no-deps", "--no-index", "--no-build-isolation")
            pip("wheel", *offline, "-w", folder, folder / "source")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages, for PYTHONPATH, with the wheel in it and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the family that runs in segments, in 4 bits. Not to be changed."""
    from families import make_tiny

    folder = tmp_path_factory.mktemp("tiny_qwen") / "model"
    return make_tiny("qwen3_5_moe", folder, quantization={"bits": 4, "group_size": 32})


def pip(*arguments: str | Path) -> None:
    argv = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def link_requirements(wheel: zipfile.ZipFile, site: Path) -> None:
    """Links in `site` to the distributions that the wheel asks for, and that those ask for."""
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = email.message_from_bytes(wheel.read(info)).get_all("Requires-Dist", [])
    todo = [(text, "") for text in asked]
    seen = set()
    while todo:
        text, extra = todo.pop()
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not wanted or text in seen:
            continue
        seen.add(text)
        found = importlib.metadata.distribution(requirement.name)
        todo += [(t, e) for t in found.requires or [] for e in (requirement.extras or {""})]
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
