"""Sizes, this process's footprint, and what memory cgroups leave of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamer import footprint as subject
from streamer import memory_cgroup as groups
from streamer.errors import UsageError
from streamer.footprint import format_size, parse_size
from streamer.memory_cgroup import drop_page_cache, memory_cgroup

MB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]
# the first text drawn waits for Hypothesis's table of characters, seconds on a busy machine
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
REASON = groups.why_not()
needs_cgroups = pytest.mark.skipif(REASON is not None, reason=str(REASON))


# Sizes


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("8GB", 8 << 30),
        ("8 gb", 8 << 30),
        (" 8GiB ", 8 << 30),
        ("8Gi", 8 << 30),
        ("8g", 8 << 30),
        ("512MB", 512 * MB),
        ("1.5k", 1536),
        (".5G", 1 << 29),
        ("8e9", 8 * 10**9),
        ("1e3kB", 1024 * 1000),
        ("2TB", 2 << 40),
        ("100B", 100),
    ],
)
def test_sizes_are_read_in_units_of_1024(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.smoke
@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GB", ".", "1.2.3", "0", "0.5", "-1", "-8GB", "+8GB", "nan", "inf", "infGB", "8XB",
        "8 G B", "8e", "e9", "1e999", "2e9999GB", "8GB!", "0x10", "1_000", "1,5GB", "50%", "min",
        "8\u212a", "\u0668GB", "9" * 400, "1048576TB", "8GB\n8GB",
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text)
    assert repr(text) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.smoke
@unhurried
@given(st.text(max_size=12) | st.from_regex(r"[0-9.]{0,6}(e[0-9]{0,4})? ?[kmgtib]{0,3}"))
def test_any_text_gives_bytes_or_the_refusal(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert 1 <= parse_size(text) < 1 << 60


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 kB"),
        (64 << 10, "64.0 kB"),
        (512 * MB, "512 MB"),
        (8053063680, "7.5 GB"),
        (400 << 30, "400 GB"),
    ],
)
def test_sizes_are_written_short(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.smoke
@unhurried
@given(st.integers(1, 1 << 45))
def test_a_written_size_is_read_back(nbytes: int) -> None:
    assert math.isclose(parse_size(format_size(nbytes)), nbytes, rel_tol=0.05)
    up = parse_size(format_size(nbytes, up=True))
    assert nbytes <= up <= 1.1 * nbytes


# This process


@pytest.mark.smoke
def test_the_footprint_is_resident_memory_and_its_peak() -> None:
    now = subject.footprint()
    assert abs(now - psutil.Process().memory_info().rss) < 4 * MB or sys.platform == "darwin"
    held = bytearray(b"x") * (64 * MB)
    grown = subject.footprint()
    assert 60 * MB <= grown - now <= 80 * MB
    del held
    assert subject.footprint() < grown - 50 * MB
    # the kernel counts pages by CPU, each up to so many off, and notes its peaks by their sum
    cpus = os.cpu_count() or 1
    off = cpus * max(32, 2 * cpus) * 4096
    assert subject.peak_footprint() >= grown - 4 * MB - off


def test_the_peak_is_not_that_of_a_large_parent() -> None:
    child = "from streamer.footprint import peak_footprint; print(peak_footprint())"
    parent = f"""
import subprocess, sys
held = bytearray(b"x") * {256 * MB}
for fork in (False, True):  # with preexec_fn, subprocess forks the large parent
    argv = [sys.executable, "-c", {child!r}]
    subprocess.run(argv, check=True, preexec_fn=(lambda: None) if fork else None)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    assert all(MB < peak < 128 * MB for peak in peaks)


