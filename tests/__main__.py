"""Everything that must pass, quickest first: `python -m tests`."""

from __future__ import annotations

import subprocess
import sys

STEPS = (
    ("pytest", "-m", "smoke", "-x"),
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("pytest", "-m", "not smoke"),
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
