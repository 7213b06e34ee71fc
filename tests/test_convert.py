"""What cannot be paged in place streams once it is converted, to the same bits."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model

from streamer import convert
from streamer.errors import LayoutError
from streamer.loading import load_streamed
from streamer.opened import open_model

TOKENS = mx.array([[5, 9, 200, 31, 7, 8, 9, 100, 3, 3, 250, 17]])


def logits(model: Any) -> mx.array:
    return model(TOKENS, cache=make_prompt_cache(model))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_oss", {"layout": "packed"}),
        ("llama4", {"layout": "hf"}),
        ("mixtral", {"layout": "hf"}),
    ],
)
def test_the_converted_checkpoint_streams(tmp_path: Path, family: str, options: dict) -> None:
    src, dst = make_tiny(family, tmp_path / "src", **options), tmp_path / "dst"
    if family != "mixtral":
        with pytest.raises(LayoutError, match=r"python -m streamer\.convert"):
            open_model(src)
    assert convert.main([str(src), str(dst)]) == 0
    expected = logits(load_model(src)[0])
    assert mx.array_equal(logits(load_model(dst)[0]), expected)
    assert mx.array_equal(logits(load_streamed(dst, slots=0)), expected)


def test_quantizing_is_mlx_lms(tmp_path: Path) -> None:
    src, dst = make_tiny("qwen3_5_moe", tmp_path / "src"), tmp_path / "dst"
    assert convert.main([str(src), str(dst), "--bits", "4", "--group-size", "32"]) == 0
    reference, _ = quantize_model(*load_model(src), 32, 4)
    assert mx.array_equal(logits(load_model(dst)[0]), logits(reference))


def test_a_cut_conversion_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make_tiny("qwen3_moe", tmp_path / "src", layout="hf")
    small = ["--shard-bytes", "200000"]
    assert convert.main([str(src), str(tmp_path / "whole"), *small]) == 0
    write, calls = convert._write_shard, 0

    def cut(*args: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(convert, "_write_shard", cut)
    dst = tmp_path / "dst"
    assert convert.main([str(src), str(dst), *small]) == 130
    assert not dst.exists()
    assert convert.main([str(src), str(dst), *small, "--dtype", "float16"]) == 2
    assert "another conversion" in capsys.readouterr().err
    calls = 10
    assert convert.main([str(src), str(dst), *small]) == 0
    assert "going on after 2 shards" in capsys.readouterr().err
    assert tree(dst) == tree(tmp_path / "whole")
    assert not list(tmp_path.glob(".*partial"))


def test_what_was_written_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = make_tiny("qwen3_moe", tmp_path / "src"), tmp_path / "dst"
    write = convert._write_shard

    def spoil(path: Path, *args: Any) -> str:
        digest = write(path, *args)
        blob = bytearray(path.read_bytes())
        blob[-1] ^= 1
        path.write_bytes(blob)
        return digest

    monkeypatch.setattr(convert, "_write_shard", spoil)
    assert convert.main([str(src), str(dst)]) == 2
    assert "not what was written" in capsys.readouterr().err and not dst.exists()


def test_the_mtp_head_is_carried_over(tmp_path: Path) -> None:
    src, dst = make_tiny("qwen3_5_moe", tmp_path / "src"), tmp_path / "dst"
    shard = next(src.glob("model*.safetensors"))
    weights = dict(mx.load(str(shard)))
    weights["mtp.fc.weight"] = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    mx.save_safetensors(str(shard), weights)
    index = src / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
    assert convert.main([str(src), str(dst)]) == 0
    head = mx.load(str(dst / "mtp.safetensors"))
    assert mx.array_equal(head["mtp.fc.weight"], weights["mtp.fc.weight"])


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = make_tiny("qwen3_moe", tmp_path / "src", quantization={"bits": 4, "group_size": 32})
    for argv, what in (
        ([src, src], "is the source"),
        ([src, tmp_path], "exists"),
        ([tmp_path / "none", tmp_path / "d"], "no such folder"),
        ([src, tmp_path / "d", "--bits", "4"], "quantized already"),
    ):
        assert convert.main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert what in err and len(err.strip().splitlines()) == 1
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"model_type": "unknown_kind"}))
    assert convert.main([str(src), str(tmp_path / "d")]) == 2
    assert "unknown_kind" in capsys.readouterr().err
