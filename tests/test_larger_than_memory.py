"""The main job: a model three times as large as the memory there is, page cache counted."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamer.bench import main as bench
from streamer.memory_cgroup import drop_page_cache, memory_cgroup, why_not
from streamer.run import DEMO
from streamer.ways import EXECUTORS
from tools.inflate import main as inflate

pytestmark = [
    pytest.mark.timed,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
PROMPT = "import os\nimport sys\n\n\ndef "
TOKENS = "16"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo with experts of real size, 2 GB or more."""
    path = tmp_path_factory.mktemp("large") / "demo-2gb"
    assert inflate([str(DEMO), str(path), "--expert-bytes", "6500KB"]) == 0
    yield path
    for file in path.glob("*.safetensors"):
        file.unlink()


def size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def run(path: Path, stats: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "streamer.run", "--model", str(path), "--raw"]
    return [*command, "--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", str(stats), *options]


def test_a_third_of_the_model_is_enough(large: Path, tmp_path: Path) -> None:
    assert size(large) >= 2_000_000_000
    limit = size(large) // 3
    in_memory = tmp_path / "memory.json"
    subprocess.run(run(large, in_memory, "--memory", "100%"), check=True, capture_output=True)
    expected = json.loads(in_memory.read_text())
    assert expected["experts"]["slots"] == expected["experts"]["total"]

    for options in ([], ["--memory", "450MB"]):
        drop_page_cache(*large.glob("*.safetensors"))
        limited = tmp_path / "limited.json"
        with memory_cgroup(limit) as group:
            done = group.run(run(large, limited, *options), timeout=300)
        assert done.returncode == 0, done.stderr
        got = json.loads(limited.read_text())
        assert got["tokens"] == expected["tokens"]
        assert got["peak_bytes"] <= got["budget_bytes"] <= limit
        assert group.peak <= limit and not group.killed

    command = ["-m", "mlx_lm", "generate", "--model", str(large), "--prompt", PROMPT]
    drop_page_cache(*large.glob("*.safetensors"))
    with memory_cgroup(limit) as group:
        plain = group.run([sys.executable, *command, "--max-tokens", TOKENS], timeout=300)
    assert plain.returncode != 0 and group.killed == 1


def test_every_executor_reads_what_it_misses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a cgroup each, past the page cache: the kernel's count of reads beside ours."""
    path, limit = tmp_path / "demo", 180 << 20
    assert inflate([str(DEMO), str(path), "--expert-bytes", "1400KB"]) == 0
    assert size(path) > 2 * limit
    command = ["--model", str(path), "--limit", str(limit), "--executor", ",".join(EXECUTORS)]
    capfd.readouterr()
    assert bench([*command, "--tokens", "24", "--rounds", "1", "--no-memory-row"]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [row["executor"] for row in told["rows"]] == list(EXECUTORS)
    for row in told["rows"]:
        assert "failed" not in row, row
        assert row["same_tokens"] and row["peak_bytes"] <= limit
        wanted = row["bytes_per_token"] * 23
        assert row["kernel_bytes"] >= wanted > 0, row
        # prompts read experts too, and guesses some that nothing asks for
        assert row["kernel_bytes"] < 4 * wanted + told["bytes_per_expert"] * told["experts"]
    for file in path.glob("*.safetensors"):
        file.unlink()
