"""What a measurement was taken on: processor, cores, memory, system and versions.

python -m streamer.machine
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from . import __version__
from .footprint import memory_limit

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")


def machine() -> dict[str, Any]:
    """cores: that this process may use; memory_bytes: of the machine; memory_limit_bytes: the
    tightest cgroup's, or null."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": memory_limit(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Of this package, Python, the kernel and what the numbers depend on."""
    found = {"streamer": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"kernel": platform.release()}


def cores() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux's
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_name() -> str:
    """'AMD EPYC 9B14', 'Apple M4'; the architecture where the system does not say."""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), "versions": versions()}, indent=1))