@pytest.mark.smoke
def test_the_counters_lie_where_macos_writes_them() -> None:
    info = subject._RusageInfoV4
    assert ctypes.sizeof(info) == 296
    assert info.ri_phys_footprint.offset == 72
    assert info.ri_lifetime_max_phys_footprint.offset == 240


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("available", "reserve"),
    [(0, 0), (4 << 30, 1 << 30), (8 << 30, 2 << 30), (16 << 30, 2 << 30), (100 << 30, 10 << 30)],
)
def test_the_default_budget_leaves_a_reserve(
    available: int, reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "available_memory", lambda: available)
    monkeypatch.setattr(subject, "footprint", lambda: 100 * MB)
    monkeypatch.setattr(subject, "_metal_working_set", lambda: None)
    budget, why = subject.default_budget()
    assert budget == 100 * MB + available - reserve
    assert why == f"{format_size(available)} available less {format_size(reserve)} in reserve"


@pytest.mark.smoke
def test_the_default_budget_is_what_metal_recommends_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "available_memory", lambda: 16 << 30)
    for recommended, limited in ((11 << 30, True), (48 << 30, False)):
        info = {"max_recommended_working_set_size": recommended}
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        budget, why = subject.default_budget()
        assert (budget == recommended) is limited
        assert ("11.0 GB that Metal recommends" in why) is limited


# Trees of cgroups, made by hand


def tree(root: Path, membership: str, files: dict[str, str], monkeypatch: Any) -> None:
    """Point the subject at a copy of /sys/fs/cgroup and /proc/self/cgroup under `root`."""
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (root / "membership").write_text(membership)
    monkeypatch.setattr(subject, "CGROUPS", root / "cgroup")
    monkeypatch.setattr(subject, "MEMBERSHIP", root / "membership")


STAT_2 = f"anon {100 * MB}\nfile {60 * MB}\ninactive_file {30 * MB}\nactive_file {20 * MB}"
STAT_1 = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {30 * MB}\ntotal_active_file 0"
UNLIMITED_1 = "9223372036854771712"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("membership", "files", "limit", "available"),
    [
        pytest.param("0::/\n", {"cgroup.controllers": "memory"}, None, None, id="root"),
        pytest.param(
            "0::/a/b\n",
            {
                "cgroup.controllers": "cpu memory",
                "a/memory.max": str(400 * MB),
                "a/memory.current": str(160 * MB),
                "a/memory.stat": STAT_2,
                "a/b/memory.max": "max",
                "a/b/memory.current": str(10 * MB),
            },
            400 * MB,
            (400 - 160 + 50) * MB,
            id="the parent's limit",
        ),
        pytest.param(
            "0::/a\n",
            {
                "cgroup.controllers": "memory",
                "a/memory.max": str(400 * MB),
                "a/memory.high": str(300 * MB),
                "a/memory.current": str(100 * MB),
            },
            300 * MB,
            200 * MB,
            id="slowed before killed",
        ),
        pytest.param(
            "0::/\n",
            {
                "cgroup.controllers": "memory",
                "memory.max": str(400 * MB),
                "memory.current": str(500 * MB),
            },
            400 * MB,
            0,
            id="namespace, over its limit",
        ),
        pytest.param(
            "4:memory:/docker/abc\n0::/\n",
            {
                "memory/memory.limit_in_bytes": str(400 * MB),
                "memory/memory.usage_in_bytes": str(100 * MB),
                "memory/memory.stat": STAT_1,
            },
            400 * MB,
            330 * MB,
            id="version 1 in a container",
        ),
        pytest.param(
            "5:cpu,cpuacct:/x\n4:memory:/a\n",
            {
                "memory/memory.limit_in_bytes": UNLIMITED_1,
                "memory/memory.usage_in_bytes": "1",
                "memory/a/memory.limit_in_bytes": UNLIMITED_1,
                "memory/a/memory.usage_in_bytes": "1",
            },
            None,
            None,
            id="version 1, no limit",
        ),
    ],
)
def test_the_tightest_group_decides(
    membership: str,
    files: dict[str, str],
    limit: int | None,
    available: int | None,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    tree(tmp_path, membership, files, monkeypatch)
    assert subject.memory_limit() == limit
    if available is None:
        machine = psutil.virtual_memory().available
        assert math.isclose(subject.available_memory(), machine, rel_tol=0.1)
    else:
        assert subject.available_memory() == available


@pytest.mark.smoke
def test_a_system_without_cgroups_has_no_limit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(subject, "MEMBERSHIP", tmp_path / "absent")
    assert subject.memory_limit() is None
    assert subject.available_memory() > 0


# Real cgroups


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


@needs_cgroups
def test_a_process_beyond_the_limit_is_killed_and_one_below_survives() -> None:
    hold = python(f"held = bytearray(b'x') * {96 * MB}")
    with memory_cgroup(64 * MB) as small:
        assert small.run(hold).returncode == -signal.SIGKILL
    assert small.killed == 1
    assert small.peak <= small.limit
    with memory_cgroup(160 * MB) as large:
        assert large.run(hold).returncode == 0
    assert large.killed == 0
    assert 96 * MB <= large.peak <= large.limit
    assert not small.folder.exists() and not large.folder.exists()


@needs_cgroups
def test_page_cache_counts_and_is_reclaimed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(96 * MB))
    read = python(f"f = open({str(file)!r}, 'rb', buffering=0)\nwhile f.read({MB}): pass")
    drop_page_cache(file)
    with memory_cgroup(48 * MB) as tight:
        done = tight.run(read)
    assert (done.returncode, tight.killed, done.stderr) == (0, 0, "")
    assert 40 * MB <= tight.peak <= tight.limit
    assert 16 * MB <= tight.page_cache() <= tight.limit
    drop_page_cache(file)
    with memory_cgroup(256 * MB) as roomy:
        roomy.run(read)
    # not all 96 MB: a kernel may drop idle pages unasked (DAMON's proactive reclaim)
    assert roomy.peak > 64 * MB and roomy.page_cache() > 64 * MB


