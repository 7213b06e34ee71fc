"""The probe: it must choose sensibly on any file, and stay within its limits."""

import itertools
import os
import random
import sys
import time
from pathlib import Path

import pytest

from streamer import probe
from streamer.disk import Disk
from streamer.errors import StreamerError, UsageError
from streamer.probe import AMPLE, TIGHT, Measurement, Way, choose_backend, measure
from streamer.store import Store

pytestmark = pytest.mark.timed

MB = 1 << 20


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    """Two files of 80 MB in all: above SMALL."""
    block = random.Random(0).randbytes(MB)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, n in zip(paths, (50, 30), strict=True):
        path.write_bytes(block * n)
    return paths


def available(monkeypatch, nbytes: float) -> None:
    monkeypatch.setattr(probe, "available_memory", lambda: int(nbytes))


def pretend(monkeypatch, **rates: tuple[float, float | None]) -> list[Way]:
    """Replace the measurement by GB/s uncached and cached; returns the ways asked for."""
    asked: list[Way] = []

    def race(files, expert_bytes, ways, threads):
        asked.extend(ways)
        names = {way: way.backend + "_drop" * way.drop_behind for way in ways}
        return {
            way: Measurement(rates[name][0] * 1e9, 1e-3, rates[name][1] and rates[name][1] * 1e9)
            for way, name in names.items()
            if name in rates
        }

    monkeypatch.setattr(probe, "race", race)
    return asked


# The rule


def test_memory_to_spare_prefers_buffered_reads(large, monkeypatch):
    available(monkeypatch, 70 * MB)
    asked = pretend(monkeypatch, pread=(1.0, 8.0), mmap=(1.0, 4.0), direct=(2.0, None))
    choice = choose_backend(large, MB, budget=0)
    assert asked == list(AMPLE)
    assert (choice.backend, choice.drop_behind) == ("pread", False)
    assert choice.bandwidth_bytes_per_s == 1e9
    assert 1e9 < choice.settled_bytes_per_s <= 8e9
    assert choice.latency_s == 1e-3


def test_a_faster_disk_path_beats_a_little_cache(large, monkeypatch):
    available(monkeypatch, 16 * MB)
    pretend(monkeypatch, pread=(1.0, 8.0), mmap=(1.0, 4.0), direct=(2.0, None))
    assert choose_backend(large, MB, budget=0).backend == "direct"


def test_the_budget_is_not_there_for_the_page_cache(large, monkeypatch):
    available(monkeypatch, 70 * MB)
    asked = pretend(monkeypatch, direct=(1.0, None), pread_drop=(1.05, None))
    choice = choose_backend(large, MB, budget=65 * MB)
    assert asked == list(TIGHT)
    assert choice.backend == "direct"
    assert choice.settled_bytes_per_s == pytest.approx(choice.bandwidth_bytes_per_s)
    assert "cannot cache" in choice.reason
    choice = choose_backend(large, MB, budget=100 * MB)
    assert choice.backend == "direct"
    assert " 0 B to spare" in choice.reason


def test_tight_memory_holds_no_byte_twice(large, monkeypatch):
    available(monkeypatch, 0)
    pretend(monkeypatch, direct=(1.0, None), pread_drop=(1.2, None))
    choice = choose_backend(large, MB, budget=0)
    assert (choice.backend, choice.drop_behind) == ("pread", True)
    pretend(monkeypatch, pread_drop=(1.2, None))  # direct refused
    choice = choose_backend(large, MB, budget=0)
    assert (choice.backend, choice.drop_behind) == ("pread", True)


@pytest.mark.parametrize(("mmap", "chosen"), [(1.05, "pread"), (1.3, "mmap")])
def test_the_simplest_within_ten_percent(large, monkeypatch, mmap, chosen):
    available(monkeypatch, 0.3 * 80 * MB)
    pretend(monkeypatch, pread=(1.0, 9.0), mmap=(mmap, 9.0), direct=(0.5, None))
    assert choose_backend(large, MB, budget=0).backend == chosen


@pytest.mark.parametrize("memory", [0, 1e12])
def test_small_files_take_pread(tmp_path, monkeypatch, memory):
    available(monkeypatch, memory)
    path = tmp_path / "demo.safetensors"
    path.write_bytes(random.Random(1).randbytes(3 * MB))
    choice = choose_backend([path], 30_000, budget=0)
    assert (choice.backend, choice.drop_behind) == ("pread", False)
    assert choice.bandwidth_bytes_per_s > 1e6
    assert 0 < choice.latency_s < 1
    assert "small" in choice.reason


# The measurement


@pytest.mark.parametrize("memory", [0, 1e12])
@pytest.mark.parametrize("expert_bytes", [30_001, 3 * MB, 200 * MB])
def test_real_files(large, monkeypatch, memory, expert_bytes):
    available(monkeypatch, memory)
    choice = choose_backend(large, expert_bytes, budget=0)
    ways = TIGHT if memory == 0 else AMPLE
    assert Way(choice.backend, choice.drop_behind) in ways
    assert choice.bandwidth_bytes_per_s > 1e6
    assert choice.latency_s > expert_bytes / 1e12
    assert "\n" not in choice.reason


