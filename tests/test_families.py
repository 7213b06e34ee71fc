"""Every MoE family streams to the bits that mlx-lm gives with all experts in memory.

python -m pytest tests/test_families.py -m smoke
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import CONFIGS, FAMILIES, HF_FAMILIES, METAL_ONLY, PACKED, make_tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, load_model

from streamer.errors import LayoutError
from streamer.loading import expert_count, load_streamed

# prefill, decode, a verify pass of three rows, a chunk that runs as prefill in any pool
PASSES = [40, *[1] * 8, 3, 130]
TOKENS = np.random.default_rng(1).integers(0, 320, sum(PASSES)).tolist()
SMOKE = ["qwen3_moe", "qwen3_5_moe"]

# no expert of these is a few whole ranges of its file
CONVERTED = [
    ("llama4", "hf"),  # transposed
    ("qwen3_vl_moe", "hf"),
    ("gpt_oss", "packed"),  # gate and up interleaved row by row
    ("deepseek_v3", "packed"),  # fp8, dequantized by mlx-lm
    ("kimi_k25", "packed"),  # int4, whose biases mlx-lm computes
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "4bit": {"quantization": {"bits": 4, "group_size": 32}, "shards": 3},
    "hf": {"layout": "hf", "shards": 2},
    "packed": {"layout": "packed", "shards": 2},
}

_FOUR = {"bits": 4, "group_size": 32}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    **{f"affine{b}": {"bits": b, "group_size": 64} for b in (2, 3, 4, 5, 6, 8)},
    "group32": {"bits": 3, "group_size": 32},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
    "nvfp4-global-scale": {"mode": "nvfp4", "global_scale": True},
    "down-6bit": {**_FOUR, "layers": {"*.switch_mlp.down_proj": {"bits": 6, "group_size": 64}}},
    "layer0-8bit": {**_FOUR, "layers": {"model.layers.0.*_proj": {"bits": 8, "group_size": 32}}},
    "up-unquantized": {**_FOUR, "layers": {"*.switch_mlp.up_proj": False}},
    "layer0-unquantized": {**_FOUR, "layers": {"*.layers.0.mlp.switch_mlp.*": False}},
    "mixed-modes": {"mode": "mxfp4", "layers": {"*.layers.2.*": _FOUR | {"mode": "affine"}}},
}

Checkpoint = Callable[..., tuple[Path, list[mx.array]]]


def logits(model: nn.Module, *, lazy: bool = False) -> list[mx.array]:
    """Of every pass; evaluated pass by pass as generation does, or all at the end."""
    cache, out, at = make_prompt_cache(model), [], 0
    for rows in PASSES:
        out.append(model(mx.array([TOKENS[at : at + rows]]), cache=cache))
        if not lazy:
            mx.eval(out[-1])
        at += rows
    mx.eval(out)
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny checkpoint and its logits with everything in memory, made once."""
    made: dict[str, tuple[Path, list[mx.array]]] = {}

    def make(family: str, **options: Any) -> tuple[Path, list[mx.array]]:
        key = f"{family} {options}"
        if key not in made:
            path = make_tiny(family, tmp_path_factory.mktemp(family), **options)
            made[key] = path, logits(load_model(path)[0])
        return made[key]

    return make


def assert_streams(path: Path, expected: list[mx.array], share: float, **options: Any) -> None:
    """share: of all experts that the pool holds; 0 for the smallest legal pool."""
    total = expert_count(path)
    model = load_streamed(path, slots=int(total * share), **options)
    streamer = model.streamer
    try:
        for i, (got, want) in enumerate(zip(logits(model), expected, strict=True)):
            assert mx.array_equal(got, want), f"pass {i}: off by {mx.abs(got - want).max().item()}"
        if share == 1:
            assert streamer.slots == total
            assert streamer.counters.misses == 0
        else:
            assert streamer.slots <= max(total * share, total / 2)
            assert streamer.counters.misses > streamer.slots, "nothing was evicted"
    finally:
        streamer.close()


