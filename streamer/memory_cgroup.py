"""Run a command under a memory limit that counts its page cache (Linux, root).

    from streamer.memory_cgroup import drop_page_cache, memory_cgroup, why_not

    drop_page_cache(*checkpoint.glob("*.safetensors"))
    with memory_cgroup(200 << 20) as group:
        done = group.run([sys.executable, "-m", "streamer.run", ...], timeout=60)
    assert not group.killed and group.peak <= 200 << 20

Works with version 1 (a memory hierarchy) and version 2 of cgroups, and makes
its group at the top, so that no limit of the caller's group applies. A page of
a file is charged to the group that first read or wrote it: a file that is
already cached costs the limited command nothing, hence drop_page_cache. Swap is
closed to the group. Try: `python -m streamer.memory_cgroup 100MB COMMAND ...`
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count(1)


class MemoryCgroup:
    """A memory cgroup in being; `peak`, `killed` and `stat` stay readable after its removal."""

    def __init__(self, folder: Path, limit: int, version: int) -> None:
        self.folder = folder
        self.limit = limit
        self._version = version
        self._last: tuple[int, int, dict[str, int]] | None = None

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` inside, with text stdout and stderr captured and stdin empty if not given.

        A process killed for memory returns -9 (-signal.SIGKILL). On a timeout
        everything in the group is killed and subprocess.TimeoutExpired raised.
        """
        child = self.start(
            argv,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=cwd,
        )
        try:
            out, err = child.communicate(stdin, timeout=timeout)
        except BaseException:
            self._kill_all()
            child.kill()
            child.communicate()
            raise
        return subprocess.CompletedProcess(list(argv), child.returncode, out, err)

    def start(
        self, argv: Sequence[str | os.PathLike[str]], **options: Any
    ) -> subprocess.Popen[str]:
        """`argv` begun inside, in text mode; options: subprocess.Popen's."""
        # a shell enters the group, then becomes the command: nothing is charged outside it, and
        # no fork of a large parent is
        enter = 'echo $$ > "$0" && exec "$@"'
        argv = ["/bin/sh", "-c", enter, self.folder / "cgroup.procs", *argv]
        return subprocess.Popen(argv, text=True, **options)

    @property
    def peak(self) -> int:
        """The most that was ever charged, bytes, page cache included."""
        return self._measure()[0]

    @property
    def killed(self) -> int:
        """How many processes the limit has killed."""
        return self._measure()[1]

    def stat(self) -> dict[str, int]:
        """The kernel's memory.stat: page cache is `cache` in version 1, `file` in version 2."""
        return self._measure()[2]

    def page_cache(self) -> int:
        """Bytes of page cache charged now, or at the end once the group is removed."""
        return self.stat()["cache" if self._version == 1 else "file"]

    def _measure(self) -> tuple[int, int, dict[str, int]]:
        if self._last is not None:
            return self._last
        peak, events = _FILES[self._version][1:]
        return (
            int((self.folder / peak).read_text()),
            _table(self.folder / events)["oom_kill"],
            _table(self.folder / "memory.stat"),
        )

    def _kill_all(self) -> None:
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def _remove(self) -> None:
        self._last = self._measure()
        give_up = time.monotonic() + 5
        while True:
            self._kill_all()
            try:
                self.folder.rmdir()
                return
            except OSError:  # busy: a killed process takes a moment to leave
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.01)


# version: (limit, peak, kills)
_FILES = {
    1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
    2: ("memory.max", "memory.peak", "memory.events"),
}
# counting swap as memory (1), and no swap at all (2); absent where the kernel accounts no swap
_SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """A memory cgroup of `limit_bytes`, removed with all its processes at the end.

    Raises OSError where `why_not()` gives a reason.
    """
    reason = why_not()
    if reason is not None:
        raise OSError(reason)
    top, version = _top()
    folder = top / f"streamer-{os.getpid()}-{next(_numbers)}"
    folder.mkdir()
    group = MemoryCgroup(folder, limit_bytes, version)
    try:
        (folder / _FILES[version][0]).write_text(str(limit_bytes))
        swap = folder / _SWAP[version]
        if swap.exists():
            swap.write_text(str(limit_bytes) if version == 1 else "0")
        yield group
    finally:
        group._remove()


def why_not() -> str | None:
    """Why no memory cgroup can be made here, or None where one can."""
    if not sys.platform.startswith("linux"):
        return "cgroups are Linux's"
    if os.geteuid() != 0:
        return "making a memory cgroup takes root"
    top, version = _top()
    if version == 0:
        return f"no memory controller of cgroups is mounted at {ROOT}"
    if version == 2 and "memory" not in (top / "cgroup.subtree_control").read_text().split():
        return f"{top} hands no memory controller to its groups"
    trial = top / f"streamer-{os.getpid()}-trial"
    try:
        trial.mkdir()
    except OSError as error:
        return f"{top} takes no group: {error.strerror}"
    try:
        absent = [name for name in _FILES[version] if not (trial / name).exists()]
    finally:
        trial.rmdir()
    return f"this kernel's memory cgroups have no {absent[0]}" if absent else None


def drop_page_cache(*files: Path) -> None:
    """Write the files out and drop them from the page cache, so that a reader is charged for them.

    Pages that a process has mapped stay.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _top() -> tuple[Path, int]:
    """(the folder that groups are made in, version of cgroups), version 0 where there is none."""
    if (ROOT / "memory" / "memory.limit_in_bytes").exists():
        return ROOT / "memory", 1
    if "memory" in _words(ROOT / "cgroup.controllers"):
        return ROOT, 2
    return ROOT, 0


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _table(path: Path) -> dict[str, int]:
    """A file of `name number` lines."""
    return {name: int(n) for name, n in (line.split() for line in path.read_text().splitlines())}


if __name__ == "__main__":
    from .footprint import format_size, parse_size

    if len(sys.argv) < 3:
        sys.exit("usage: python -m streamer.memory_cgroup SIZE COMMAND ...")
    with memory_cgroup(parse_size(sys.argv[1])) as _group:
        _done = _group.run(sys.argv[2:])
        print(_done.stdout, _done.stderr, sep="\n")
        print(
            f"exit {_done.returncode}, peak {format_size(_group.peak)}, killed {_group.killed}, "
            f"page cache {format_size(_group.page_cache())}"
        )
