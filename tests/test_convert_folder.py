"""The folder a conversion writes: what goes along, cuts and damage, refusals, memory taken."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import converting
import mlx.core as mx
import pytest
from converting import (
    HEAD,
    SMALL,
    Error,
    add_tensors,
    assert_equal,
    run,
    tensors,
    tree,
)
from families import make_tiny

from streamer import cli, convert
from streamer.checkpoint import Checkpoint
from streamer.journal import Journal

Usage = namedtuple("Usage", "total used free")
small_pieces, error = converting.small_pieces, converting.error


def test_files_go_along(tmp_path: Path) -> None:
    src, dst = make_tiny("deepseek_v3", tmp_path / "src", layout="packed"), tmp_path / "dst"
    (src / "chat_template.jinja").write_text("{{ messages }}")
    (src / "tokenization_x.py").write_text("x = 1\n")
    (src / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert run(src, dst) == 0
    assert "quantization_config" not in json.loads((dst / "config.json").read_text())
    same = ["chat_template.jinja", "tokenization_x.py", "tokenizer.json", "tokenizer_config.json"]
    assert all((src / n).read_bytes() == (dst / n).read_bytes() for n in same)
    shards = {p.name for p in dst.glob("model-*.safetensors")}
    index = "model.safetensors.index.json"
    assert {p.name for p in dst.iterdir()} == {*same, *shards, index, "config.json"}


@pytest.mark.parametrize(
    ("family", "prefix", "file"),
    [
        ("qwen3_5_moe", "mtp.", "model.safetensors"),
        ("qwen3_5_moe", "mtp.", "mtp.safetensors"),
        ("kimi_linear", "model.mtp_layers.", "model.safetensors"),
        ("glm4_moe", "model.layers.{}.", "model.safetensors"),
    ],
)
def test_the_mtp_head_is_carried_over(tmp_path: Path, family: str, prefix: str, file: str) -> None:
    src, dst = make_tiny(family, tmp_path / "src"), tmp_path / "dst"
    layers = json.loads((src / "config.json").read_text()).get("num_hidden_layers")
    head = {prefix.format(layers) + name: array for name, array in HEAD.items()}
    add_tensors(src / file, head)
    assert run(src, dst, "--bits", "4") == 0
    assert_equal(mx.load(str(dst / "mtp.safetensors")), head)
    assert not head.keys() & tensors(dst).keys()


def test_a_head_that_the_model_uses_is_no_head(tmp_path: Path) -> None:
    src = make_tiny("qwen3_5_moe", tmp_path / "src")
    add_tensors(src / "model.safetensors", {"mtp." + n: a for n, a in HEAD.items()})
    head = convert._head(Checkpoint.open(src), {"mtp.norm"})
    assert [t.name for t in head] == ["mtp.fc.weight"]


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Interrupt conversions before the n-th piece; None: no more."""
    limit: int | None = None
    real = convert._computed

    def computed(*args: Any) -> Iterator[Any]:
        nonlocal limit
        for piece in real(*args):
            if limit is not None:
                limit -= 1
                if limit < 0:
                    raise KeyboardInterrupt
            yield piece

    def at(pieces: int | None) -> None:
        nonlocal limit
        limit = pieces

    monkeypatch.setattr(convert, "_computed", computed)
    return at