def _cases() -> list[Any]:
    cases = []
    for family in FAMILIES:
        marks = [pytest.mark.smoke] if family in SMOKE else []
        if family in METAL_ONLY and not mx.metal.is_available():
            marks.append(pytest.mark.skip(reason="mlx-lm runs this family on Metal only"))
        for variant in VARIANTS:
            if variant == "hf" and family not in HF_FAMILIES:
                continue
            if variant == "packed" and family not in PACKED:
                continue
            if (family, variant) in CONVERTED:
                continue
            for share in (1.0, 0.5, 0.0):
                if share == 1.0 and not (family in SMOKE or variant == "plain"):
                    continue
                name = f"{family}-{variant}-{int(share * 100) or 'smallest'}"
                cases.append(pytest.param(family, variant, share, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("family", "variant", "share"), _cases())
def test_streamed_equals_in_memory(
    checkpoint: Checkpoint, family: str, variant: str, share: float
) -> None:
    path, expected = checkpoint(family, **VARIANTS[variant])
    assert_streams(path, expected, share)


@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantizations(checkpoint: Checkpoint, name: str, share: float) -> None:
    if name == "nvfp4-global-scale" and mx.default_device() == mx.Device(mx.cpu):
        pytest.skip("MLX takes a global scale on GPUs only")
    path, expected = checkpoint("qwen3_moe", quantization=QUANTIZATIONS[name])
    assert_streams(path, expected, share)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2", "jamba"])
def test_quantized_per_expert(checkpoint: Checkpoint, family: str) -> None:
    quantization = VARIANTS["4bit"]["quantization"]
    path, expected = checkpoint(family, quantization=quantization, layout="hf", shards=2)
    assert_streams(path, expected, 0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantization", [None, _FOUR], ids=["plain", "4bit"])
def test_held_wider_than_stored(
    tmp_path: Path, dtype: str, quantization: dict[str, Any] | None
) -> None:
    path = make_tiny("qwen3_moe", tmp_path, dtype=dtype, quantization=quantization)
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    assert_streams(path, logits(model), 0.5, dtype="float32")


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_backends(checkpoint: Checkpoint, io: str) -> None:
    path, expected = checkpoint("qwen3_moe", **VARIANTS["4bit"])
    assert_streams(path, expected, 0.5, io=io)


@pytest.mark.parametrize("family", ["qwen3_moe", "longcat_flash"])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_slots_are_not_refilled_under_lazy_outputs(
    checkpoint: Checkpoint, family: str, share: float
) -> None:
    path, expected = checkpoint(family)
    model = load_streamed(path, slots=int(expert_count(path) * share))
    got = logits(model, lazy=True)
    model.streamer.close()
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_prefill_in_batches(checkpoint: Checkpoint, share: float) -> None:
    changes = {"num_experts": 64, "num_hidden_layers": 5, "moe_intermediate_size": 32}
    path, expected = checkpoint("qwen3_moe", changes=changes)
    assert_streams(path, expected, share)


@pytest.mark.parametrize(("family", "layout"), CONVERTED)
def test_layouts_that_cannot_be_paged_are_refused(tmp_path: Path, family: str, layout: str) -> None:
    path = make_tiny(family, tmp_path, layout=layout)
    load_model(path)  # mlx-lm takes it
    with pytest.raises(LayoutError) as error:
        load_streamed(path)
    message = str(error.value)
    assert str(path) in message
    assert "convert" in message
    assert "\n" not in message


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_original_names_give_the_same_logits(checkpoint: Checkpoint, family: str) -> None:
    _, expected = checkpoint(family)
    path, got = checkpoint(family, **VARIANTS["hf"])
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert np.unique(np.array(got[0][0, -1])).size > 100
    names = {n for file in path.glob("*.safetensors") for n in mx.load(str(file))}
    assert not any(".switch_mlp.gate_proj" in n or ".switch_glu." in n for n in names)


@pytest.mark.parametrize("family", sorted(set(PACKED) - {"deepseek_v3", "kimi_k25"}))
def test_packed_weights_give_the_same_logits(checkpoint: Checkpoint, family: str) -> None:
    _, expected = checkpoint(family, quantization=PACKED[family].quantization)
    _, got = checkpoint(family, **VARIANTS["packed"])
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.smoke
def test_tokenizer_keeps_any_text(tmp_path: Path) -> None:
    _, tokenizer = load(str(make_tiny("qwen3_moe", tmp_path)))
    text = "def naïve(x):\n\treturn '日本' * x  # €\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < CONFIGS["qwen3_moe"]["vocab_size"]
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.strip() in chat


@pytest.mark.smoke
def test_no_family_is_missing() -> None:
    spec = importlib.util.find_spec("mlx_lm.models")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    using = {
        file.stem
        for file in folder.glob("*.py")
        if "SwitchGLU(" in (text := file.read_text()) or "SwitchMLP(" in text
    }
    assert using - {"switch_layers"} <= set(FAMILIES)
