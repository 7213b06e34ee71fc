"""Layers in fewer operations: equal to mlx-lm's own, and a row alike in any company."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import make_tiny
from mlx_lm.models import qwen3_5, qwen3_next, switch_layers
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache
from mlx_lm.utils import load_model

from kernels import backend, fast, qwen, routed, weights
from mtp.rollback import Tape

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")

FORMS = [(4, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4"), None]
CONFIG = {
    "hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 48,
    "linear_conv_kernel_dim": 4, "num_experts": 8, "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": 64, "moe_intermediate_size": 128, "head_dim": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    mx.random.seed(0)
    fast.install()
    yield


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def close(got: mx.array, want: mx.array, tolerance: float = 2e-6) -> bool:
    """Within `tolerance` of the largest value."""
    return bool((mx.abs(got - want).max() <= tolerance * mx.abs(want).max()).item())


def made(kind: type[nn.Module], form: tuple[int, int, str] | None, *arguments: Any) -> nn.Module:
    """A layer in evaluation mode, quantized unless `form` is None."""
    layer = kind(*arguments)
    layer.eval()
    if form is not None:
        bits, group, mode = form
        nn.quantize(
            layer, group, bits, mode=mode,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] >= group,
        )  # fmt: skip
    mx.eval(layer.parameters())
    return layer


def text_args() -> qwen3_5.TextModelArgs:
    return qwen3_5.TextModelArgs(**CONFIG)


def same(layer: nn.Module, own: Callable[..., mx.array], D: int) -> None:
    """Like mlx-lm's own code; each row the bits that it has alone."""
    x = normal(1, 7, D)
    y = layer(x)
    fast.uninstall()
    want = own(layer, x)
    mx.eval(want)
    fast.install()
    assert close(y, want)
    for i in range(7):
        assert mx.array_equal(layer(x[:, i : i + 1]), y[:, i : i + 1])


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_qwen(form: tuple[int, int, str] | None) -> None:
    layer = made(qwen3_next.Qwen3NextSparseMoeBlock, form, text_args())
    same(layer, weights.MLXLM["moe"], 128)


