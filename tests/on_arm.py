"""The tests on an emulated Arm CPU: the extension cross-compiled, Python and MLX as Debian and PyPI
have them for it.

    python -m tests.on_arm                                   # the kernels' tests under each set
    python -m tests.on_arm -m tests.instruction_sets neon    # under one
    python -m tests.on_arm -m pytest -q tests/test_chain.py  # whatever Python is to run
    ARM_CPU=cortex-a53 python -m tests.on_arm                # an older CPU (default: max)

Needs a Debian with g++-aarch64-linux-gnu and qemu-user, the network the first time, 700 MB in
build/arm, and some minutes for each set. The extension lies beside this machine's own, by its
name. Says nothing about speed, and on x86 the emulation keeps x86's order of memory accesses: what
is only wrong with Arm's is not found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "build" / "arm"
SYSTEM, SITE, BIN = HERE / "root", HERE / "site", HERE / "bin"
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64", "apt-get", "dpkg")
PACKAGES = ("python3", "libpython3-dev", "libstdc++6", "libgomp1", "zlib1g")
TESTING = ("pytest", "hypothesis", "nanobind", "setuptools", "pyte")

# MLX keeps what it compiled by name alone: in the usual folder it would be taken for this CPU's.
PYTHON = """#!/bin/sh
export PYTHONHOME={system}/usr PYTHONPATH="$PYTHONPATH:{site}" TMPDIR={here}/tmp PATH={bin}:$PATH
exec qemu-aarch64 -cpu "${{ARM_CPU:-max}}" -L {system} -0 {bin}/python {python} "$@"
"""
COMPILER = """#!/bin/sh
exec aarch64-linux-gnu-g++ "$@" -idirafter {system}/usr/include
"""


def system() -> None:
    """Debian's Python for Arm, unpacked."""
    folders = {"Dir::State": HERE / "apt", "Dir::Cache": HERE / "apt"}
    status = HERE / "apt" / "status"
    for name in ("lists/partial", "archives/partial"):
        (HERE / "apt" / name).mkdir(parents=True, exist_ok=True)
    status.touch()
    settings = {
        **folders,
        "Dir::State::status": status,
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    wanted = ["install", "-y", "--no-install-recommends", "--download-only", *PACKAGES]
    subprocess.run([*apt, *wanted], check=True, stdout=subprocess.DEVNULL)
    for package in sorted((HERE / "apt" / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, SYSTEM], check=True)


def site(version: str) -> None:
    """What the project and its tests ask for, as wheels for Arm."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    testing = [one for one in project["optional-dependencies"]["test"] if one.startswith(TESTING)]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 37)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", *platforms]
    pip += [f"--python-version={version}", "--implementation=cp", f"--target={SITE}"]
    subprocess.run([*pip, *project["dependencies"], *testing], check=True)


def prepare() -> Path:
    """The emulated interpreter, with the extension built for it."""
    python = next(SYSTEM.glob("usr/bin/python3.[0-9]*[0-9]"), None)
    if python is None:
        system()
        python = next(SYSTEM.glob("usr/bin/python3.[0-9]*[0-9]"))
    if not SITE.is_dir():
        site(python.name.removeprefix("python"))
    for folder in (BIN, HERE / "tmp"):
        folder.mkdir(exist_ok=True)
    paths = {"system": SYSTEM, "site": SITE, "bin": BIN, "here": HERE, "python": python}
    for name, text in {"python": PYTHON, "g++": COMPILER}.items():
        (BIN / name).write_text(text.format(**paths))
        (BIN / name).chmod(0o755)
    compiler = {"CC": str(BIN / "g++"), "CXX": str(BIN / "g++")}
    build = [BIN / "python", "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=ROOT, env={**os.environ, **compiler}, check=True)
    return BIN / "python"


def main(argv: list[str]) -> int:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        print(f"not here: {', '.join(missing)}", file=sys.stderr)
        return 2
    python = prepare()
    arguments = argv or ["-m", "tests.instruction_sets"]
    return subprocess.run([python, *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
