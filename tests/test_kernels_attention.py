"""Full-precision attention on the CPU: equal to MLX's, the same bits whatever comes with a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import backend, fast

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension isn't built")
ISAS = (lambda native: native.isas() if native else [])(backend.native())
SPAN, GROUP = 1024, 8  # as in kernels/cpu: tokens under one softmax, spans merged first


@pytest.fixture(params=ISAS)
def isa(request: Any) -> Iterator[str]:
    native = backend.native()
    assert native is not None
    before = native.isa()
    assert native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = backend.threads()
    yield backend.set_threads
    backend.set_threads(before)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def attend(q: mx.array, k: mx.array, v: mx.array, causal: bool = True, **extra: Any) -> mx.array:
    native = backend.native()
    assert native is not None
    return native.attention(q, k, v, scale=q.shape[-1] ** -0.5, causal=causal, **extra)


def exact(
    q: mx.array, k: mx.array, v: mx.array, causal: bool = True, bias: np.ndarray | float = 0.0
) -> np.ndarray:
    """In float64, by the formula."""
    _, H, T, D = q.shape
    S = k.shape[2]
    wide = [np.repeat(np.array(a, np.float64), H // k.shape[1], axis=1) for a in (k, v)]
    scores = np.array(q, np.float64) @ wide[0].swapaxes(-1, -2) * D**-0.5 + bias
    if causal:
        scores[..., np.arange(S) > np.arange(S - T, S)[:, None]] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p @ wide[1] / p.sum(-1, keepdims=True)


def near(found: mx.array, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    assert np.abs(np.array(found) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 16])
def test_a_row_has_the_same_bits_whatever_rows_come_with_it(rows: int, isa: str) -> None:
    """One by one, as plain decoding computes them, over the end of a span and of a group."""
    for S in (SPAN + 4, SPAN * GROUP + 4):
        q, k, v = normal(1, 1, 6, rows, 16), normal(2, 1, 2, S, 16), normal(3, 1, 2, S, 16)
        together = attend(q, k, v)
        for t in range(rows):
            seen = S - rows + t + 1
            alone = attend(q[:, :, t : t + 1], k[:, :, :seen], v[:, :, :seen], causal=False)
            assert mx.array_equal(alone, together[:, :, t : t + 1])
    near(together, exact(q, k, v))


@pytest.mark.parametrize("rows", [1, 4])
def test_bits_do_not_depend_on_threads(rows: int, threads: Any) -> None:
    """Pieces of the context are groups with few threads and spans with many."""
    for S in (40, 700, 3000, SPAN * GROUP * 2 + 500):
        q, k, v = normal(1, 1, 6, rows, 64), normal(2, 1, 2, S, 64), normal(3, 1, 2, S, 64)
        found = []
        for count in (1, 2, 3, 7):
            threads(count)
            found.append(attend(q, k, v))
            mx.eval(found[-1])
        assert all(mx.array_equal(found[0], other) for other in found[1:])


def test_a_prompts_rows_have_the_bits_of_single_ones(isa: str) -> None:
    S, T = SPAN * GROUP + 60, 90  # 3 * 90 rows of a key head go through the context together
    q, k, v = normal(1, 1, 3, T, 20), normal(2, 1, 1, S, 20), normal(3, 1, 1, S, 20)
    together = attend(q, k, v)
    near(together, exact(q, k, v))
    for t in (0, 1, 31, 32, 77, 89):
        seen = S - T + t + 1
        alone = attend(q[:, :, t : t + 1], k[:, :, :seen], v[:, :, :seen])
        assert mx.array_equal(alone, together[:, :, t : t + 1])


@pytest.mark.parametrize("widths", [(256, 256), (20, 20), (72, 80), (192, 128), (1, 3)])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_widths_of_heads(widths: tuple[int, int], rows: int, isa: str) -> None:
    D, Dv = widths
    for S in (rows, 37, 1100):
        q, k = normal(1, 2, 4, rows, D), normal(2, 2, 2, S, D)
        v = normal(3, 2, 2, S, Dv)
        near(attend(q, k, v), exact(q, k, v))


@pytest.mark.parametrize("sunk", [False, True])
def test_masks_that_leave_whole_spans_out(sunk: bool, isa: str) -> None:
    S, T = 2 * SPAN + 200, 3
    q, k, v = normal(1, 1, 4, T, 32), normal(2, 1, 2, S, 32), normal(3, 1, 2, S, 32)
    options: dict[str, Any] = {"scale": 0.2, "sinks": normal(5, 4) if sunk else None}
    column, row = mx.arange(S), mx.arange(T)[:, None]
    for mask in (column > S - 100 + row, column < 50 + row, normal(6, T, S)):
        found = fast.scaled_dot_product_attention(q, k, v, mask=mask, **options)
        wanted = fast._mlx["scaled_dot_product_attention"](q, k, v, mask=mask, **options)
        near(found, np.array(wanted), 4e-6)


def test_where_arrays_lie() -> None:
    """A cache's slack, heads apart from each other, and channels that are not contiguous."""
    q = normal(1, 2, 4, 2, 32)
    k, v = normal(2, 2, 300, 2, 32).swapaxes(1, 2), normal(3, 2, 2, 400, 32)[:, :, :300]
    near(attend(q, k, v), exact(q, k, v))
    turned = mx.contiguous(k.swapaxes(2, 3)).swapaxes(2, 3)
    assert mx.array_equal(attend(q, turned, v), attend(q, k, v))


def test_large_scores_and_values_far_from_zero() -> None:
    q, k = normal(1, 1, 2, 4, 64) * 30, normal(2, 1, 1, 3000, 64)
    v = normal(3, 1, 1, 3000, 64) + 100
    near(attend(q, k, v), exact(q, k, v), 1e-5)


@pytest.mark.parametrize("kind", ["additive", "bool"])
@pytest.mark.parametrize(("T", "S"), [(1, 40), (3, 1500), (9, 2100)])
def test_a_mask_for_every_head(isa: str, kind: str, T: int, S: int) -> None:
    """As latent attention's scores of positions are, the lowest float where nothing is seen."""
    q, k, v = normal(1, 2, 6, T, 48), normal(2, 2, 2, S, 48), normal(3, 2, 2, S, 32)
    seen = np.random.default_rng(4).random((2, 6, T, S)) < 0.7
    seen[:, :, :, 0] = True
    seen[:, 0, 0, : S // 2] = False
    seen[:, 0, 0, -1] = True
    bias = np.where(seen, 0.0 if kind == "bool" else normal(5, 2, 6, T, S), -np.inf)
    lowest = np.finfo(np.float32).min
    mask = mx.array(seen if kind == "bool" else np.maximum(bias, lowest).astype(np.float32))
    native = backend.native()
    assert native is not None
    got = fast.scaled_dot_product_attention(q, k, v, scale=48**-0.5, mask=mask)
    near(got, exact(q, k, v, False, bias))
    alone = fast.scaled_dot_product_attention(
        q[:, :, :1], k, v, scale=48**-0.5, mask=mask[:, :, :1]
    )
    assert mx.array_equal(alone, got[:, :, :1])
