"""What cannot be paged in place streams once it is converted, to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import converting
import mlx.core as mx
import pytest
from converting import (
    SMALL,
    Error,
    assert_equal,
    logits,
    parameters,
    run,
    tensors,
)
from families import HF_FAMILIES, PACKED, make_tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load, load_model, quantize_model

from kernels import fast
from streamer import run as command
from streamer.convert import FIXED
from streamer.errors import LayoutError
from streamer.loading import load_streamed
from streamer.opened import open_model

# layouts that cannot be paged in place, and one that can
LAYOUTS = [
    ("gpt_oss", "packed"),
    ("deepseek_v3", "packed"),
    ("kimi_k25", "packed"),
    ("llama4", "hf"),
    ("qwen3_vl_moe", "hf"),
    ("mixtral", "hf"),
]
small_pieces, error = converting.small_pieces, converting.error


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


@pytest.mark.parametrize("mode", FIXED)
def test_steps_of_every_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    """Rows of such an embedding are bfloat16, and layers of Qwen3.5 take float32."""
    dst = tmp_path / "dst"
    assert run(command.DEMO, dst, "--mode", mode) == 0

    def steps(model: Any) -> list[mx.array]:
        cache = make_prompt_cache(model)
        return [model(mx.array([rows]), cache=cache) for rows in ([3, 1, 4] * 7, [1, 5], [9], [2])]

    reference, _ = load_model(dst)
    reference.set_dtype(mx.float32)
    fast.uninstall()
    plain = steps(reference)
    mx.eval(plain)
    fast.install()
    expected = steps(reference)
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(expected, plain, strict=True))
    for slots, executor in ((None, "layerwise"), (90, "rehearse"), (0, "layerwise")):
        model = load_streamed(dst, slots=slots, dtype="float32", executor=executor)
        got = steps(model)
        assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        model.streamer.close()
    capsys.readouterr()
    texts = set()
    for options in (["--mtp", "off"], ["--mtp", "2"], ["--mtp", "2", "--memory", "50%"]):
        argv = ["--model", str(dst), "--prompt", "def main(", "--max-tokens", "12", *options]
        assert command.main(argv) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and len(texts.pop()) > 12


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
