"""The kernel that attends over codes, against the pure-MLX reference: layouts, masks, rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cache import attention
from cache.compressed import CompressedKVCache
from cache.side import BLOCK
from kernels import backend, codes

pytestmark = pytest.mark.skipif(not backend.available(), reason="the extension isn't built")
H, G = 2, 3
ISAS = (lambda native: native.isas() if native else [])(backend.native())


@pytest.fixture(params=ISAS)
def isa(request: Any) -> Iterator[str]:
    native = backend.native()
    assert native is not None
    before = native.isa()
    assert native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def held(
    tokens: int, bits: tuple[float, float] = (3.5, 3.5), D: int = 64, B: int = 1
) -> CompressedKVCache:
    """A cache of so many tokens, keys off centre."""
    cache = CompressedKVCache(*bits)
    cache.update_and_fetch(normal(1, B, H, tokens, D) + 1, normal(2, B, H, tokens, D) - 0.5)
    cache.commit()
    return cache


def both(
    cache: CompressedKVCache,
    q: mx.array,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What the kernel gives, and the reference."""
    keys, values, scale, T = cache.keys, cache.values, q.shape[-1] ** -0.5, q.shape[2]
    assert attention.by_kernel(q, keys, values, mask)
    found = attention.attend_by_kernel(q, keys, values, scale, mask, sinks, 0)
    whole = attention.as_array(mask, T, cache.offset)
    return found, attention.attend(q, keys, values, scale, whole, sinks)


def in_integers() -> bool:
    """Whether products are of integers here: rounded to 2^-16 of a row's largest channel."""
    return backend.isa() in ("amx", "avx512vnni", "avxvnni", "avx2")


def near(found: mx.array, wanted: mx.array) -> None:
    assert found.shape == wanted.shape
    tolerance = 1e-4 if in_integers() else 1e-5
    assert mx.abs(found - wanted).max() <= tolerance * mx.abs(wanted).max()


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 8])
def test_every_layout_and_instruction_set(bits: float, isa: str) -> None:
    cache = held(1400, (bits, bits))
    assert cache.keys.coded == 1280
    near(*both(cache, normal(3, 1, H * G, 3, 64), "causal"))


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4])
def test_rounding_is_far_below_the_codes_own_error(bits: float, isa: str) -> None:
    """Against the reference over the same codes, as a share of what the codes themselves cost."""
    cache, q = held(2500, (bits, bits), D=128), normal(3, 1, H * G, 4, 128) * 2
    found, wanted = both(cache, q, "causal")
    k, v = normal(1, 1, H, 2500, 128) + 1, normal(2, 1, H, 2500, 128) - 0.5
    exact = mx.fast.scaled_dot_product_attention(q, k, v, scale=128**-0.5, mask="causal")

    def size(x: mx.array) -> float:
        return float(mx.sqrt(mx.mean(x * x)))

    assert size(found - wanted) < size(wanted - exact) / 1000


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 8])
def test_every_width_is_multiplied_as_integers(bits: float, isa: str) -> None:
    """A channel of a query that rounds to nothing beside the largest changes no bit."""
    if not in_integers():
        pytest.skip("in floats here")
    cache = held(700, (bits, bits))
    sides = [attention.as_kernel_side(side, 0) for side in (cache.keys, cache.values)]
    # of the raw tokens' scores nothing is left
    sides = [side._replace(first=0 * side.first, recent=0 * side.recent) for side in sides]
    q = mx.zeros((1, H, 1, 64))

    def found(second: float) -> mx.array:
        rotated = mx.concatenate([mx.ones((1, H, 1, 1)), mx.full((1, H, 1, 1), second)], -1)
        rotated = mx.pad(rotated, [(0, 0)] * 3 + [(0, 62)])
        return codes.attend(q, rotated, *sides, rows=1, coded=cache.keys.coded)[0]

    assert mx.array_equal(found(0.0), found(2**-17))
    assert not mx.array_equal(found(0.0), found(2**-14))


@pytest.mark.parametrize("bits", [4, 8])
def test_points_without_the_kernels_order_are_unpacked_to_floats(bits: float, isa: str) -> None:
    """Those of 4 bits are mirrored and those of 8 in pieces; other ones are taken too."""
    cache, q = held(700, (bits, bits)), normal(3, 1, H * G, 3, 64)
    folded = q.reshape(1, H, 3 * G, 64) / 8
    sides = [attention.as_kernel_side(side, 0) for side in (cache.keys, cache.values)]

    def found(points: mx.array) -> mx.array:
        moved = [side._replace(points=points) for side in sides]
        return codes.attend(folded, folded, *moved, rows=3, coded=cache.keys.coded)[0]

    points = cache.keys.codec.points
    one = mx.arange(256)[:, None] == 200
    near(found(points + mx.where(one, 1e-5, 0.0)), found(points))
    assert mx.abs(found(points + mx.where(one, 0.1, 0.0)) - found(points)).max() > 1e-4


@pytest.mark.parametrize("D", [36, 72, 80, 256, 512])
@pytest.mark.parametrize("rows", [1, 5])
def test_widths_of_heads(D: int, rows: int, isa: str) -> None:
    cache = held(300, (3.5, 2.5), D=D)
    near(*both(cache, normal(3, 1, H * G, rows, D)))


