"""The kernels' tests under each instruction set and without the extension.

    python -m tests.instruction_sets             # every tests/test_kernels_*.py; about two minutes
    python -m tests.instruction_sets --all       # the full suite under each: many minutes
    python -m tests.instruction_sets avx2 off    # some of them

By hand, for any command of this repository: STREAMER_ISA=NAME forces one of
`kernels.native.isas()`, STREAMER_KERNELS=off takes MLX's own products. Prints what was run and what
came of it, a line each; the exit code is 1 if a test failed, 2 for a name that does not run here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from kernels import backend

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("build", "name", "bench")  # of installing and measuring: no kernel runs there


def settings() -> dict[str, dict[str, str]]:
    """What can be forced here, and how: environment variables by name."""
    native = backend.native()
    names = native.isas() if native is not None else []
    forced = {name: {"STREAMER_ISA": name, "STREAMER_KERNELS": "on"} for name in names}
    return {**forced, "off": {"STREAMER_KERNELS": "off"}}


def files() -> list[str]:
    """The kernels' tests that run kernels."""
    found = sorted((ROOT / "tests").glob("test_kernels_*.py"))
    return [str(p.relative_to(ROOT)) for p in found if p.stem.split("_")[-1] not in SLOW]


def run(environment: dict[str, str], everything: bool) -> tuple[bool, str]:
    """Whether all passed, and pytest's closing line, after its report where not."""
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rN"]
    done = subprocess.run(
        argv if everything else [*argv, *files()],
        cwd=ROOT,
        # KERNELS_RERUN: the linears' tests don't start the other sets once more
        env={**os.environ, **environment, "KERNELS_RERUN": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    return done.returncode == 0, lines[-1] if done.returncode == 0 else "\n".join(lines[-60:])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="tests.instruction_sets")
    p.add_argument("names", nargs="*", help="default: all that run here")
    p.add_argument("--all", action="store_true", help="the full suite, not the kernels' alone")
    args = p.parse_args(argv)
    known = settings()
    if unknown := set(args.names) - set(known):
        print(f"not here: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    print("each runs", "the full suite" if args.all else " ".join(files()), flush=True)
    passed = True
    for name in args.names or known:
        began = time.perf_counter()
        good, line = run(known[name], args.all)
        passed &= good
        setting = " ".join(f"{k}={v}" for k, v in known[name].items())
        print(f"{name:12}{setting}: {line} [{time.perf_counter() - began:.0f} s]", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
