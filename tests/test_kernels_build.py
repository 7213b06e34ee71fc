"""The extension's build: in the wheel where a compiler is, and an install that works without."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import link_requirements

from kernels import backend

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import mlx.core as mx
import kernels.backend
from kernels.linear import linear, reference
w = mx.quantize(mx.random.normal((24, 64)))
x = mx.random.normal((3, 64))
assert mx.allclose(linear(x, *w), reference(x, *w), rtol=1e-4, atol=1e-4)
linear(x, *w)
print(kernels.backend.describe(), kernels.backend.__file__)
"""


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with what the wheel asks for, and no other copy of our packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    link_requirements(zipfile.ZipFile(wheel), next(folder.glob("lib/python*/site-packages")))
    return folder / "bin" / "python"


def run(python: Path, packages: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [python, "-c", SCRIPT],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(packages), "STREAMER_KERNELS": "on"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(packages) in done.stdout
    return done


def pip(*arguments: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.smoke
def test_the_extension_is_here_where_it_compiles() -> None:
    """The install goes on without it, and hundreds of tests with it."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which("c++") is None or not headers.exists():
        pytest.skip("nothing to compile with")
    if os.environ.get("STREAMER_BUILD_KERNELS") == "off":
        pytest.skip("not wanted")
    importlib.import_module(backend.MODULE)


def test_the_wheel_brings_the_extension_where_it_compiles(
    wheel: Path, site: Path, python: Path, tmp_path: Path
) -> None:
    if shutil.which("c++") is None or importlib.util.find_spec("nanobind") is None:
        pytest.skip("nothing to compile with")
    modules = [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("kernels/native.")]
    assert len(modules) == 1
    done = run(python, site, tmp_path)
    assert "RuntimeWarning" not in done.stderr
    module = backend.native()
    assert module is None or f"kernels: {module.isa()}," in done.stdout


def test_without_a_compiler_the_install_works_and_says_so_once(
    python: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("building a wheel needs pip")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "*.so", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    failing = shutil.which("false") or "false"
    pip(
        "install", "--no-deps", "--no-index", "--no-build-isolation",
        "--target", tmp_path / "site", tmp_path / "source",
        CC=failing, CXX=failing,
    )  # fmt: skip
    assert not list((tmp_path / "site" / "kernels").glob("native.*"))
    done = run(python, tmp_path / "site", tmp_path)
    assert done.stdout.startswith("kernels: MLX's own")
    assert done.stderr.count("RuntimeWarning: CPU kernels are off") == 1


# In an interpreter of its own: whoever imported distutils first decides whose it is.
WITHOUT = """
import importlib, runpy, sys
import setuptools
refusing, folder, setup, has, lacks, *sources = sys.argv[1:]
setuptools.setup = lambda **_: None
script = runpy.run_path(setup)
command = script["BuildKernels"](setuptools.Distribution())
command.compiler = importlib.import_module("distutils.ccompiler").new_compiler()  # setuptools'
command.compiler.set_executables(compiler_so=[refusing], compiler_so_cxx=[refusing])
command.choose_flags()
for source in sources:
    chosen = script["flags"](source)
    assert has in chosen and lacks not in chosen, chosen
    print(*command.compiler.compile([source], folder, extra_postargs=chosen))
"""


@pytest.mark.parametrize(
    "has,lacks,files",
    [
        ("-mavx512vnni", "-mamx-tile", ["rows_amx.cpp", "codes_tiles.cpp"]),
        ("-mavx2", "-mavxvnni", ["rows_avxvnni.cpp"]),
    ],
)
def test_a_set_that_the_compiler_lacks_is_left_out(
    has: str, lacks: str, files: list[str], tmp_path: Path
) -> None:
    if shutil.which("c++") is None or platform.machine() != "x86_64":
        pytest.skip("no x86 compiler")
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("building needs setuptools")
    refusing = tmp_path / "c++"
    refusing.write_text(
        f'#!/bin/sh\nfor a; do case "$a" in {lacks}) exit 1;; esac; done\nexec c++ "$@"\n'
    )
    refusing.chmod(0o755)
    sources = [ROOT / "kernels" / "cpu" / name for name in files]
    arguments = [refusing, tmp_path, ROOT / "setup.py", has, lacks, *sources]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = done.stdout.split()
    assert len(made) == len(sources) and all(Path(each).is_file() for each in made)


# With a compiler that refuses what its first argument says.
ON_ARM = """
import importlib, platform, runpy, sys
import setuptools
setuptools.setup = lambda **_: None
script = runpy.run_path(sys.argv[1])
platform.machine = lambda: "aarch64"
command = script["BuildKernels"](setuptools.Distribution())
command.compiler = importlib.import_module("distutils.ccompiler").new_compiler()
command.compiler.set_executables(compiler_so=[sys.argv[2]], compiler_so_cxx=[sys.argv[2]])
command.choose_flags()
for name in ("rows_dot.cpp", "rows_i8mm.cpp", "rows_neon.cpp"):
    print(*[flag for flag in script["flags"](name) if "march" in flag])
"""


@pytest.mark.parametrize(
    "refused,built",
    [
        ("nothing", ["-march=armv8.2-a+dotprod", "-march=armv8.2-a+dotprod+i8mm", ""]),
        ("*i8mm", ["-march=armv8.2-a+dotprod", "", ""]),
        ("-march*", ["", "", ""]),
    ],
)
def test_what_arms_compiler_has_not_is_left_out(
    tmp_path: Path, refused: str, built: list[str]
) -> None:
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("building needs setuptools")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nfor a; do case "$a" in {refused}) exit 1;; esac; done\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", ON_ARM, ROOT / "setup.py", compiler],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == built, done.stderr


# The platform is only said to be another once everything is imported.
ON_A_MAC = """
import os, platform, runpy, sys, sysconfig
import setuptools
setuptools.setup = lambda **_: None
script = runpy.run_path(sys.argv[1])
platform.machine = lambda: "arm64"
sysconfig.get_config_var = lambda name: sys.argv[2]
script["for_this_mac"]()
print(os.environ["ARCHFLAGS"], os.environ["MACOSX_DEPLOYMENT_TARGET"])
"""


@pytest.mark.parametrize(
    "python,environment,built",
    [
        ("10.13", {}, "-arch arm64 14.0"),
        ("15.0", {}, "-arch arm64 15.0"),
        ("", {"ARCHFLAGS": "-arch x86_64"}, "-arch x86_64 14.0"),
        ("11.0", {"MACOSX_DEPLOYMENT_TARGET": "26.1"}, "-arch arm64 26.1"),
    ],
)
def test_a_mac_builds_for_itself(python: str, environment: dict[str, str], built: str) -> None:
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("building needs setuptools")
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MAC, ROOT / "setup.py", python],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == built, done.stderr


def test_turned_off_it_is_not_missed() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kernels.backend"],
        cwd=ROOT,
        env={**os.environ, "STREAMER_KERNELS": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "kernels: MLX's own\n"), done.stderr


def test_an_unknown_instruction_set_is_named() -> None:
    if not backend.available():
        pytest.skip("the extension is not in use")
    done = subprocess.run(
        [sys.executable, "-m", "kernels.backend"],
        cwd=ROOT,
        env={**os.environ, "STREAMER_ISA": "z80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "STREAMER_ISA=z80" in done.stderr