def test_keys_and_values_of_other_widths() -> None:
    cache = CompressedKVCache(3, 4)
    cache.update_and_fetch(normal(1, 2, H, 300, 96), normal(2, 2, H, 300, 64) + 1)
    cache.commit()
    near(*both(cache, normal(3, 2, H * G, 4, 96), "causal"))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 100, 131, 132, 1091, 1092, 2500])
def test_lengths(tokens: int) -> None:
    rows = min(tokens, 4)
    near(*both(held(tokens, B=2), normal(3, 2, H * G, rows, 64), "causal"))


@pytest.mark.parametrize("drop", [1, 70, 500, 1300])
def test_after_a_trim(drop: int) -> None:
    cache = held(1400)
    cache.trim(drop)
    for n in (3, 1):
        cache.update_and_fetch(normal(5, 1, H, n, 64), normal(6, 1, H, n, 64))
        near(*both(cache, normal(7, 1, H * G, n, 64), "causal"))


def test_masks_and_sinks() -> None:
    cache = held(1500)
    q = normal(3, 1, H * G, 4, 64)
    sinks = normal(4, H * G) + 3
    window = cache.make_mask(4, window_size=1200, return_array=True)[:, :1500]
    bias = normal(5, 4, 1500)
    holes = mx.where(normal(6, 4, 1500) > 0, 0.0, -mx.inf)
    for mask in (None, "causal", window, bias, holes, window[None, None]):
        near(*both(cache, q, mask, sinks))
        near(*both(cache, q, mask))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_mask_for_every_head(rows: int, isa: str) -> None:
    """As latent attention's scores of positions are, the lowest float where nothing is seen."""
    cache, q = held(1500, B=2), normal(3, 2, H * G, rows, 64)
    scores = normal(4, 2, H * G, rows, 1500)
    seen = normal(5, 2, H * G, rows, 1500) > -1
    for mask in (scores, seen, mx.where(seen, scores, mx.finfo(mx.float32).min)):
        near(*both(cache, q, mask))


def test_what_the_kernel_leaves_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = held(300)
    q = normal(3, 1, H * G, 4, 64)
    sides = cache.keys, cache.values
    assert not attention.by_kernel(q.astype(mx.bfloat16), *sides, None)
    assert not attention.by_kernel(q, *sides, mx.zeros((1, H, 4, 300)))
    monkeypatch.setattr(backend, "native", lambda: None)
    assert not attention.by_kernel(q, *sides, None)


@pytest.mark.parametrize("width", [2, 5, 8, 16])
@pytest.mark.parametrize("prompt", [60, 131, 1100])
def test_a_verified_row_has_the_bits_of_a_plain_one(width: int, prompt: int, isa: str) -> None:
    """Over a block's crossing, and whatever the threads."""
    total = 5 * BLOCK // 2 // width * width
    q, k, v = (normal(i, 1, n, total, 64) for i, n in ((3, H * G), (4, H), (5, H)))

    def decoded(step: int) -> mx.array:
        cache, out = held(prompt), []
        for at in range(0, total, step):
            rows = slice(at, at + step)
            view, _ = cache.update_and_fetch(k[:, :, rows], v[:, :, rows])
            mask = None if step == 1 else "causal"
            out.append(view.attend(q[:, :, rows], 0.125, mask))
            mx.eval(out[-1])
        return mx.concatenate(out, axis=2)

    before = backend.threads()
    plain = decoded(1)
    backend.set_threads(1)
    verified = decoded(width)
    backend.set_threads(before)
    assert mx.array_equal(plain, verified)


def test_a_crossing_equals_the_reference() -> None:
    cache = held(131)
    k, v, q = normal(4, 1, H, 6, 64), normal(5, 1, H, 6, 64), normal(3, 1, H * G, 6, 64)
    view, _ = cache.update_and_fetch(k, v)
    assert view.crossing
    found = view.attend(q, 0.125, "causal")
    c, whole = view.crossing, attention.as_array("causal", 6, cache.offset)
    assert whole is not None
    for rows, ahead in ((slice(0, c), 0), (slice(c, 6), BLOCK)):
        wanted = attention.attend(
            q[:, :, rows], cache.keys, cache.values, 0.125, whole[rows], None, ahead
        )
        near(found[:, :, rows], wanted)


def test_shapes_that_do_not_fit() -> None:
    cache = held(300)
    side = attention.as_kernel_side(cache.keys, 0)
    q = normal(3, 1, H, 4, 64)
    for wrong in (
        {"rows": 3},
        {"coded": 10_000},
        {"bias": mx.zeros((4, 5))},
        {"sinks": mx.zeros(7)},
        {"keys": side._replace(points=mx.zeros((100, 2)))},
        {"values": side._replace(words=side.words[..., :-1])},
        {"keys": side._replace(first=side.first[:, :, :1])},
    ):
        given: dict[str, Any] = {"keys": side, "values": side, "rows": 4, "coded": 192, **wrong}
        with pytest.raises(ValueError, match="attend_codes"):
            codes.attend(q, q, **given)
