"""The extension under GCC's sanitizers: overruns, undefined behaviour, races of threads.

    python -m tests.sanitized address                             # tests of what this is about
    python -m tests.sanitized thread -m pytest -q tests/test_store.py
    python -m tests.sanitized address -c "import kernels.native"  # whatever Python is to run

address: AddressSanitizer and UndefinedBehaviorSanitizer; thread: ThreadSanitizer. Prints what they
found and exits with 1 if there is anything. Linux with GCC; the build, in build/sanitized, takes
some minutes and is made anew where a source has changed. MLX and Python are as they are: heap that
MLX allocates is watched where our code reads it, and races that MLX's own atomics settle are left
out (RACES).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "build" / "sanitized"
FLAGS = {
    "address": "-fsanitize=address,undefined",
    "thread": "-fsanitize=thread",
}
TESTS = (
    *("chain", "executor", "pager", "pool", "store", "store_close", "store_runs", "read_queue"),
    *("rehearse", "served_ahead", "session", "kernels_*", "cache_compressed"),
)
LEFT = ("build", "name", "bench", "threads")  # no kernel runs there; or memory is limited

# What the package's own flags say comes before, so that these win. A stripped library has no lines.
COMPILER = """#!/bin/sh
for one do
  shift
  [ "$one" = -Wl,-s ] || set -- "$@" "$one"
done
exec ${{SANITIZED_CXX:-g++}} "$@" {flags} -O1 -g -fno-omit-frame-pointer
"""
# MLX's and Python's own atomics are not seen: what they order looks like a race. Into `discarded`
# whatever lies between two reads is written by all threads, and read by none.
RACES = """
race:libmlx.so
race:mlx::core
race:mlx/core.cpython
mutex:mlx/core.cpython
race:discarded
"""


def library(name: str) -> str:
    """Where GCC has one of its libraries."""
    asked = ["gcc", f"-print-file-name={name}"]
    found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return str(Path(found).resolve())


def build(kind: str) -> Path:
    """A folder for PYTHONPATH that has the extension."""
    folder = HERE / kind
    made = next(folder.glob("kernels/native.*.so"), None)
    sources = [ROOT / "setup.py", *(ROOT / "kernels" / "cpu").iterdir()]
    if made is not None and made.stat().st_mtime > max(one.stat().st_mtime for one in sources):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    compiler = folder / "g++"
    compiler.write_text(COMPILER.format(flags=FLAGS[kind]))
    compiler.chmod(0o755)
    argv = [sys.executable, "setup.py", "-q", "build_ext"]
    argv += [f"--build-lib={folder}", f"--build-temp={folder / 'objects'}"]
    own = {"CC": str(compiler), "CXX": str(compiler)}
    subprocess.run(argv, cwd=ROOT, env={**os.environ, **own}, check=True)
    if not list(folder.glob("kernels/native.*.so")):
        raise SystemExit(2)  # the extension is optional: why was said already
    return folder


def environment(kind: str, folder: Path, reports: Path) -> dict[str, str]:
    """For Python and all that it starts."""
    races = folder / "races"
    races.write_text(RACES)
    names = ["libasan.so", "libubsan.so"] if kind == "address" else ["libtsan.so"]
    log = f"log_path={reports / 'report'}"
    return {
        **os.environ,
        # of the sanitizers, whose libraries must come first; exceptions need libstdc++ at hand
        "LD_PRELOAD": ":".join(map(library, [*names, "libstdc++.so.6"])),
        "ASAN_OPTIONS": f"detect_leaks=0:{log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        "TSAN_OPTIONS": f"suppressions={races}:{log}",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONSAFEPATH": "1",  # the extension of the checkout itself must not come first
        "KERNELS_RERUN": "1",  # the linears' tests don't start the other sets once more
    }


def tests() -> list[str]:
    """Those of whatever runs in threads or writes where it is told to."""
    found = [p for name in TESTS for p in sorted((ROOT / "tests").glob(f"test_{name}.py"))]
    return [str(p.relative_to(ROOT)) for p in found if p.stem.split("_")[-1] not in LEFT]


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in FLAGS or shutil.which("g++") is None:
        print(__doc__ if shutil.which("g++") else "not here: g++", file=sys.stderr)
        return 2
    kind = argv[0]
    folder = build(kind)
    reports = folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    arguments = argv[1:] or ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests()]
    run = [sys.executable, *arguments]
    done = subprocess.run(run, cwd=ROOT, env=environment(kind, folder, reports), check=False)
    found = sorted(reports.iterdir())
    for report in found:
        print(report.read_text(errors="replace"))
    return 1 if found else done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
