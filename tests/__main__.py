"""Everything that must pass, quickest first: `python -m tests`."""

from __future__ import annotations

import subprocess
import sys

# one process a core; a file's tests stay in one, since they share what they set up
SIDE_BY_SIDE = ("-n", "logical", "--maxprocesses", "8", "--dist", "loadfile")
STEPS = (
    ("pytest", "-m", "smoke", "-x", *SIDE_BY_SIDE),
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("pytest", "-m", "not smoke and not timed", *SIDE_BY_SIDE),
    ("pytest", "-m", "not smoke and timed"),
)


def main() -> int:
    for step in STEPS:
        print("$ python -m", *step, flush=True)
        code = subprocess.run([sys.executable, "-m", *step], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
