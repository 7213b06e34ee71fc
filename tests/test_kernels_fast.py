"""The drop-in replacements of MLX's functions: equal to what they replace, whatever the rows."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import make_tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kernels import backend, fast

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension does not run here")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    mx.random.seed(0)
    yield


def close(got: mx.array, want: mx.array, tolerance: float = 1e-6) -> bool:
    """Within `tolerance` of the largest value."""
    return bool((mx.abs(got - want).max() <= tolerance * mx.abs(want).max()).item())


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 5, 16, 33, 128, 2048])
def test_rms_norm(n: int) -> None:
    x, w = normal(3, 4, n), normal(n)
    assert close(fast.rms_norm(x, w, 1e-6), fast._mlx["rms_norm"](x, w, 1e-6))
    part = x[:, 1:3]  # rows that lie apart
    assert close(fast.rms_norm(part, None, 1e-6), fast._mlx["rms_norm"](part, None, 1e-6))
    turned = x.swapaxes(0, 1)
    assert mx.array_equal(fast.rms_norm(turned, w, 1e-6).swapaxes(0, 1), fast.rms_norm(x, w, 1e-6))


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 7, 16, 1000, 1024, 1025, 5000])
def test_logsumexp(n: int) -> None:
    x = normal(3, 2, n) * 5 - 40
    want = np.logaddexp.reduce(np.array(x, dtype=np.float64), axis=-1)
    got = fast.logsumexp(x, axis=-1)
    assert np.abs(np.array(got) / want - 1).max() < 1e-7
    assert mx.array_equal(fast.logsumexp(x, -1, True), got[..., None])
    assert mx.array_equal(fast.logsumexp(x[1:2, 1], 1), got[1:2, 1])  # whatever the rows
    assert mx.array_equal(fast.logsumexp(x.swapaxes(0, 1), axis=2), got.swapaxes(0, 1))
    assert mx.array_equal(fast.logsumexp(x, (0, 2)), fast._mlx["logsumexp"](x, (0, 2)))
    assert mx.array_equal(fast.logsumexp(x), fast._mlx["logsumexp"](x))


@pytest.mark.smoke
def test_logsumexp_of_what_is_no_number() -> None:
    mask, inf, nan = -mx.inf, mx.inf, mx.nan
    rows = [[mask, mask], [mask, 3], [3, inf], [inf, inf], [1, nan], [inf, nan], [-3e38, mask]]
    x = mx.array(rows)
    want = fast._mlx["logsumexp"](x, -1)
    assert mx.array_equal(fast.logsumexp(x, -1), want, equal_nan=True)
    wide = mx.concatenate([mx.full((7, 2000), mask), x], axis=-1)  # spans with nothing in them
    assert mx.array_equal(fast.logsumexp(wide, -1), want, equal_nan=True)


@pytest.mark.smoke
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 2, 4, 32, 32), (2, 5, 2, 2, 64, 48), (1, 3, 1, 4, 128, 128), (1, 2, 2, 2, 192, 20)],
)
def test_gated_delta(shape: tuple[int, ...], vector: bool) -> None:
    b, t, hk, hv, dk, dv = shape
    q, k, v = normal(b, t, hk, dk) * 0.1, normal(b, t, hk, dk) * 0.1, normal(b, t, hv, dv)
    g = mx.random.uniform(shape=(b, t, hv, dk) if vector else (b, t, hv))
    beta, state = mx.random.uniform(shape=(b, t, hv)), normal(b, hv, dv, dk)
    y, after = fast.gated_delta_ops(q, k, v, g, beta, state)
    want, want_after = fast._mlx["gated_delta_ops"](q, k, v, g, beta, state)
    assert close(y, want) and close(after, want_after)
    rows = []
    for i in range(t):  # one by one: the same bits
        one = slice(i, i + 1)
        row, state = fast.gated_delta_ops(
            q[:, one], k[:, one], v[:, one], g[:, one], beta[:, one], state
        )
        rows.append(row)
    assert mx.array_equal(mx.concatenate(rows, axis=1), y) and mx.array_equal(state, after)


@pytest.mark.smoke
def test_the_tape_of_a_gated_delta_repeats_its_state() -> None:
    q, k, v = normal(1, 4, 2, 32), normal(1, 4, 2, 32) * 0.1, normal(1, 4, 2, 32)
    g, beta, state = (
        mx.random.uniform(shape=(1, 4, 2)),
        mx.ones((1, 4, 2)) * 0.5,
        normal(1, 2, 32, 32),
    )
    _, after, tape = backend.native().gated_delta(q, k, v, g, beta, state)  # type: ignore[union-attr]
    for t in range(4):
        state = state * g[:, t, :, None, None] + tape[:, t, :, :, None] * k[:, t, :, None, :]
    assert close(state, after)


@pytest.mark.smoke
def test_depthwise_conv() -> None:
    x, w = normal(2, 9, 48), normal(48, 4, 1)
    assert close(fast.conv1d(x, w, groups=48), fast._mlx["conv1d"](x, w, 1, 0, 1, 48))
    dense = normal(8, 4, 48)  # not the kernel's
    assert mx.array_equal(fast.conv1d(x, dense), fast._mlx["conv1d"](x, dense))


@pytest.mark.smoke
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 2, 1, 37, 64, 64),
        (2, 4, 1, 5, 300, 48, 32),
        (1, 2, 2, 8, 8, 256, 256),
        (1, 2, 1, 3, 20, 20, 20),
    ],
)
def test_attention(shape: tuple[int, ...], mask: Any, sinks: bool) -> None:
    b, h, hk, t, s, d, dv = shape
    q = normal(b, h, t, d)
    k, v = (
        normal(b, hk, s + 7, d)[:, :, :s],
        normal(b, hk, s + 3, dv)[:, :, :s],
    )  # as caches give them
    if mask == "bool":
        mask = mx.random.uniform(shape=(t, s)) > 0.3
    elif mask == "float":
        mask = normal(t, s)
    extra = {"scale": d**-0.5, "mask": mask, "sinks": normal(h) if sinks else None}
    got = fast.scaled_dot_product_attention(q, k, v, **extra)
    assert close(got, fast._mlx["scaled_dot_product_attention"](q, k, v, **extra), 2e-6)
    if mask == "causal":  # a row by itself: the same bits
        last = fast.scaled_dot_product_attention(q[:, :, -1:], k, v, **extra | {"mask": None})
        assert mx.array_equal(last, got[:, :, -1:])


@pytest.mark.smoke
@pytest.mark.parametrize(
    "form",
    [
        *[(4, 64, "affine"), (8, 32, "affine"), (3, 128, "affine")],
        *[(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")],
    ],
)
def test_quantized_products(form: tuple[int, int, str]) -> None:
    bits, group, mode = form
    options: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
    w = mx.quantize(normal(96, 256), **options)
    for rows in (1, 3, 9):
        x = normal(2, rows, 256)
        got, want = (
            f(x, *w, transpose=True, **options)
            for f in (fast.quantized_matmul, fast._mlx["quantized_matmul"])
        )
        assert close(got, want, 4e-6)
    stacked = mx.quantize(normal(6, 96, 256), **options)
    slots = mx.array([[[0, 5, 2], [2, 2, 1]]])
    for lead in ((1, 2, 1), (1, 2, 3)):
        x = normal(*lead, 1, 256)
        got, want = (
            f(x, *stacked, rhs_indices=slots, transpose=True, **options)
            for f in (fast.gather_qmm, fast._mlx["gather_qmm"])
        )
        assert got.shape == want.shape and close(got, want, 4e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dequantize(bits: int) -> None:
    for group, dtype in ((32, mx.float32), (64, mx.float32), (128, mx.float16)):
        w, scales, biases = mx.quantize(normal(40, 384).astype(dtype), group, bits)
        rows = mx.array([[3, 39, 0]])
        options: dict[str, Any] = {"group_size": group, "bits": bits, "mode": "affine"}
        parts = (w[rows], scales[rows], biases[rows])
        got = fast.dequantize(*parts, **options)
        want = fast._mlx["dequantize"](*parts, **options)
        assert got.dtype == dtype and mx.array_equal(got, want)


def test_more_rows_than_are_laid_out_at_a_time() -> None:
    w = mx.quantize(normal(40, 2048))
    x = normal(700, 2048)
    many = fast.quantized_matmul(x, *w)
    for row in (0, 300, 699):
        assert mx.array_equal(many[row : row + 1], fast.quantized_matmul(x[row : row + 1], *w))
    stacked = mx.quantize(normal(2, 40, 2048))
    slots = mx.array([0, 1] * 350)
    gathered = fast.gather_qmm(x[:, None], *stacked, rhs_indices=slots)
    for row in (0, 301, 699):
        alone = fast.quantized_matmul(x[row : row + 1], *(part[row % 2] for part in stacked))
        assert mx.array_equal(gathered[row], alone)


@pytest.mark.smoke
def test_other_types_and_shapes_are_mlxs() -> None:
    x = normal(2, 64).astype(mx.float16)
    assert mx.array_equal(fast.rms_norm(x, None, 1e-6), fast._mlx["rms_norm"](x, None, 1e-6))
    w = mx.quantize(normal(32, 64), group_size=32)
    row, options = normal(1, 32), {"transpose": False, "group_size": 32}
    assert mx.array_equal(
        fast.quantized_matmul(row, *w, **options), fast._mlx["quantized_matmul"](row, *w, **options)
    )


@pytest.mark.smoke
def test_a_global_scale_is_left_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setitem(fast._mlx, "gather_qmm", lambda *_, **options: given.append(options))
    w = mx.quantize(normal(3, 32, 64), mode="nvfp4")
    options: dict[str, Any] = {"rhs_indices": mx.array([[2, 0]]), "mode": "nvfp4"}
    x = normal(1, 1, 1, 64)
    got = fast.gather_qmm(x, *w, **options, global_scale=None)
    assert got.shape == (1, 2, 1, 32) and not given
    fast.gather_qmm(x, *w, **options, global_scale=mx.ones(3))
    assert given[0]["global_scale"].shape == (3,)


@pytest.mark.parametrize(
    "family", ["qwen3_5_moe", "gpt_oss", "deepseek_v3", "kimi_linear", "nemotron_h"]
)
def test_a_model_gives_the_same_logits(family: str, tmp_path: Any) -> None:
    model = load_model(make_tiny(family, tmp_path / "tiny"))[0]
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

    def logits() -> mx.array:
        cache = make_prompt_cache(model)
        parts = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:], cache=cache)]
        return mx.concatenate(parts, axis=1)

    fast.uninstall()
    try:
        want = logits()
        mx.eval(want)
        with fast.installed() as works:
            assert works
            assert close(logits(), want, 1e-4)
        assert mx.quantized_matmul is fast._mlx["quantized_matmul"]
    finally:
        fast.install()  # as conftest did, for the tests after this one
