"""llama.cpp as a configuration of the benchmark: its server, asked for one completion a turn.

The server (`llama-server`) is started once, with memory mapping as it does by default and
without repacking, which would hold the weights a second time; what is timed is its own
account of the tokens after the first. Where the file holds the model's MTP head, `--mtp 1,2`
gives rows in which it drafts with that. Other options go through `--llama-args`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .bench_rows import KILLED, Run
from .errors import StreamerError
from .machine import cores
from .memory_cgroup import MemoryCgroup, drop_page_cache

PATIENCE = 300  # seconds until it must have loaded the model


class Llama:
    """A running llama-server. Raises StreamerError where it cannot be started at all."""

    def __init__(
        self,
        binary: Path,
        gguf: Path,
        job: dict[str, Any],
        group: MemoryCgroup | None,
        options: str = "",
        mtp: str = "off",
    ):
        """options: more of the server's own. mtp: drafts a step, by the head in the file."""
        for path in (binary, gguf):
            if not path.is_file():
                raise StreamerError(f"there is no file {path}")
        self._job, self._group, self._gguf, self._dead = job, group, gguf, ""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        context = 2 * len(job["prompt"]) + job["tokens"] + 64  # tokens are no shorter than bytes
        argv = [str(binary), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
        argv += ["-c", str(context), "-t", str(cores()), "-np", "1", "--no-repack"]
        if mtp != "off":
            argv += ["--spec-type", "draft-mtp", "--spec-draft-n-max", mtp]
        argv += shlex.split(options)
        drop_page_cache(gguf)  # or pages that are cached already cost a limited group nothing
        quiet: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        try:
            if group is None:
                self._process = subprocess.Popen(argv, text=True, **quiet)
            else:
                self._process = group.start(argv, **quiet)
        except OSError as error:
            raise StreamerError(f"cannot run {binary}: {error.strerror}") from error

    def run(self) -> Run:
        """A turn; {"failed": why} for ever once the server has ended."""
        if not self._dead:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._ready()
                return self._measured()
            self._dead = self._why()
        return {"failed": self._dead}

    def _measured(self) -> Run:
        before = self._kernel_bytes()
        answer = self._ask(
            "/completion",
            {
                "prompt": self._job["prompt"],
                "n_predict": self._job["tokens"],
                "temperature": self._job["temp"],
                "ignore_eos": True,
                "cache_prompt": False,
            },
        )
        timings = answer["timings"]
        return {
            "drafted": timings.get("draft_n", 0),
            "accepted": timings.get("draft_n_accepted", 0),
            "seconds": timings["predicted_ms"] / 1e3 / (timings["predicted_n"] - 1),
            "peak": self._group.peak if self._group else self._peak(),
            "kernel_bytes": self._kernel_bytes() - before,
            "greedy": self._job["temp"] == 0,
            "text": answer.get("content", ""),
        }

    def _ready(self) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._ask("/health")
                return
            except OSError:  # not listening yet, or 503 while it loads
                if time.monotonic() > until or self._process.poll() is not None:
                    raise
                time.sleep(0.1)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, head)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def _why(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        if self._group is not None and self._group.killed:
            return KILLED
        code = self._process.returncode
        return "gave no timings" if code is None else f"ended with exit code {code}"

    def _peak(self) -> int:
        text = self._proc("status")
        found = re.search(r"VmHWM:\s+(\d+)", text)
        return int(found[1]) * 1024 if found else 0

    def _kernel_bytes(self) -> int:
        found = re.search(r"^read_bytes: (\d+)", self._proc("io"), re.MULTILINE)
        return int(found[1]) if found else 0

    def _proc(self, name: str) -> str:
        try:
            return Path(f"/proc/{self._process.pid}/{name}").read_text()
        except OSError:
            return ""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def version(binary: Path) -> str:
    """What the binary says of itself, or nothing."""
    try:
        done = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"version: *([^\n]+)", done.stdout + done.stderr)
    return found[1].strip() if found else ""
