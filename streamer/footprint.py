"""How much memory this process holds and how much the machine can spare.

The footprint is what the system would count against the user: RSS on Linux,
phys_footprint on macOS. Limits are those of RAM and of memory cgroups (v1 and
v2), where page cache that can be dropped counts as available.

With MLX's CUDA back end it is what MLX holds, and the limit the GPU's memory: the
driver's own gigabyte, in the process, comes and goes with what it compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
from functools import cache
from pathlib import Path

import psutil

from .errors import UsageError

PAGE = os.sysconf("SC_PAGE_SIZE")
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a huge number
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
RESERVE = 2 << 30
MAPPED_FROM = 4 << 20  # bytes of a block that goes back to the system when it is freed
HEAP_SPARE = 8 << 20  # free bytes at the heap's end that are kept: within budget.SLACK
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}{end}": 1024**_power for end in ("", "B", "I", "IB")}


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


def percentage(memory: str | int | None) -> float | None:
    """The share of 'N%' of the experts, None for another form. Raises UsageError."""
    if not isinstance(memory, str) or not memory.strip().endswith("%"):
        return None
    try:
        share = float(memory.strip()[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(f"--memory {memory}: a share of the experts lies above 0% and up to 100%")
    return share


def format_size(nbytes: int, *, up: bool = False) -> str:
    """'7.5 GB', '512 MB', '64.0 kB', in units of 1024; `parse_size` reads it back.

    up: never less than nbytes, for a size that someone will ask for.
    """
    for unit, scale in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if nbytes >= scale:
            value = nbytes / scale
            steps = 10 if value < 100 else 1
            if up:
                value = math.ceil(value * steps) / steps
            return f"{value:.1f} {unit}" if steps == 10 else f"{value:.0f} {unit}"
    return f"{nbytes} B"


@cache
def on_cuda() -> bool:
    """Whether MLX computes on a CUDA GPU."""
    import mlx.core as mx  # the rest of this module needs no MLX

    return mx.default_device() == mx.Device(mx.gpu) and mx.cuda.is_available()


def footprint() -> int:
    """Bytes this process holds now. Takes microseconds."""
    if on_cuda():
        return _mlx_holds()
    if sys.platform == "darwin":
        return _rusage().ri_phys_footprint
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE


def peak_footprint() -> int:
    """The largest footprint so far, bytes."""
    if on_cuda():
        import mlx.core as mx

        return max(mx.get_peak_memory(), _mlx_holds())
    if sys.platform == "darwin":
        return _rusage().ri_lifetime_max_phys_footprint
    # ru_maxrss would inherit the parent's peak through fork
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return footprint()


def _mlx_holds() -> int:
    import mlx.core as mx

    return mx.get_active_memory() + mx.get_cache_memory()


def return_freed_memory() -> None:
    """Make malloc map large blocks for good, where malloc is glibc's.

    Left alone it raises its threshold to the largest block freed so far, up to 32 MB, and
    buffers of growing sizes then leave holes in the heap: 30 MB of a 76 MB workspace.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        libc.mallopt(M_TRIM_THRESHOLD, HEAP_SPARE)


def trim_heap() -> None:
    """Give the holes in malloc's heap back, where malloc is glibc's: milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_limit() -> int | None:
    """The tightest memory cgroup limit on this process, bytes, or None."""
    return min((limit for limit, _ in _cgroups()), default=None)


def available_memory() -> int:
    """Bytes that this process may still take, page cache counted as free."""
    if on_cuda():
        import mlx.core as mx

        return int(mx.device_info()["free_memory"])
    room = [psutil.virtual_memory().available]
    room += [limit - used for limit, used in _cgroups()]
    return max(0, min(room))


def default_budget() -> tuple[int, str]:
    """(bytes, why): what the machine can spare now, with a reserve for everything else.

    The reserve is a quarter of what is available, 2 GB at most, and a tenth from 20 GB on.
    On macOS no more than Metal recommends.
    """
    available = available_memory()
    reserve = max(min(RESERVE, available // 4), available // 10)
    budget = footprint() + available - reserve
    metal = _metal_working_set()
    if metal is not None and metal < budget:
        return metal, f"the {format_size(metal)} that Metal recommends on this machine"
    return budget, f"{format_size(available)} available less {format_size(reserve)} in reserve"


def _metal_working_set() -> int | None:
    """Bytes that this GPU can hold without slowing down, or None without Metal."""
    import mlx.core as mx  # the rest of this module needs no MLX

    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)


def _cgroups() -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be reclaimed) of each limiting memory cgroup."""
    found = []
    for folder in _cgroup_folders():
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        # above memory.high the kernel does not kill, it slows to a crawl
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _number(folder, name)
            if limit is not None and used is not None and limit < UNLIMITED:
                found.append((limit, max(0, used - _reclaimable(folder))))
    return found


def _cgroup_folders() -> list[Path]:
    try:
        lines = MEMBERSHIP.read_text().splitlines()
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
        # a path from outside a namespace does not exist here, but its root is the group's own
        folders += [folder, *(p for p in folder.parents if p == root or root in p.parents)]
    return folders


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of the files that holds one."""
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def _reclaimable(folder: Path) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    prefix = "total_" if "total_inactive_file" in stat else ""
    return int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))


class _RusageInfoV4(ctypes.Structure):
    """rusage_info_v4 of macOS <sys/resource.h>: a 16-byte uuid, then 35 counters of 64 bits."""

    _fields_ = [
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("times_to_resident_size", ctypes.c_uint64 * 7),
        ("ri_phys_footprint", ctypes.c_uint64),
        ("starts_to_logical_writes", ctypes.c_uint64 * 20),
        ("ri_lifetime_max_phys_footprint", ctypes.c_uint64),
        ("instructions_to_runnable_time", ctypes.c_uint64 * 6),
    ]


def _rusage() -> _RusageInfoV4:
    info = _RusageInfoV4()
    libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    if libproc.proc_pid_rusage(os.getpid(), 4, ctypes.byref(info)) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return info
