"""Arm's products of rows, compiled for Arm and run: by this CPU or an emulated one.

What it takes to run everything there is in on_arm.py.
"""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = platform.machine().lower() in ("aarch64", "arm64")
COMPILER = "c++" if HERE else "aarch64-linux-gnu-g++"
EMULATOR = [] if HERE else ["qemu-aarch64", "-cpu", "max"]
SETS = ("portable", "neon", "dot", "i8mm")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """arm/products.cpp with the kernels, by setup.py's flags less -O3, which takes a minute."""
    for tool in (COMPILER, *EMULATOR[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(platform, "machine", lambda: "arm64" if HERE else "aarch64")
    flags = runpy.run_path(str(ROOT / "setup.py"))["flags"]
    kernels = ROOT / "kernels" / "cpu"
    sources = [ROOT / "tests" / "arm" / "products.cpp"]
    sources += [kernels / f"{name}.cpp" for name in ("forms", "spread", "minifloats", "workspace")]
    sources += [kernels / f"rows_{name}.cpp" for name in SETS]
    running = []
    for source in sources:
        wanted = [flag for flag in flags(str(source)) if flag != "-O3"]
        output = tmp_path / f"{source.stem}.o"
        command = [COMPILER, *wanted, "-O1", f"-I{kernels}", "-c", source, "-o", output]
        running.append(subprocess.Popen(command))
    assert [each.wait() for each in running] == [0] * len(sources)
    linking = [COMPILER, *tmp_path.glob("*.o"), "-o", tmp_path / "products"]
    subprocess.run(linking if HERE else [*linking, "-static"], check=True)
    return tmp_path / "products"


def test_products_are_right_and_rows_are_alike_in_any_company(program: Path) -> None:
    done = subprocess.run([*EMULATOR, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sets = {line.split()[0] for line in done.stdout.splitlines()}
    assert sets == {"portable", "neon", "dotprod", "i8mm"}