@pytest.mark.parametrize("form", FORMS[:3])
def test_one_operation_has_the_bits_of_many(
    form: tuple[int, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = made(qwen3_next.Qwen3NextSparseMoeBlock, form, text_args())
    x = normal(1, 5, 128)
    assert routed.whole_moe(layer, 5, None) is not None
    y = layer(x)
    monkeypatch.setattr(routed, "whole_moe", lambda *_: None)
    assert mx.array_equal(layer(x), y)


@pytest.mark.smoke
@pytest.mark.parametrize("bias", [False, True])
def test_dense_linear(bias: bool) -> None:
    same(made(nn.Linear, None, 128, 40, bias), weights.MLXLM["linear"], 128)
    layer, x = nn.Linear(128, 40, bias), normal(3, 128)
    loss = nn.value_and_grad(layer, lambda x: layer(x).sum())
    assert close(loss(x)[1]["weight"][0], x.sum(axis=0), 1e-5)  # in training MLX's own, with grads


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_plain_mlp(form: tuple[int, int, str] | None) -> None:
    same(made(qwen3_next.Qwen3NextMLP, form, 128, 192), weights.MLXLM["mlp"], 128)


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_switch(form: tuple[int, int, str] | None, rows: int) -> None:
    layer = made(switch_layers.SwitchGLU, form, 128, 192, 8)
    x, slots = normal(1, rows, 128), mx.random.randint(0, 8, (1, rows, 3))
    y = layer(x, slots)
    fast.uninstall()
    want = weights.MLXLM["switch"](layer, x, slots)
    mx.eval(want)
    fast.install()
    assert y.shape == want.shape and close(y, want)
    for i in range(0, rows, 3):
        assert mx.array_equal(layer(x[:, i : i + 1], slots[:, i : i + 1]), y[:, i : i + 1])


def test_many_pairs_have_the_bits_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(switch_layers.SwitchGLU, FORMS[0], 128, 192, 8)
    x, slots = normal(1, 40, 128), mx.random.randint(0, 8, (1, 40, 3))
    y = layer(x, slots)
    monkeypatch.setattr(routed, "FUSED_FLOATS", 0)
    assert mx.array_equal(layer(x, slots), y)


def test_an_absent_expert_gives_zeros() -> None:
    layer = made(switch_layers.SwitchGLU, FORMS[0], 128, 192, 8)
    x, slots = normal(1, 2, 128), mx.array([[[1, -1], [-1, 3]]])
    y = layer(x, slots)
    assert not mx.any(y[0, 0, 1]) and not mx.any(y[0, 1, 0])
    assert mx.array_equal(y[:, :, :1][:, 0], layer(x, mx.maximum(slots, 0))[:, :, :1][:, 0])


def test_another_activation_is_mlx_lms() -> None:
    layer = switch_layers.SwitchGLU(128, 192, 8, activation=lambda up, gate: up + gate)
    nn.quantize(layer)
    x, slots = normal(1, 2, 128), mx.array([[[1, 2], [0, 3]]])
    assert mx.array_equal(layer(x, slots), weights.MLXLM["switch"](layer, x, slots))


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_gated_delta_layer(form: tuple[int, int, str] | None) -> None:
    layer = made(qwen3_5.GatedDeltaNet, form, text_args())
    layer.dt_bias, layer.norm.weight = normal(4), normal(48)
    x = normal(1, 7, 128)

    def run(cuts: list[int]) -> tuple[mx.array, list[mx.array]]:
        cache, out, at = ArraysCache(size=2), [], 0
        for n in cuts:
            out.append(layer(x[:, at : at + n], None, cache))
            at += n
        y = mx.concatenate(out, axis=1)
        mx.eval(y, cache.cache)
        return y, cache.cache

    y, states = run([7])
    fast.uninstall()
    want, want_states = run([7])
    fast.install()
    assert close(y, want, 4e-6)
    assert all(close(a, b, 4e-6) for a, b in zip(states, want_states, strict=True))
    for cuts in ([1] * 7, [2, 5], [4, 1, 2]):
        again, after = run(cuts)
        assert mx.array_equal(again, y)
        assert all(mx.array_equal(a, b) for a, b in zip(after, states, strict=True))


@pytest.mark.smoke
def test_a_tape_takes_rows_back(tmp_path: Path) -> None:
    model = load_model(make_tiny("qwen3_5_moe", tmp_path / "tiny"))[0]
    tokens = mx.array([[3, 1, 4, 1, 5, 9]])
    cache, plain = make_prompt_cache(model), make_prompt_cache(model)
    model(tokens[:, :2], cache=cache)
    with Tape(model, cache, tokens[:, 2:]) as tape:
        model(tokens[:, 2:], cache=cache)
    tape.check()
    tape.rollback(1)
    for i in range(3):
        model(tokens[:, i : i + 1], cache=plain)
    for got, want in zip(cache, plain, strict=True):
        if isinstance(got, ArraysCache):
            assert all(mx.array_equal(a, b) for a, b in zip(got.cache, want.cache, strict=True))


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [16, 64])
def test_rope(traditional: bool, dims: int) -> None:
    x = normal(2, 5, 3, 64).swapaxes(1, 2)
    for offset, freqs in [(0, None), (1234, None), (77, mx.exp(normal(dims // 2)))]:
        options: dict[str, Any] = {
            "traditional": traditional, "base": None if freqs is not None else 1e5,
            "scale": 0.5, "offset": offset, "freqs": freqs,
        }  # fmt: skip
        got = fast.rope(x, dims, **options)
        assert close(got, fast._mlx["rope"](x, dims, **options), 1e-6)
        options["offset"] = offset + 4
        assert mx.array_equal(fast.rope(x[:, :, 4:], dims, **options), got[:, :, 4:])


def test_the_likeliest_experts_come_first() -> None:
    logits = mx.array([[0.5, 2.0, -1.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    native = backend.native()
    assert native is not None
    ids, scores = native.route(logits, k=3, normalize=False)
    assert ids.tolist() == [[1, 3, 4], [0, 1, 2]]
    assert close(scores, mx.take_along_axis(mx.softmax(logits, axis=-1), ids, axis=-1))
    normal_scores = native.route(logits, k=3, normalize=True)[1]
    assert close(normal_scores.sum(axis=-1), mx.ones(2))


def test_what_does_not_fit_is_refused() -> None:
    native = backend.native()
    assert native is not None
    w, two = mx.quantize(normal(64, 128)), mx.quantize(normal(2, 128, 128))
    x = normal(1, 1, 128)
    for call in (
        lambda: native.route(normal(2, 4), k=5, normalize=True),
        lambda: native.combine(normal(2, 3, 8), normal(2, 4)),
        lambda: native.swiglu(normal(2), normal(3)),
        lambda: native.rope(normal(2, 8), normal(5), traditional=False, scale=1.0, offset=0),
        lambda: native.linears(x, []),
        lambda: native.linears(x, [w, (normal(64, 128), None, None)]),
        lambda: native.gated_norm(normal(2, 8), normal(2, 7), normal(8), eps=1e-6),
        lambda: native.gather_swiglu(x, None, two, two, two),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", [0, 3])  # a gated delta net, and attention
def test_decoder_layers(form: tuple[int, int, str] | None, index: int) -> None:
    layer = made(qwen3_5.DecoderLayer, form, text_args(), index)
    for part in layer.modules():  # gains of one would hide a norm that is left out
        if isinstance(part, nn.RMSNorm):
            part.weight = mx.random.uniform(0.5, 1.5, part.weight.shape)
    x, first = normal(1, 7, 128), normal(1, 3, 128)
    made_caches = [make_layer_cache(layer) for _ in range(3)]
    ours, own, single = made_caches

    def run(x: mx.array, cache: Any) -> mx.array:
        mask = None if layer.is_linear or x.shape[1] == 1 else "causal"
        return layer(x, mask, cache)

    run(first, ours)
    run(first, single)
    y = run(x, ours)
    fast.uninstall()
    run(first, own)
    want = run(x, own)
    mx.eval(want, own.state)
    fast.install()
    assert close(y, want, 1e-5)
    for mine, theirs in zip(arrays_of(ours), arrays_of(own), strict=True):
        assert close(mine, theirs, 1e-5)
    for i in range(7):
        assert mx.array_equal(run(x[:, i : i + 1], single), y[:, i : i + 1])
    for mine, theirs in zip(arrays_of(ours), arrays_of(single), strict=True):
        assert mx.array_equal(mine, theirs)


def make_layer_cache(layer: nn.Module) -> Any:
    return ArraysCache(size=2) if layer.is_linear else KVCache()


def arrays_of(cache: Any) -> list[mx.array]:
    return list(cache.cache) if isinstance(cache, ArraysCache) else list(cache.keys_and_values())


def test_a_tape_sees_what_a_fused_layer_did() -> None:
    layer = made(qwen3_5.DecoderLayer, FORMS[0], text_args(), 0)
    cache, kept = ArraysCache(size=2), ArraysCache(size=2)
    x, tokens = normal(1, 4, 128), mx.zeros((1, 4), dtype=mx.int32)
    with Tape(layer, [cache], tokens) as tape:
        y = layer(x, None, cache)
    tape.check()
    tape.rollback(2)
    assert mx.array_equal(layer(x[:, :2], None, kept), y[:, :2])
    for mine, theirs in zip(cache.cache, kept.cache, strict=True):
        assert mx.array_equal(mine, theirs)


def test_what_does_not_fit_a_layer_is_refused() -> None:
    native = backend.native()
    assert native is not None
    layer = made(qwen3_5.DecoderLayer, FORMS[0], text_args(), 3)
    out = weights.group(layer.self_attn.o_proj)
    x, y, gates = normal(1, 2, 128), normal(1, 2, 2, 64), normal(1, 2, 128)
    assert native.attention_output(x, y, gates, out).shape == x.shape
    with pytest.raises(ValueError, match="attention_output: "):
        native.attention_output(x, y, gates[..., :64], out)
    whole = routed.whole_moe(layer.mlp, 2, layer.post_attention_layernorm)
    with pytest.raises(ValueError, match="moe: "):
        whole(x[..., :64])


def test_an_op_is_kept_while_its_arrays_are_the_same() -> None:
    layer = made(qwen3_5.DecoderLayer, FORMS[0], text_args(), 0)
    net, norm, x = layer.linear_attn, layer.input_layernorm, normal(1, 1, 128)
    op = qwen.whole_delta(net, norm)
    assert op.kept and qwen.whole_delta(net, norm) is op
    before = layer(x, None, ArraysCache(size=2))
    net.norm.weight = net.norm.weight * 2.0  # not yet evaluated: not kept
    changed = qwen.whole_delta(net, norm)
    assert changed is not op and not changed.kept
    y = layer(x, None, ArraysCache(size=2))
    assert not mx.array_equal(y, before)
    mx.eval(net.norm.weight)
    assert qwen.whole_delta(net, norm).kept
    assert mx.array_equal(layer(x, None, ArraysCache(size=2)), y)
    number = id(net)
    assert number in weights._kept
    del layer, net, norm
    gc.collect()
    assert number not in weights._kept