@needs_cgroups
def test_a_timeout_leaves_no_process_and_no_group() -> None:
    with pytest.raises(subprocess.TimeoutExpired), memory_cgroup(64 * MB) as group:
        group.run(["sh", "-c", "sleep 60 & exec sleep 60"], timeout=0.3)
    assert not group.folder.exists()


@needs_cgroups
def test_output_input_and_environment_pass_through() -> None:
    with memory_cgroup(64 * MB) as group:
        done = group.run(["sh", "-c", 'cat; echo "$A"; echo oh >&2; exit 3'], env={"A": "b"})
        told = group.run(["cat"], stdin="x y")
    assert (done.returncode, done.stdout, done.stderr) == (3, "b\n", "oh\n")
    assert told.stdout == "x y"


@needs_cgroups
def test_limit_and_room_are_right_from_inside(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * MB))
    drop_page_cache(file)
    script = f"""
import json
from streamer.footprint import available_memory, default_budget, memory_limit
seen = [memory_limit(), available_memory()]
open({str(file)!r}, "rb").read()
seen.append(available_memory())
held = bytearray(b"x") * {64 * MB}
seen += [available_memory(), default_budget()[0]]
print(json.dumps(seen))
"""
    with memory_cgroup(256 * MB) as group:
        done = group.run(python(script), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    limit, before, cached, held, budget = json.loads(done.stdout)
    assert limit == group.limit
    assert group.limit - 48 * MB <= before < group.limit
    assert abs(cached - before) <= 4 * MB
    assert 60 * MB <= cached - held <= 72 * MB
    assert held < budget < group.limit
    assert group.page_cache() > 40 * MB  # the file was charged, so `cached` says something


def test_on_cuda_memory_is_what_mlx_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "on_cuda", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"free_memory": 5 << 30})
    mx.clear_cache()
    before = subject.footprint()
    held = mx.zeros((1 << 20,))
    mx.eval(held)
    assert subject.footprint() - before >= held.nbytes
    assert subject.peak_footprint() >= subject.footprint()
    budget, why = subject.default_budget()
    assert budget == subject.footprint() + (5 << 30) - (5 << 28) and "available" in why