@pytest.mark.parametrize("sizes", [(1,), (0, 5), (4097, 0, 1), (100, 3 * MB)])
def test_tiny_files(tmp_path, monkeypatch, sizes):
    available(monkeypatch, 1e9)
    paths = [tmp_path / str(i) for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    assert choose_backend(paths, MB, budget=0).backend == "pread"


def test_sparse_file(tmp_path, monkeypatch):
    available(monkeypatch, 0)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    choice = choose_backend([path], MB, budget=0)
    assert choice.bandwidth_bytes_per_s > 0


def test_nothing_to_read(tmp_path, monkeypatch):
    available(monkeypatch, 0)
    (tmp_path / "empty").touch()
    for files in ([], [tmp_path / "empty"]):
        with pytest.raises(UsageError, match="nothing to read"):
            choose_backend(files, MB, budget=0)
    with pytest.raises(UsageError, match="0 bytes"):
        measure([tmp_path / "empty"], 0, "pread")
    with pytest.raises(StreamerError, match=r"cannot open .*absent"):
        choose_backend([tmp_path / "absent"], MB, budget=0)


def test_limits(large, monkeypatch):
    """64 MB from the disk, nothing twice while there is more, and no round after the time."""
    seen: list[tuple[int, int, int]] = []
    real = Store.read

    def read(self, pieces):
        seen.append(sum(p.dest.nbytes for p in pieces))
        cells.extend((p.file, p.offset) for p in pieces)
        return real(self, pieces)

    cells: list[tuple[int, int]] = []
    monkeypatch.setattr(Store, "read", read)
    measure(large, MB, "pread", drop_behind=True, limit_seconds=60)
    assert 0.8 * 64 * MB <= sum(seen) <= 64 * MB
    assert len(set(cells)) == len(cells)

    seen.clear()
    measure(large, MB, "pread", drop_behind=True, limit_seconds=0)
    assert sum(seen) == 1 + 5 * MB  # threads started, one alone, a wave of four


def test_a_slow_disk_is_measured_as_slow(large, monkeypatch):
    class Slow(Store):
        def __init__(self, files, **options):
            super().__init__(files, disk=Disk(2e7), **options)

    monkeypatch.setattr(probe, "Store", Slow)
    bandwidths, latencies, took = [], [], []
    for _ in range(3):  # a busy machine makes a disk slower, never faster
        began = time.perf_counter()
        found = measure(large, 100_000, "pread")
        took.append(time.perf_counter() - began)
        bandwidths.append(found.bandwidth)
        latencies.append(found.latency)
    assert max(bandwidths) == pytest.approx(2e7, rel=0.2)
    assert min(latencies) == pytest.approx(0.005, rel=0.3)
    assert min(took) < 0.5
    # An expert larger than what is read of it takes as much longer.
    latencies = [measure(large, 8 * MB, "pread", limit_bytes=MB).latency for _ in range(3)]
    assert min(latencies) == pytest.approx(8 * MB / 2e7, rel=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/io")
@pytest.mark.parametrize("expert_bytes", [100_000, MB])
def test_first_readings_come_from_the_disk(large, expert_bytes):
    """Although the files are cached."""

    def from_disk() -> int:
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])

    before = from_disk()
    for path in large:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path.read_bytes()
    if from_disk() - before < 80 * MB:
        pytest.skip("this filesystem keeps its files in memory")
    before = from_disk()
    found = measure(large, expert_bytes, "pread", limit_bytes=20 * MB, limit_seconds=60)
    assert 18 * MB <= from_disk() - before <= 22 * MB
    assert found.cached_bandwidth is not None
    assert measure(large, MB, "pread", drop_behind=True).cached_bandwidth is None


def test_cells_cover_the_files():
    sizes, grain = [10_000, 0, 999, 4_000], 1000
    cells = list(itertools.islice(probe._cells(sizes, grain, 100), 15))
    assert sorted(cells) == [
        *((0, i * 1000, 1000) for i in range(10)),
        (2, 0, 999),
        *((3, i * 1000, 1000) for i in range(4)),
    ]


def test_refused_ways_are_left_out(large, monkeypatch):
    class Refusing(Store):
        def __init__(self, files, *, backend, **options):
            if backend == "direct":
                raise StreamerError("refuses direct reads")
            super().__init__(files, backend=backend, **options)

    monkeypatch.setattr(probe, "Store", Refusing)
    available(monkeypatch, 0)
    choice = choose_backend(large, MB, budget=0)
    assert (choice.backend, choice.drop_behind) == ("pread", True)
    with pytest.raises(StreamerError, match="refuses"):
        measure(large, MB, "direct")


# The command


def test_command(large, monkeypatch, capsys):
    available(monkeypatch, 0)
    folder = str(large[0].parent)
    assert probe.main([folder, "--expert-bytes", "100000"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("pread ")
    assert len(out) >= 4
    assert "cannot cache 80.0 MB" in out[-1]
    assert probe.main([folder + "/absent"]) == 2
    err = capsys.readouterr().err
    assert "absent" in err
    assert err.count("\n") == 1
