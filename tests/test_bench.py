"""The benchmark: what its rows say, configurations that fail, llama.cpp's place, one JSON line."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import make_tiny

from streamer import bench
from streamer.bench import PROCESS, _fitting, main, parser
from streamer.bench_llama import Llama
from streamer.bench_rows import KILLED, LLAMA, MEMORY, Configuration, crossed, row, suite, table
from streamer.bench_worker import Worker
from streamer.errors import StreamerError
from streamer.machine import machine, versions
from streamer.memory_cgroup import memory_cgroup, why_not
from streamer.opened import open_model
from streamer.run import DEMO
from streamer.ways import EXECUTORS

JOB = {"path": "nowhere", "tokens": 9, "prompt": "def ", "temp": 0.0, "io": "direct"}
JOB |= {"dtype": "auto"}
HALF = Configuration("streamed", 50)


def turn(seconds: float, **more: Any) -> dict[str, Any]:
    base = {"seconds": seconds, "peak": 5, "kernel_bytes": 0, "greedy": True, "out": [1, 2]}
    return base | {"hits": 3, "misses": 1, "bytes": 100.0, "slots": 4} | more


# Rows


@pytest.mark.smoke
def test_ratios_are_of_turns_and_medians_of_those() -> None:
    memory = [{k: v for k, v in turn(s).items() if k != "misses"} for s in (4.0, 1.0, 2.0)]
    whole = [turn(s, misses=0, bytes=0.0) for s in (5.0, 5.0, 5.0)]
    half = [turn(2.0), turn(2.0), turn(2.0, out=[1, 3])]
    results = {MEMORY: memory, Configuration("streamed", 100): whole, HALF: half}
    found = row(HALF, results, disk=100.0)
    assert found["of_mlx_lm"] == 1.0  # of 2, 0.5 and 1
    assert found["tokens_per_second"] == 0.5 and found["hit_rate"] == 0.75
    assert (
        found["roofline"] == 1.0
    )  # the larger of computing (4, 1, 2) and 100 bytes at 100 a second
    assert found["same_tokens"] is False and row(MEMORY, results, 100.0)["same_tokens"] is True
    assert "roofline" not in row(HALF, {MEMORY: memory, HALF: half}, disk=100.0)
    assert "| mlx-lm |" in table([row(MEMORY, results, 1.0), found])
    assert "DIFFERENT" in table([found])


@pytest.mark.smoke
def test_drafts_are_compared_with_the_same_pool() -> None:
    one = Configuration("streamed", 50, mtp="2", executor="rehearse")
    drafted = turn(0.5, drafted=4, accepted=3, passes=2)
    found = row(one, {HALF: [turn(1.0)], one: [drafted]}, 1.0)
    assert (found["of_plain"], found["acceptance"]) == (2.0, 0.75)
    assert found["configuration"] == "50%, mtp 2, rehearse"
    assert "of_mlx_lm" not in found and found["same_tokens"]


@pytest.mark.smoke
def test_what_failed_says_so_and_spoils_no_other_row() -> None:
    results = {MEMORY: [{"failed": "killed by the limit"}], HALF: [turn(1.0)]}
    rows = [row(name, results, 1.0) for name in results]
    assert rows[0]["failed"] == "killed by the limit" and "of_mlx_lm" not in rows[1]
    assert "| mlx-lm | killed by the limit |" in table(rows)


@pytest.mark.smoke
def test_configurations() -> None:
    made = crossed([100, 50], ["off", "1"], ["layerwise", "rehearse"])
    assert len(made) == len(set(made)) == 6  # nothing pages at 100%
    assert HALF in suite([100, 50], head=True) and len(suite([None], head=False)) == 4
    assert {c.mtp for c in suite([50], head=False)} == {"off"}


@pytest.mark.smoke
def test_what_does_not_fit_in_memory_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    names = [MEMORY, *crossed([100, 50, 25], ["off"], ["layerwise"]), LLAMA]
    opened = open_model(DEMO)
    each = PROCESS + opened.trunk_bytes
    assert _fitting(names, opened, 5 * each + (64 << 20)) == names
    fewer = _fitting(names, opened, 2 * each + (9 << 20))
    assert [c.label for c in fewer] == ["50%", "25%", "llama.cpp"]
    assert "mlx-lm: left out" in capsys.readouterr().err
    with pytest.raises(StreamerError, match="no configuration fits"):
        _fitting(names, opened, each // 2)


# Running


def test_a_run_ends_in_one_json_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_llama: Path
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    command = ["--shares", "50", "--mtp", "off,1", "--rounds", "1", "--tokens", "8"]
    command += ["--llama", str(fake_llama), "--gguf", str(gguf)]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("| experts in memory | tok/s |")
    told = json.loads(out[-1])
    rows = {r["configuration"]: r for r in told["rows"]}
    assert list(rows) == ["mlx-lm", "50%", "50%, mtp 1", "llama.cpp", "llama.cpp, mtp 1"]
    assert all(rows[n]["same_tokens"] for n in ("mlx-lm", "50%", "50%, mtp 1"))
    assert rows["llama.cpp"]["tokens_per_second"] == pytest.approx(1 / 0.25)
    drafting = rows["llama.cpp, mtp 1"]
    assert drafting["of_plain"] == pytest.approx(2) and drafting["acceptance"] == 0.75
    assert 0 < rows["50%"]["hit_rate"] < 1 and rows["50%"]["bytes_per_token"] > 0
    assert told["machine"]["cpu"] and told["machine"]["cores"] >= 1
    assert {"streamer", "mlx", "mlx-lm", "python", "kernel", "llama.cpp"} <= set(told["versions"])
    assert told["versions"]["llama.cpp"] == "1234 (fake)"
    assert "--shares 50" in told["command"]


@pytest.mark.slow
@pytest.mark.timed
def test_quick_ends_within_a_minute() -> None:
    """Of processor time, all its processes together: less than a minute by the clock on a machine
    that does nothing else, whatever this one does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "streamer.bench", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {"mlx-lm", "100%", "50%, mtp auto", "50%, rehearse"} <= {
        r["configuration"] for r in rows
    }
    assert all(r["same_tokens"] for r in rows)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shares", "half"], "not a list of percentages"),
        (["--shares", "0"], "not a list of percentages"),
        (["--mtp", "9"], "not a list of off, auto"),
        (["--executor", "fast"], "not a list of layerwise"),
        (["--kv-bits", "5"], "not a list of 16, 8"),
        (["--llama", "x"], "--llama and --gguf go together"),
        (["--llama", "x", "--gguf", "y", "--shares", "50"], "there is no file x"),
        (["--limit", "much"], "not a memory size"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--no-memory-row", *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_model_that_no_worker_could_open_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_tiny("qwen3_moe", tmp_path / "m")
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert main(["--model", str(broken), "--shares", "50"]) == 2
    err = capsys.readouterr().err
    assert "no usable tokenizer" in err and err.count("\n") == 1


@pytest.mark.smoke
def test_nothing_measured_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = "ended without a result"
    for why, good, code in ((lost, 0, 1), (lost, 1, 1), (KILLED, 0, 1), (KILLED, 1, 0)):

        def turns(names: Any, *_: Any, why: str = why, good: int = good) -> Any:
            made = [{"failed": why}, turn(1.0) if good else {"failed": why}]
            return {name: [one] for name, one in zip(names, made, strict=True)}

        monkeypatch.setattr(bench, "_turns", turns)
        assert main(["--shares", "50"]) == code
        assert f"| mlx-lm | {why} |" in capsys.readouterr().out


@pytest.mark.smoke
def test_an_interruption_is_for_the_parent_alone() -> None:
    worker = Worker(HALF, JOB, None)
    try:
        assert os.getpgid(worker._process.pid) != os.getpgid(0)
    finally:
        worker.close()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_configuration_that_the_limit_kills_is_a_row() -> None:
    with memory_cgroup(16 << 20) as group:
        worker = Worker(HALF, JOB, group)
        try:
            assert worker.run() == {"failed": "killed by the limit"}
            assert worker.run() == {"failed": "killed by the limit"}
        finally:
            worker.close()


# llama.cpp

SERVER = """#!{python}
import http.server, json, sys
if "--version" in sys.argv:
    print("version: 1234 (fake)", file=sys.stderr); sys.exit()
if "--die" in sys.argv:
    sys.exit(3)
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        self.send_response(503 if asked == 1 else 200)  # still loading
        self.end_headers()
        self.wfile.write(b"{{}}")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = body["n_predict"]
        told = {{"predicted_n": n, "predicted_ms": 250.0 * (n - 1)}}
        if "--spec-type draft-mtp --spec-draft-n-max 1" in " ".join(sys.argv):
            told["predicted_ms"] /= 2
            told |= {{"draft_n": 8, "draft_n_accepted": 6}}
        told = {{"content": "x", "timings": told}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(SERVER.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_a_server_that_ends_is_a_row(fake_llama: Path) -> None:
    llama = Llama(fake_llama, fake_llama, JOB, None, "--die")
    try:
        assert llama.run() == {"failed": "ended with exit code 3"}
    finally:
        llama.close()


@pytest.mark.smoke
def test_labels_and_what_was_measured_on() -> None:
    assert LLAMA.label == "llama.cpp" and Configuration("streamed").label == "what fits"
    assert machine()["memory_bytes"] > 1 << 28 and versions()["mlx-lm"]
    assert parser().prog == "streamer bench"
    assert all(name in parser().format_help() for name in EXECUTORS)
