"""tools/extract_mtp.py takes a head out of an original checkpoint and leaves it intact.

python -m pytest tests/test_extract_mtp.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import HEADS, head_weights, make_head, make_tiny
from mlx.utils import tree_flatten

from mtp.head import Head
from streamer import hub
from streamer.checkpoint import INDEX
from streamer.header import read_header
from streamer.opened import open_model
from streamer.run import DEMO
from tools import extract_mtp

FOUR = {"bits": 4, "group_size": 32}


def head_of(path: Path) -> Head:
    opened = open_model(path, mtp=True)
    assert opened.head is not None, opened.head_notes
    return opened.head


def multiplied_out(module: nn.Module) -> mx.array:
    return mx.dequantize(
        module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits
    )


def run(original: Path | str, beside: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = extract_mtp.main([str(original), "--beside", str(beside)])
    text = capsys.readouterr().err
    if code:
        assert code == 2
        assert text.startswith("error: ") and text.count("\n") == 1
        assert "Traceback" not in text
        assert not list(beside.glob(".*partial"))
    return code, text


@pytest.mark.parametrize("family", HEADS)
def test_every_family(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_head(family, tmp_path / "original")
    converted = make_tiny(family, tmp_path / "converted", quantization=FOUR)
    code, text = run(original, converted, capsys)
    assert code == 0 and "wrote" in text
    want, got = head_of(original), head_of(converted)
    modules = dict(want.named_modules())
    packed = {n: m for n, m in got.named_modules() if hasattr(m, "scales")}
    assert packed and all(m.bits == 8 and m.group_size in (64, 32) for m in packed.values())
    assert not any(n.endswith(("join", "gate")) for n in packed)
    for name, module in packed.items():
        weight = modules[name].weight
        assert mx.abs(multiplied_out(module) - weight).max() < 0.008 * mx.abs(weight).max()
    parameters = dict(tree_flatten(want.parameters()))
    for name, array in tree_flatten(got.parameters()):
        if name.rsplit(".", 1)[0] not in packed:
            assert mx.array_equal(array, parameters[name]), name


def test_into_the_original_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_head("qwen3_next", tmp_path / "m")
    assert run(path, path, capsys)[0] == 0
    assert any(hasattr(m, "bits") for _, m in head_of(path).named_modules())
    code, text = run(path, path, capsys)
    assert code == 2 and "exists" in text


def test_what_is_quantized_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DEMO / name, tmp_path / name)
    assert run(DEMO, tmp_path, capsys)[0] == 0
    want, got = (dict(tree_flatten(head_of(p).parameters())) for p in (DEMO, tmp_path))
    assert want.keys() == got.keys()
    assert all(mx.array_equal(want[n], got[n]) and want[n].dtype == got[n].dtype for n in want)


def test_fp8_is_multiplied_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_head("deepseek_v32", tmp_path / "original")
    file = original / "model-mtp.safetensors"
    weights = dict(mx.load(str(file)))
    names = [n for n in weights if ".experts." in n or (".self_attn." in n and "_proj" in n)]
    for name in names:
        weights[name] = mx.to_fp8(weights[name])
        weights[f"{name}_scale_inv"] = mx.ones((1, 1))
    mx.save_safetensors(str(file), weights)
    opened = open_model(original, mtp=True)
    assert opened.head is None
    assert "tools.extract_mtp" in opened.head_notes[0]
    converted = make_tiny("deepseek_v32", tmp_path / "converted", quantization=FOUR)
    assert run(original, converted, capsys)[0] == 0
    module = dict(head_of(converted).named_modules())["units.0.blocks.0.mlp.switch_mlp.up_proj"]
    plain = head_weights("deepseek_v32")["model.layers.3.mlp.experts.2.up_proj.weight"]
    assert mx.abs(multiplied_out(module)[2] - plain).max() < 0.08 * mx.abs(plain).max()


def test_pieces_of_large_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_head("qwen3_5_moe", tmp_path / "original")
    expected = make_tiny("qwen3_5_moe", tmp_path / "whole")
    assert run(original, expected, capsys)[0] == 0
    monkeypatch.setattr("streamer.pieces.PIECE", 1000)
    pieces = make_tiny("qwen3_5_moe", tmp_path / "pieces")
    assert run(original, pieces, capsys)[0] == 0
    assert (pieces / "mtp.safetensors").read_bytes() == (expected / "mtp.safetensors").read_bytes()


def test_repository_only_the_shards_with_the_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = make_head("glm4_moe", tmp_path / "remote", shards=3)
    here = tmp_path / "cache"
    here.mkdir()

    def fetch(_: str, **options: Any) -> str:
        for name in options["allow_patterns"]:
            if (remote / name).exists():
                shutil.copyfile(remote / name, here / name)
        return str(here)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "_unreachable", lambda name, revision: None)
    converted = make_tiny("glm4_moe", tmp_path / "converted", quantization=FOUR)
    assert run("owner/name", converted, capsys)[0] == 0
    assert {p.name for p in here.iterdir()} == {"config.json", INDEX, "model-mtp.safetensors"}
    assert head_of(converted).depth == 1


def test_a_bad_source_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted = make_tiny("glm4_moe", tmp_path / "converted", quantization=FOUR)
    empty = make_tiny("glm4_moe", tmp_path / "empty")
    other = make_tiny("qwen3_moe", tmp_path / "other")
    wrong = make_head("glm4_moe", tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    torn = make_head("glm4_moe", tmp_path / "torn")
    file = torn / "model-mtp.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    partial = make_head("glm4_moe", tmp_path / "partial")
    weights = dict(mx.load(str(partial / "model-mtp.safetensors")))
    weights.pop("model.layers.3.enorm.weight")
    mx.save_safetensors(str(partial / "model-mtp.safetensors"), weights)
    for source, what in (
        (tmp_path / "none", "no such folder"),
        (empty, "has no MTP head"),
        (other, "family"),
        (wrong, "vocab_size is 7 there and 320 here"),
        (torn, "cut off"),
        (partial, "lacks units.0.embed_norm.weight"),
    ):
        code, text = run(source, converted, capsys)
        assert code == 2 and what in text
        assert not (converted / "mtp.safetensors").exists()
    code, text = run(make_head("glm4_moe", tmp_path / "good"), tmp_path / "nowhere", capsys)
    assert code == 2 and "no such folder" in text


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_head("glm4_moe", tmp_path / "original")
    converted = make_tiny("glm4_moe", tmp_path / "converted")
    monkeypatch.setattr(extract_mtp, "SPARE", 1 << 60)
    code, text = run(original, converted, capsys)
    assert code == 2 and "free" in text
    assert not (converted / "mtp.safetensors").exists()


def test_names_and_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_head("step3p5", tmp_path / "original")
    converted = make_tiny("step3p5", tmp_path / "converted", dtype="bfloat16")
    assert run(original, converted, capsys)[0] == 0
    tensors = read_header(converted / "mtp.safetensors")
    assert all(n.startswith("mtp.units.") for n in tensors)
    assert tensors["mtp.units.2.lm_head.weight"].dtype == "U32"
    assert tensors["mtp.units.0.join.weight"].dtype == "F32"