@pytest.mark.parametrize("options", [[], ["--bits", "4"]])
@pytest.mark.parametrize("after", [0, 7, 60])
def test_a_cut_conversion_goes_on(
    tmp_path: Path, cut: Callable, capsys: pytest.CaptureFixture[str], options: list, after: int
) -> None:
    src, dst = make_tiny("qwen3_moe", tmp_path / "src", layout="hf"), tmp_path / "dst"
    add_tensors(src / "mtp.safetensors", {"mtp.fc": mx.ones((8, 8))})
    assert run(src, tmp_path / "whole", *SMALL, *options) == 0
    cut(after)
    assert run(src, dst, *SMALL, *options) == 130
    assert "goes on" in capsys.readouterr().err
    assert not dst.exists()
    cut(None)
    finished = sorted((tmp_path / ".dst.partial").glob("model*"))[:-1]
    stamps = [p.stat().st_mtime_ns for p in finished]
    assert run(src, dst, *SMALL, *options) == 0
    assert [(dst / p.name).stat().st_mtime_ns for p in finished] == stamps
    assert tree(dst) == tree(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def begun(tmp_path: Path, cut: Callable, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """A source, and where its conversion was cut short after a few shards."""
    src = make_tiny("qwen3_moe", tmp_path / "src", layout="hf")
    cut(60)
    assert run(src, tmp_path / "dst", *SMALL) == 130
    cut(None)
    capsys.readouterr()
    return src, tmp_path / "dst"


def test_conversions_do_not_mix(
    tmp_path: Path, cut: Callable, error: Error, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = begun(tmp_path, cut, capsys)
    before = tree(tmp_path / ".dst.partial")
    for options in (["--dtype", "float16"], ["--bits", "4"], ["--shard-bytes", "100000"]):
        assert run(src, dst, *SMALL, *options) == 2
        assert "another conversion" in error()
    other = make_tiny("qwen3_moe", tmp_path / "other", changes={"num_experts": 16})
    assert run(other, dst, *SMALL) == 2
    assert "another conversion" in error()
    assert tree(tmp_path / ".dst.partial") == before
    (tmp_path / ".dst.partial" / ".journal.json").write_text("[")
    assert run(src, dst, *SMALL) == 2
    assert "damaged" in error()


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_finished_file_that_went_bad_is_written_again(
    tmp_path: Path, cut: Callable, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    src, dst = begun(tmp_path, cut, capsys)
    first = min((tmp_path / ".dst.partial").glob("model*"))
    whole = first.read_bytes()
    first.unlink()
    if damage == "shorter":
        first.write_bytes(whole[:-1])
    assert run(src, dst, *SMALL) == 0
    assert (dst / first.name).read_bytes() == whole


def test_what_was_written_is_read_back(
    tmp_path: Path, cut: Callable, error: Error, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = begun(tmp_path, cut, capsys)
    first = min((tmp_path / ".dst.partial").glob("model*"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(src, dst, *SMALL) == 2
    assert first.name in error()
    assert not dst.exists()
    assert run(src, dst, *SMALL) == 0
    assert (dst / first.name).read_bytes() == whole


def test_two_at_once(
    tmp_path: Path, cut: Callable, error: Error, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = begun(tmp_path, cut, capsys)
    job = json.loads((tmp_path / ".dst.partial" / ".journal.json").read_text())["job"]
    with Journal(tmp_path / ".dst.partial", job):
        assert run(src, dst, *SMALL) == 2
    assert "another process" in error()
    assert run(src, dst, *SMALL) == 0


def test_refusals(tmp_path: Path, error: Error) -> None:
    src = make_tiny("qwen3_moe", tmp_path / "src")
    (tmp_path / "file").write_text("")
    (tmp_path / ".foreign.partial").mkdir()
    (tmp_path / ".foreign.partial" / "diary.txt").write_text("mine")
    new = tmp_path / "new"
    for argv, what in (
        ([src, src], "is the source"),
        ([src, tmp_path / "src" / ".." / "src"], "is the source"),
        ([src, src / "new"], "is inside the source"),
        ([src, tmp_path / "none" / ".." / "src" / "a" / "b"], "is inside the source"),
        ([src, tmp_path], "exists"),
        ([src, tmp_path / "file"], "exists"),
        ([src, tmp_path / "file" / "new"], "file"),
        ([src, tmp_path / "foreign"], "holds files of another program"),
        ([tmp_path / "none", new], "no such folder"),
        ([src], "DST"),
        ([src, new, "--bits", "7"], "--bits"),
        ([src, new, "--bits", "nan"], "--bits"),
        ([src, new, "--group-size", "48"], "--group-size"),
        ([src, new, "--group-size", "16"], "nvfp4"),
        ([src, new, "--mode", "int3"], "--mode"),
        ([src, new, "--mode", "mxfp4", "--bits", "8"], "mxfp4 is 4 bits in groups of 32"),
        ([src, new, "--mode", "nvfp4", "--group-size", "32"], "nvfp4 is 4 bits in groups of 16"),
        ([src, new, "--dtype", "float8"], "--dtype"),
        ([src, new, "--shard-bytes", "0"], "--shard-bytes"),
    ):
        assert run(*argv) == 2, argv
        assert what in error()
    assert (tmp_path / ".foreign.partial" / "diary.txt").read_text() == "mine"
    config = json.loads((src / "config.json").read_text())
    for changes, what in (
        ({"model_type": "unknown_kind"}, "unknown_kind"),
        ({"num_experts": 4}, "does not load as 'qwen3_moe'"),
        ({"model_file": "evil.py"}, "custom module"),
    ):
        (src / "config.json").write_text(json.dumps(config | changes))
        assert run(src, new) == 2
        assert what in error()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".foreign.partial", "file", "src"]
    assert not [p.name for p in src.iterdir() if p.is_dir()]


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Error) -> None:
    src, dst = make_tiny("qwen3_moe", tmp_path / "src"), tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, convert.SPARE))
        assert run(src, dst) == 2
    assert "the disk has 0.1 GB free" in error()
    assert [p.name for p in tmp_path.iterdir()] == ["src"]

    def full(*_: Any) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield b""

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_computed", full)
        assert run(src, dst) == 2
    assert "No space left on device" in error()
    assert run(src, dst) == 0


def test_what_does_not_stream_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = make_tiny("qwen3_moe", tmp_path / "src"), tmp_path / "dst"
    add_tensors(src / "mtp.safetensors", HEAD)
    real = convert.write_index

    def write_index(folder: Path, shards: Any) -> None:
        real(folder, shards[:0])
        max(folder.glob("model-*")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_index", write_index)
        assert run(src, dst, *SMALL) == 2
    assert "does not stream" in capsys.readouterr().err
    assert not dst.exists()
    head = (tmp_path / ".dst.partial" / "mtp.safetensors").stat().st_mtime_ns
    assert run(src, dst, *SMALL) == 0
    assert (dst / "mtp.safetensors").stat().st_mtime_ns == head


def test_cut_off_while_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Error
) -> None:
    src = make_tiny("llama4", tmp_path / "src", layout="hf")
    shard = src / "model.safetensors"
    real = convert._parameters

    def cut_off(*args: Any) -> Any:
        made = real(*args)
        shard.write_bytes(shard.read_bytes()[:50_000])
        return made

    monkeypatch.setattr(convert, "_parameters", cut_off)
    assert run(src, tmp_path / "dst") == 2
    assert str(shard) in error()


def test_the_entries(tmp_path: Path) -> None:
    src = make_tiny("llama4", tmp_path / "src", layout="hf")
    root = Path(convert.__file__).parents[1]
    for module in ("streamer.convert", "tools.convert"):
        argv = [sys.executable, "-m", module, src, tmp_path / module]
        done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert cli.main(["convert", str(src), str(tmp_path / "cli")]) == 0
    assert tree(tmp_path / "cli") == tree(tmp_path / "tools.convert")


MEASURE = """
import sys
from streamer import convert

def high():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

small, src, dst, *options = sys.argv[1:]
assert convert.main([small, dst + "-small", *options]) == 0
before = high()
assert convert.main([src, dst, *options]) == 0
print(high() - before)
"""
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {"num_experts": 32, "moe_intermediate_size": 4096, "num_hidden_layers": 1},
    "qwen3_moe": {"num_experts": 64, "moe_intermediate_size": 4096, "num_hidden_layers": 1},
    "deepseek_v3": {
        "hidden_size": 256,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 64,
        "num_hidden_layers": 2,
    },
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("family", "form", "options"),
    [
        ("qwen3_vl_moe", {"layout": "hf"}, []),
        ("qwen3_vl_moe", {"layout": "hf"}, ["--bits", "8"]),
        ("qwen3_moe", {"quantization": {"bits": 8, "group_size": 64}}, ["--bits", "4"]),
        ("deepseek_v3", {"layout": "packed"}, []),
        ("deepseek_v3", {"layout": "packed"}, ["--bits", "4"]),
    ],
)
def test_memory_is_bounded(tmp_path: Path, family: str, form: dict, options: list[str]) -> None:
    small = make_tiny(family, tmp_path / "small", **form)
    src = make_tiny(family, tmp_path / "src", **form, changes=WIDE[family])
    dst = tmp_path / "dst"
    root = Path(convert.__file__).parents[1]
    argv = [sys.executable, "-c", MEASURE, small, src, dst, *options]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    largest = max(tensor.nbytes for tensor in Checkpoint.open(dst).tensors.values())
    assert largest >= 8 << 20
    assert int(done.stdout) < 2 * largest + (8 << 20)
