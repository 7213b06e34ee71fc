"""What cannot be paged in place streams once it is converted, to the same bits."""

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

import mlx.core as mx
import pytest
from families import HF_FAMILIES, PACKED, make_tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load, load_model, quantize_model

from streamer import cli, convert, pieces
from streamer.checkpoint import Checkpoint
from streamer.errors import LayoutError
from streamer.journal import Journal
from streamer.loading import load_streamed
from streamer.opened import open_model

TOKENS = mx.array([[5, 9, 200, 31, 7, 8, 9, 100, 3, 3, 250, 17]])
SMALL = ["--shard-bytes", "200000"]
# layouts that cannot be paged in place, and one that can
LAYOUTS = [
    ("gpt_oss", "packed"),
    ("deepseek_v3", "packed"),
    ("kimi_k25", "packed"),
    ("llama4", "hf"),
    ("qwen3_vl_moe", "hf"),
    ("mixtral", "hf"),
]
HEAD = {"fc.weight": mx.arange(12, dtype=mx.float32).reshape(3, 4), "norm": mx.ones(3, mx.bfloat16)}
Usage = namedtuple("Usage", "total used free")
Error = Callable[[], str]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the tests are read in pieces, as large ones are."""
    monkeypatch.setattr(pieces, "PIECE", 5000)


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Error:
    """The one line on stderr since it was last asked for."""

    def read() -> str:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return read


def run(*argv: Any) -> int:
    return convert.main([str(a) for a in argv])


def logits(model: Any) -> mx.array:
    return model(TOKENS, cache=make_prompt_cache(model))


def parameters(model: Any) -> dict[str, mx.array]:
    return {n: a for n, a in dict(tree_flatten(model.parameters())).items() if a is not None}


def assert_equal(got: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        assert mx.array_equal(got[name], array, equal_nan=True), name


def tensors(folder: Path) -> dict[str, mx.array]:
    return {n: a for f in folder.glob("model*.safetensors") for n, a in mx.load(str(f)).items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def add_tensors(path: Path, added: dict[str, mx.array]) -> None:
    held = dict(mx.load(str(path))) if path.exists() else {}
    mx.save_safetensors(str(path), held | added)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_the_converted_checkpoint_streams(tmp_path: Path, family: str, layout: str) -> None:
    src, dst = make_tiny(family, tmp_path / "src", layout=layout, shards=2), tmp_path / "dst"
    if family != "mixtral":
        with pytest.raises(LayoutError, match=r"python -m streamer\.convert"):
            open_model(src)
    assert run(src, dst, *SMALL) == 0
    reference, _ = load(str(src))
    assert_equal(tensors(dst), parameters(reference))
    again, tokenizer = load(str(dst))
    assert tokenizer.encode("def f") == load(str(src))[1].encode("def f")
    reference.set_dtype(mx.float32)  # fp8 is dequantized to bfloat16, too coarse on CPU
    again.set_dtype(mx.float32)
    expected = logits(reference)
    assert mx.array_equal(logits(again), expected)
    for share in (0.0, 0.5):
        slots = int(open_model(dst).experts * share)
        streamed = load_streamed(dst, slots=slots, dtype="float32")
        assert mx.array_equal(logits(streamed), expected)
        streamed.streamer.close()


def fp8(weight: mx.array, block: int = 128) -> tuple[mx.array, mx.array]:
    """e4m3 codes, and the scale of each block of 128 x 128 weights, as DeepSeek publishes them."""
    rows, columns = weight.shape
    padded = mx.pad(weight, ((0, -rows % block), (0, -columns % block)))
    blocks = padded.reshape(padded.shape[0] // block, block, -1, block)
    scale = mx.maximum(mx.abs(blocks).max(axis=(1, 3)), 1e-6) / 448
    codes = mx.to_fp8((blocks / scale[:, None, :, None]).reshape(padded.shape))
    return codes[:rows, :columns], scale


def test_fp8_in_blocks_everywhere(tmp_path: Path) -> None:
    """Attention and experts alike, of more than one block, some of them cut."""
    changes = {"hidden_size": 192, "moe_intermediate_size": 160, "n_routed_experts": 4}
    src = make_tiny("deepseek_v3", tmp_path / "src", layout="hf", changes=changes)
    dst, stored = tmp_path / "dst", {}
    for name, array in mx.load(str(src / "model.safetensors")).items():
        packs = name.endswith("_proj.weight") or "_proj_with_mqa" in name
        stored[name], scale = fp8(array) if packs else (array, None)
        if scale is not None:
            stored[f"{name}_scale_inv"] = scale
    assert sum(a.size > 1 for n, a in stored.items() if n.endswith("scale_inv")) > 20
    mx.save_safetensors(str(src / "model.safetensors"), stored)
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=r"python -m streamer\.convert"):
        open_model(src)
    assert run(src, dst) == 0
    reference, _ = load_model(src)
    assert_equal(tensors(dst), parameters(reference))
    reference.set_dtype(mx.float32)
    streamed = load_streamed(dst, slots=0, dtype="float32")
    assert mx.array_equal(logits(streamed), logits(reference))


def awq(weight: mx.array, group: int) -> dict[str, mx.array]:
    """AutoAWQ's form: codes [in, out / 8] in its order of nibbles, zeros packed alike."""
    codes, scales, biases = mx.quantize(weight, group, 4)
    shifts = mx.arange(0, 32, 4, dtype=mx.uint32)
    order = mx.array([0, 2, 4, 6, 1, 3, 5, 7])
    nibbles = ((codes[..., None] >> shifts) & 15).reshape(weight.shape)
    zeros = mx.clip(mx.round(-biases / scales), 0, 15).astype(mx.uint32)

    def packed(a: mx.array) -> mx.array:
        return (a.T.reshape(a.shape[1], -1, 8)[..., order] << shifts).sum(axis=-1)

    return {
        "qweight": packed(nibbles).astype(mx.int32),
        "qzeros": packed(zeros).astype(mx.int32),
        "scales": scales.T,
    }


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_awq(tmp_path: Path, error: Error, capsys: pytest.CaptureFixture[str], method: str) -> None:
    """In the trunk it streams as it is and converts; mlx-lm reads none in experts."""
    src = make_tiny("qwen3_moe", tmp_path / "src", layout="hf")
    config = json.loads((src / "config.json").read_text())
    quantization = {"quant_method": method, "bits": 4, "group_size": 32}
    (src / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    plain = mx.load(str(src / "model.safetensors"))

    def store(part: str) -> None:
        stored = {}
        for name, array in plain.items():
            base = name.removesuffix(".weight")
            made = awq(array, 32) if part in name and name.endswith("_proj.weight") else None
            stored |= {f"{base}.{n}": a for n, a in made.items()} if made else {name: array}
        mx.save_safetensors(str(src / "model.safetensors"), stored)

    store(".self_attn.")
    expected = logits(load_model(src)[0])
    unpacked, _ = load_model(make_tiny("qwen3_moe", tmp_path / "plain"))
    difference = mx.abs(expected - logits(unpacked)).max().item()
    assert 0 < difference < 0.5 * mx.abs(expected).max().item()
    assert mx.array_equal(logits(load_streamed(src, slots=0)), expected)
    assert run(src, tmp_path / "dst") == 0
    assert mx.array_equal(logits(load_streamed(tmp_path / "dst", slots=0)), expected)
    capsys.readouterr()
    store(".experts.")
    assert run(src, tmp_path / "other") == 2
    assert "experts.0.down_proj.qweight' is packed by AWQ or GPTQ" in error()


@pytest.mark.parametrize("family", sorted({*HF_FAMILIES, *PACKED}))
def test_every_family_converts_to_what_mlx_lm_loads(tmp_path: Path, family: str) -> None:
    layout = "packed" if family in PACKED else "hf"
    src, dst = make_tiny(family, tmp_path / "src", layout=layout), tmp_path / "dst"
    assert run(src, dst) == 0
    assert_equal(tensors(dst), parameters(load_model(src)[0]))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--bits", "4", "--group-size", "32"], (32, 4, "affine")),
        (["--bits", "6"], (None, 6, "affine")),
        (["--group-size", "128"], (128, None, "affine")),
        (["--mode", "mxfp4"], (None, None, "mxfp4")),
        (["--mode", "nvfp4", "--bits", "4"], (None, None, "nvfp4")),
        (["--mode", "mxfp8"], (None, None, "mxfp8")),
    ],
)
@pytest.mark.parametrize(("family", "layout"), [("qwen3_5_moe", "hf"), ("glm4_moe", "hf")])
def test_quantizing_is_mlx_lms(
    tmp_path: Path, family: str, layout: str, options: list[str], arguments: tuple
) -> None:
    src, dst = make_tiny(family, tmp_path / "src", layout=layout), tmp_path / "dst"
    assert run(src, dst, *options) == 0
    group, bits, mode = arguments
    reference, config = quantize_model(*load_model(src), group, bits, mode=mode)
    assert_equal(tensors(dst), parameters(reference))
    assert json.loads((dst / "config.json").read_text())["quantization"] == config["quantization"]
    assert mx.array_equal(logits(load_model(dst)[0]), logits(reference))
    assert mx.array_equal(logits(load_streamed(dst, slots=0)), logits(reference))


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("gpt_oss", {"layout": "packed"}),
        ("qwen3_moe", {"quantization": {"bits": 8, "group_size": 32}}),
        ("mixtral", {"quantization": {"bits": 5, "group_size": 64}, "layout": "hf"}),
    ],
)
def test_what_is_quantized_is_quantized_again(tmp_path: Path, family: str, form: dict) -> None:
    src, dst = make_tiny(family, tmp_path / "src", **form), tmp_path / "dst"
    assert run(src, dst, "--bits", "3", "--group-size", "32") == 0
    model, config = load_model(src)
    config = {k: v for k, v in config.items() if "quantization" not in k}
    reference, config = quantize_model(dequantize_model(model), config, 32, 3)
    assert_equal(tensors(dst), parameters(reference))
    assert json.loads((dst / "config.json").read_text())["quantization"] == config["quantization"]


def test_casting_leaves_what_the_family_keeps(tmp_path: Path) -> None:
    src, dst = make_tiny("glm4_moe", tmp_path / "src", layout="hf"), tmp_path / "dst"
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert run(src, dst, "--dtype", "bfloat16") == 0
    bias = "e_score_correction_bias"
    for name, array in tensors(dst).items():
        assert array.dtype == (mx.float32 if bias in name else mx.bfloat16)
    assert any(bias in name for name in tensors(dst))
    assert json.loads((dst / "config.json").read_text())["torch_dtype"] == "bfloat16"


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
