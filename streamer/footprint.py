"""How much memory this process holds and how much the machine can spare.

The footprint is what the system would count against the user: RSS on Linux,
phys_footprint on macOS. Limits are those of RAM and of memory cgroups (v1 and
v2), where page cache that can be dropped counts as available.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from pathlib import Path

import psutil

from .errors import UsageError

PAGE = os.sysconf("SC_PAGE_SIZE")
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a huge number
CGROUPS = Path("/sys/fs/cgroup")
RESERVE = 2 << 30

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}B": 1024**_power, f"{_letter}IB": 1024**_power}


def parse_size(text: str) -> int:
    """Bytes of '8GB', '512MiB', '8g' or '8e9'; as in Ollama and llama.cpp a GB is 2**30.

    Raises UsageError for anything that is not a positive, finite size.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    try:
        value = float(match[1]) * unit if match and unit else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 1 <= value < 1 << 60):
        raise UsageError(f"{text!r} is not a memory size; write 8GB, 512MB, 50% or min")
    return int(value)


def format_size(nbytes: int) -> str:
    """'7.5 GB', '512 MB', '64 kB', in units of 1024."""
    for unit, scale in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{nbytes} B"


def footprint() -> int:
    """Bytes this process holds now. Takes microseconds."""
    if sys.platform == "darwin":
        return _rusage().ri_phys_footprint
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE


def peak_footprint() -> int:
    """The largest footprint so far, bytes."""
    if sys.platform == "darwin":
        return _rusage().ri_lifetime_max_phys_footprint
    # ru_maxrss would inherit the parent's peak through fork
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return footprint()


def memory_limit() -> int | None:
    """The tightest memory cgroup limit on this process, bytes, or None."""
    return min((limit for limit, _ in _cgroups()), default=None)


def available_memory() -> int:
    """Bytes that this process may still take, page cache counted as free."""
    room = [psutil.virtual_memory().available]
    room += [limit - used for limit, used in _cgroups()]
    return max(0, min(room))


def default_budget() -> tuple[int, str]:
    """(bytes, why): what the machine can spare now, with a reserve for everything else."""
    available = available_memory()
    reserve = min(RESERVE, available // 4)
    budget = footprint() + available - reserve
    return budget, f"{format_size(available)} available less {format_size(reserve)} in reserve"


def _cgroups() -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be reclaimed) of each limiting memory cgroup."""
    found = []
    for folder in _cgroup_folders():
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= UNLIMITED:
            continue
        found.append((limit, max(0, used - _reclaimable(folder))))
    return found


def _cgroup_folders() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = CGROUPS if (CGROUPS / "cgroup.controllers").exists() else CGROUPS / "unified"
        elif "memory" in controllers.split(","):
            root = CGROUPS / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        folders += [folder, *(p for p in folder.parents if p == root or root in p.parents)]
    return folders


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(folder: Path) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    prefix = "total_" if "total_inactive_file" in stat else ""
    return int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))


class _RusageInfoV4(ctypes.Structure):
    """rusage_info_v4 of macOS <sys/resource.h>."""

    _fields_ = [
        ("ri_uuid", ctypes.c_uint8 * 16),
        *(
            (name, ctypes.c_uint64)
            for name in ["ri_user_time", "ri_system_time", "ri_pkg_idle_wkups", "ri_interrupt_wkups", "ri_pageins", "ri_wired_size", "ri_resident_size", "ri_phys_footprint", "ri_proc_start_abstime", "ri_proc_exit_abstime", "ri_child_user_time", "ri_child_system_time", "ri_child_pkg_idle_wkups", "ri_child_interrupt_wkups", "ri_child_pageins", "ri_child_elapsed_abstime", "ri_diskio_bytesread", "ri_diskio_byteswritten", "ri_cpu_time_qos_default", "ri_cpu_time_qos_maintenance", "ri_cpu_time_qos_background", "ri_cpu_time_qos_utility", "ri_cpu_time_qos_legacy", "ri_cpu_time_qos_user_initiated", "ri_cpu_time_qos_user_interactive", "ri_billed_system_time", "ri_serviced_system_time", "ri_logical_writes", "ri_lifetime_max_phys_footprint", "ri_instructions", "ri_cycles", "ri_billed_energy", "ri_serviced_energy", "ri_interval_max_phys_footprint", "ri_runnable_time"]
        ),
    ]


def _rusage() -> _RusageInfoV4:
    info = _RusageInfoV4()
    libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    if libproc.proc_pid_rusage(os.getpid(), 4, ctypes.byref(info)) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return info
