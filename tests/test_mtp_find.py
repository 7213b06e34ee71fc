"""A head is found wherever a checkpoint keeps it, and told from what only looks like one.

python -m pytest tests/test_mtp_find.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import ASSISTED, HEADS, head_shapes, head_weights, make_head, make_tiny
from families import FAMILIES as TRUNKS
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mtp.families import FAMILIES
from mtp.find import HeadError, find_head, head_names
from streamer import head as reading
from streamer import plan
from streamer.budget import divide
from streamer.errors import BudgetError
from streamer.header import read_header
from streamer.loading import load_streamed
from streamer.opened import Opened, open_model

FOUR = {"bits": 4, "group_size": 32}
TOKENS = mx.array(np.random.default_rng(2).integers(0, 320, (1, 9)))
Weights = dict[str, mx.array]


def logits(opened: Opened) -> mx.array:
    head = opened.head
    assert head is not None, opened.head_notes
    hidden = mx.array(np.random.default_rng(3).standard_normal((1, 9, 64)).astype(np.float32))
    return head(hidden, TOKENS, head.make_cache())[0]


def rewrite(path: Path, change: Callable[[Weights], Weights], name: str = "model-mtp") -> Path:
    file = path / f"{name}.safetensors"
    weights = change(dict(mx.load(str(file))))
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)
    return path


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n.replace(old, new, 1): a for n, a in weights.items()}


def test_every_head_of_the_tests_is_known() -> None:
    assert set(FAMILIES) == {*HEADS, *ASSISTED}
    for family in FAMILIES.values():
        inherited = "".join(c.__doc__ or "" for c in type(family).__mro__)
        for what in ("Hidden states:", "Order:", "Norms:", "Heads:", "lm_head", "Source:"):
            assert what in inherited, (type(family).__name__, what)


@pytest.mark.parametrize("family", HEADS)
def test_names(family: str) -> None:
    config = {"model_type": family, "num_hidden_layers": 3, "num_layers": 2}
    shapes = head_shapes(family)
    trunk = ["model.layers.2.mlp.gate.weight", "lm_head.weight", "model.embed_tokens.weight"]
    layers = 4 if family.startswith("qwen") else 5 if family == "nemotron_h" else 3
    config["num_hidden_layers"] = layers
    assert sorted(head_names(config, [*shapes, *trunk])) == sorted(shapes)


PREFIXES = [
    ("qwen3_5_moe", "mtp.", "model.mtp."),
    ("qwen3_5_moe", "mtp.", "language_model.mtp."),
    ("qwen3_5_moe", "mtp.", "model.language_model.mtp."),
    ("qwen3_5", "mtp.", "language_model.mtp."),
    ("qwen3_next", "mtp.", "model.mtp."),
    ("glm4_moe", "model.layers.", "language_model.model.layers."),
    ("mimo_v2_flash", "model.mtp.", "mtp."),
    ("nemotron_h", "mtp.", "model.mtp."),
]


@pytest.mark.parametrize(("family", "old", "new"), PREFIXES)
@pytest.mark.parametrize("side", [False, True], ids=["inside", "beside"])
def test_prefixes(tmp_path: Path, family: str, old: str, new: str, side: bool) -> None:
    expected = logits(open_model(make_head(family, tmp_path / "a", side=side), mtp=True))
    path = make_head(family, tmp_path / "b", side=side)
    rewrite(path, renamed(old, new), "mtp" if side else "model-mtp")
    assert mx.array_equal(logits(open_model(path, mtp=True)), expected)


@pytest.mark.parametrize("family", ["qwen3_5", "nemotron_h"])
def test_a_side_file_without_a_prefix(tmp_path: Path, family: str) -> None:
    expected = logits(open_model(make_head(family, tmp_path / "a"), mtp=True))
    path = rewrite(make_head(family, tmp_path / "b", side=True), renamed("mtp.", ""), "mtp")
    assert mx.array_equal(logits(open_model(path, mtp=True)), expected)


def test_experts_in_two_tensors_or_one_by_one(tmp_path: Path) -> None:
    fused = make_head("qwen3_5_moe", tmp_path / "fused")

    def apart(weights: Weights) -> Weights:
        base = "mtp.layers.0.mlp.experts"
        both, down = weights.pop(f"{base}.gate_up_proj"), weights.pop(f"{base}.down_proj")
        for e in range(both.shape[0]):
            gate, up = mx.split(both[e], 2)
            weights[f"{base}.{e}.gate_proj.weight"] = gate
            weights[f"{base}.{e}.up_proj.weight"] = up
            weights[f"{base}.{e}.down_proj.weight"] = down[e]
        return weights

    each = rewrite(make_head("qwen3_5_moe", tmp_path / "each"), apart)
    want, got = open_model(fused, mtp=True), open_model(each, mtp=True)
    assert len(each.joinpath("model-mtp.safetensors").read_bytes()) > 0
    assert mx.array_equal(logits(want), logits(got))
    assert want.layers[-1].count == got.layers[-1].count == 16
    assert not np.array_equal(want.layers[-1].starts[0], got.layers[-1].starts[0])


def test_further_layers_of_qwen_are_further_depths(tmp_path: Path) -> None:
    def twice(weights: Weights) -> Weights:
        layer = {n: a for n, a in weights.items() if ".layers.0." in n}
        return weights | {n.replace("layers.0", "layers.1"): a * 1.5 for n, a in layer.items()}

    one = open_model(make_head("qwen3_5", tmp_path / "one"), mtp=True)
    two = open_model(rewrite(make_head("qwen3_5", tmp_path / "two"), twice), mtp=True)
    assert one.head is not None and two.head is not None
    assert (one.head.depth, two.head.depth) == (1, 2)
    assert mx.array_equal(logits(one), logits(two))
    first, second = two.head.units
    assert mx.array_equal(first.join.weight, second.join.weight)
    up = [unit.blocks[0].mlp.up_proj.weight for unit in two.head.units]
    assert mx.array_equal(up[0] * 1.5, up[1])


def test_a_family_by_another_name(tmp_path: Path) -> None:
    path = make_head("deepseek_v3", tmp_path / "m")
    expected = logits(open_model(path, mtp=True))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "joyai_llm_flash"}))
    assert mx.array_equal(logits(open_model(path, mtp=True)), expected)


def test_a_side_file_goes_before_the_shards(tmp_path: Path) -> None:
    path = make_head("glm4_moe", tmp_path / "m", seed=1)
    mx.save_safetensors(str(path / "mtp.safetensors"), head_weights("glm4_moe", seed=2))
    other = make_head("glm4_moe", tmp_path / "other", seed=2)
    opened = open_model(path, mtp=True)
    assert mx.array_equal(logits(opened), logits(open_model(other, mtp=True)))
    assert opened.files[-1].name == "mtp.safetensors"
    assert opened.checkpoint.fingerprint == open_model(path).checkpoint.fingerprint


def test_side_files_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    path = make_head("glm4_moe", tmp_path / "m")
    mx.save_safetensors(str(path / "consolidated.safetensors"), {"tok.weight": mx.zeros(3)})
    opened = open_model(path, mtp=True)
    assert opened.head is not None
    assert opened.files == opened.checkpoint.files


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_a_head_that_mlx_lm_trips_over_is_hidden_from_it(tmp_path: Path, family: str) -> None:
    path = make_head(family, tmp_path / "m", quantization=FOUR)
    with pytest.raises(ValueError, match="not in model"):
        load_model(path)
    assert open_model(path).head is None
    assert open_model(path, mtp=True).head is not None


@pytest.mark.parametrize("family", sorted(set(TRUNKS) & set(HEADS)))
def test_no_head(tmp_path: Path, family: str) -> None:
    opened = open_model(make_tiny(family, tmp_path / "plain"), mtp=True)
    assert opened.head is None
    assert opened.head_notes == ("plain has no MTP head",)
    assert opened.head_bytes == opened.head_kv_bytes(100) == 0
    assert opened.layers == opened.trunk_layers


def test_off_is_as_if_there_were_none(tmp_path: Path) -> None:
    plain = open_model(make_tiny("qwen3_next", tmp_path / "plain"))
    with_head = open_model(make_head("qwen3_next", tmp_path / "head"))
    assert with_head.head is None and with_head.head_notes == ()
    assert "mtp" not in with_head.model
    assert with_head.trunk_bytes == plain.trunk_bytes
    assert [x.path for x in with_head.layers] == [x.path for x in plain.layers]
    load_streamed(tmp_path / "head").streamer.close()


def _packed(path: Path, choose: Callable[[str], Any]) -> Path:
    """A checkpoint whose head is quantized as `choose` says of each module; its expected form."""
    model, config = load_model(make_tiny("qwen3_5_moe", path, quantization=FOUR))
    head = find_head(model, config, head_weights("qwen3_5_moe"))
    nn.quantize(
        head,
        class_predicate=lambda n, m: hasattr(m, "to_quantized") and choose(n),
    )
    weights = {f"mtp.{n}": a for n, a in tree_flatten(head.parameters())}
    mx.save_safetensors(str(path / "mtp.safetensors"), weights)
    return path


CHOICES: dict[str, Callable[[str], Any]] = {
    "8": lambda n: {"bits": 8, "group_size": 64},
    "6-and-join": lambda n: {"bits": 6, "group_size": 32},
    "mixed": lambda n: {"bits": 8 if "attn" in n else 3, "group_size": 64 if "q_" in n else 32},
    "some": lambda n: "down_proj" in n and {"bits": 5, "group_size": 64},
    "mxfp8": lambda n: "mlp.switch" in n and {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "mxfp4": lambda n: "mlp.switch" in n and {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_bits_are_read_off_the_shapes(tmp_path: Path, name: str) -> None:
    path = _packed(tmp_path / "m", CHOICES[name])
    opened = open_model(path, mtp=True)
    assert opened.head is not None, opened.head_notes
    for at, module in opened.head.named_modules():
        chosen = CHOICES[name](at) if hasattr(module, "bits") else None
        if chosen:
            got = {"bits": module.bits, "group_size": module.group_size, "mode": module.mode}
            assert got == {"mode": "affine"} | chosen, at
    bits = {module.bits for _, module in opened.head.named_modules() if hasattr(module, "bits")}
    assert f", {' and '.join(map(str, sorted(bits)))} bits, " in opened.head_notes[0]
    assert any("fewer than 8 bits" in n for n in opened.head_notes) == (min(bits) < 8)
    assert mx.isfinite(logits(opened)).all()
    trunk = next(m for n, m in opened.model.named_modules() if n.endswith("layers.3.mlp.gate"))
    assert trunk.bits == 8  # as the family's rule has it, the head notwithstanding


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5", "qwen3_next", "step3p5"])
def test_zero_centred_norms_are_told_from_others(tmp_path: Path, family: str) -> None:
    raw = open_model(make_head(family, tmp_path / "raw", centred=True), mtp=True)
    done = open_model(make_head(family, tmp_path / "done", centred=False), mtp=True)
    assert mx.allclose(logits(raw), logits(done), atol=1e-5)
    assert "zero-centred, 1 added" in raw.head_notes[1]
    assert "as they multiply, nothing added" in done.head_notes[1]


# means of published heads: less 1 and as they multiply (MTPLX #301 and #511, omlx #3750)
LESS_ONE = [
    {"input_layernorm": 0.303, "post_attention_layernorm": 0.39, "q_norm": 0.746, "norm": 2.58},
    {"input_layernorm": 0.04, "post_attention_layernorm": 0.21, "q_norm": 0.79, "norm": 1.25},
]
MULTIPLYING = [
    {"input_layernorm": 1.04, "post_attention_layernorm": 1.21, "q_norm": 1.79, "norm": 2.25},
    {"input_layernorm": 0.87, "post_attention_layernorm": 0.9, "pre_fc_norm_embedding": 0.2734},
]


@pytest.mark.parametrize(
    ("means", "centred"),
    [*((m, True) for m in LESS_ONE), *((m, False) for m in MULTIPLYING)],
)
def test_norms_of_published_heads(tmp_path: Path, means: dict[str, float], centred: bool) -> None:
    def like(weights: Weights) -> Weights:
        return {
            n: a * 0 + means.get(n.split(".")[-2], 1.5) if n.endswith("norm.weight") else a
            for n, a in weights.items()
        }

    opened = open_model(rewrite(make_head("qwen3_5", tmp_path / "m"), like), mtp=True)
    assert opened.head is not None
    got = opened.head.units[0].blocks[0].input_layernorm.weight.mean().item()
    assert got == pytest.approx(means["input_layernorm"] + centred, abs=1e-5)
    assert ("1 added" in opened.head_notes[1]) == centred


@pytest.mark.parametrize("stated", [True, False])
def test_what_the_configuration_says_of_norms_goes_first(tmp_path: Path, stated: bool) -> None:
    path = make_head("qwen3_5", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mtp_norms_zero_centred": stated}))
    assert ("1 added" in open_model(path, mtp=True).head_notes[1]) == stated


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: a for n, a in weights.items() if name not in n}


DAMAGE: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (without("enorm"), "lacks units.0.embed_norm.weight"),
    "two missing": (without("shared_experts.up"), "lacks units.0.blocks.0.mlp.shared"),
    "an expert missing": (without("experts.3."), "MTP head"),
    "surplus": (
        lambda w: w | {"model.layers.3.self_attn.sinks": mx.zeros(4)},
        "no place for units.0.blocks.0.self_attn.sinks",
    ),
    "shape": (
        lambda w: w | {"model.layers.3.eh_proj.weight": mx.zeros((64, 64))},
        "join.weight of the MTP head is (64, 64) and should be (64, 128)",
    ),
    "gap": (renamed("model.layers.3.", "model.layers.4."), "has unit 1 and not all before it"),
    "copies": (
        lambda w: {n: a for n, a in w.items() if "embed_tokens" in n},
        "only copies of the trunk's tensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_head_is_not_used(tmp_path: Path, name: str) -> None:
    change, what = DAMAGE[name]
    opened = open_model(rewrite(make_head("glm4_moe", tmp_path / "m"), change), mtp=True)
    assert opened.head is None
    (note,) = opened.head_notes
    assert what in note and note.startswith("m is used without MTP head") and "\n" not in note
    assert "mtp" not in opened.model
    assert opened.head_bytes == 0


def test_a_damaged_side_file_is_not_used(tmp_path: Path) -> None:
    path = make_head("glm4_moe", tmp_path / "m", side=True)
    file = path / "mtp.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    opened = open_model(path, mtp=True)
    assert opened.head is None and "cut off" in opened.head_notes[0]


def test_find_head_alone(tmp_path: Path) -> None:
    model, config = load_model(make_tiny("glm4_moe", tmp_path / "m"))
    lines: list[str] = []
    head = find_head(model, config, head_weights("glm4_moe"), lines.append)
    assert head is not None and lines == head.notes
    assert find_head(model, config, {}) is None
    assert find_head(model, config, {"lm_head.weight": mx.zeros(1)}) is None
    assert find_head(model, {"model_type": "qwen3_moe"}, head_weights("glm4_moe")) is None
    with pytest.raises(HeadError):
        find_head(model, config, without("hnorm")(head_weights("glm4_moe")))


@pytest.mark.parametrize("side", [False, True])
def test_the_budget_counts_the_head(tmp_path: Path, side: bool) -> None:
    path = make_head("qwen3_next", tmp_path / "m", side=side)
    plain, opened = open_model(path, "stored"), open_model(path, "stored", mtp=True)
    names = [n for n in head_shapes("qwen3_next") if ".experts." not in n]
    header = read_header(path / ("mtp.safetensors" if side else "model-mtp.safetensors"))
    assert opened.head_bytes == sum(header[n].nbytes for n in names)
    assert opened.trunk_bytes == plain.trunk_bytes
    assert opened.head_kv_bytes(300) == 512 * 2 * 2 * 16 * 4  # rows, K and V, heads, width, float32
    assert opened.experts == plain.experts + 8
    with_head, without_head = (divide(o, 1 << 34, 300) for o in (opened, plain))
    assert (with_head.head, with_head.head_kv) == (opened.head_bytes, opened.head_kv_bytes(300))
    assert (without_head.head, without_head.head_kv) == (0, 0)
    more = opened.head_bytes + opened.head_kv_bytes(300)
    assert with_head.kv == without_head.kv
    held = with_head.runtime + with_head.trunk + with_head.kv + with_head.workspace
    assert with_head.total == held + with_head.pool + more
    assert with_head.smallest - with_head.runtime >= more + without_head.smallest - (
        without_head.runtime
    )
    with pytest.raises(BudgetError, match="MTP head"):
        divide(opened, 1 << 20, 300)


def test_the_plan_shows_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(make_head("qwen3_next", tmp_path / "m"))
    arguments = ["--model", path, "--memory", "50%", "--io", "pread"][:4]
    assert plan.main(arguments) == 0
    assert "MTP" not in capsys.readouterr().out
    assert plan.main([*arguments, "--mtp", "auto"]) == 0
    table = capsys.readouterr().out
    assert "  MTP head   " in table and "8 experts paged with the trunk's" in table
    assert plan.main([*arguments, "--mtp", "auto", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["budget"]["head"] > 0 and document["budget"]["head_kv"] > 0
    assert document["mtp"][0].startswith("MTP head: 1 unit")
    empty = str(make_tiny("qwen3_next", tmp_path / "empty"))
    assert plan.main(["--model", empty, "--mtp", "auto"]) == 0
    assert "empty has no MTP head" in capsys.readouterr().out


def test_the_command_says_what_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reading.main(["--model", str(make_head("step3p5", tmp_path / "m"))]) == 0
    text = capsys.readouterr().out
    assert "3 units, not quantized, takes hidden states before the final norm" in text
    assert "zero-centred, 1 added" in text
    assert reading.main(["--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
