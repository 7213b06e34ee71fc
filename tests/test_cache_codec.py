"""Rotation, codebooks and packing against the published distortions and the lower bound."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from cache import reference
from cache.codebook import BITS, LEVEL, Codebook, levels, lloyd_max, pairs
from cache.codec import Codec, Codes
from cache.rotation import Rotation

PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
PAIRS = {2: 0.1076, 2.5: 0.0570, 3: 0.0297, 3.5: 0.0153, 4: 0.0079}


def normal(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(11).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("dimension", [64, 72, 80, 96, 192, 256, 512])
def test_a_rotation_keeps_inner_products_and_is_undone(dimension: int) -> None:
    x, q = normal(20, dimension), normal(20, dimension)[::-1]
    rotation = Rotation(dimension)
    y = rotation.forward(x)
    assert mx.allclose(rotation.back(y), x, atol=1e-4)
    assert mx.allclose((rotation.forward(q) * y).sum(-1), (q * x).sum(-1), atol=1e-3)
    spike = mx.zeros((1, dimension))
    spike[0, 3] = 1.0
    assert mx.abs(rotation.forward(spike)).max() < 6 / dimension**0.5


def test_the_paper_s_levels_are_the_published_ones() -> None:
    axis = np.linspace(-8, 8, 200001)
    weight = np.exp(-(axis**2) / 2)
    weight /= weight.sum()
    for bits, distortion in PUBLISHED.items():
        book = lloyd_max(bits)
        levels = book.points[:, 0]
        error = (axis - levels[np.searchsorted(book.nearest, axis)]) ** 2
        assert (error * weight).sum() == pytest.approx(distortion, rel=0.01)
        assert np.allclose(levels, -levels[::-1], atol=1e-5)
    assert np.allclose(lloyd_max(2).points[2:, 0], [0.45278, 1.51042], atol=1e-4)


def test_pairs_beat_the_paper_s_levels_and_not_the_bound() -> None:
    axis = np.linspace(-6, 6, 301)
    x, y = (a.ravel().astype(np.float32) for a in np.meshgrid(axis, axis))
    weight = np.exp(-(x**2 + y**2) / 2)
    weight /= weight.sum()
    for bits, distortion in PAIRS.items():
        points = pairs(bits).points
        distance = (x[:, None] - points[:, 0]) ** 2 + (y[:, None] - points[:, 1]) ** 2
        error = (distance.min(1) * weight).sum() / 2
        assert error == pytest.approx(distortion, rel=0.01)
        assert error > 4.0**-bits
        if bits in PUBLISHED:
            assert error < PUBLISHED[int(bits)]
        nearest = distance.argmin(1)  # each point is the mean of what it stands for
        mass = np.bincount(nearest, weight, len(points))
        mean = np.bincount(nearest, weight * x, len(points)) / mass
        assert np.abs(mean - points[:, 0]).max() < 0.06


def test_points_of_4_bits_are_halves_of_each_other() -> None:
    points = pairs(4).points
    assert np.array_equal(points[128:], -points[:128])  # kernels look half of them up


def test_levels_of_8_bits_are_close_to_the_best_and_fit_two_bytes() -> None:
    axis = np.linspace(-8, 8, 400001)
    weight = np.exp(-(axis**2) / 2)

    def error(book: Codebook) -> float:
        found = book.points[np.searchsorted(book.nearest, axis), 0]
        return float((weight * (axis - found) ** 2).sum())

    book = levels()
    assert error(lloyd_max(8)) < error(book) < 1.006 * error(lloyd_max(8))
    multiples = book.points[:, 0] / np.float32(LEVEL)
    assert np.abs(multiples - np.round(multiples)).max() < 1e-3
    assert round(float(multiples.max())) == 127 * 32 + 15
    assert np.array_equal(multiples, -multiples[::-1])
    assert (np.diff(multiples) > 1).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dimension", [64, 72, 128, 512])
def test_codes_pack_and_come_back(bits: float, dimension: int) -> None:
    codec = Codec.of(dimension, bits)
    top = 2**codec.book.width
    index = mx.array(np.random.default_rng(5).integers(0, top, (3, codec.count)), mx.uint32)
    words = codec._pack(index)
    assert words.shape[-1] * 4 + 2 == codec.row_bytes
    assert mx.array_equal(codec._unpack(words), index)
    stream = np.unpackbits(np.array(words).view(np.uint8), axis=1, bitorder="little")
    width = codec.book.width
    for i in (0, 1, codec.count - 1):  # the layout that kernels are promised
        bit = stream[:, i * width : (i + 1) * width] @ (1 << np.arange(width))
        assert np.array_equal(bit, np.array(index)[:, i])


@pytest.mark.parametrize("bits", BITS)
def test_distortion_of_random_vectors(bits: float) -> None:
    x = normal(500, 256)
    codec = Codec.of(256, bits)
    codes = codec.encode(x)
    error = float(mx.mean((codec.decode(codes) - x) ** 2) / mx.mean(x * x))
    assert error < {8: 5e-5, **PAIRS}[bits] * 1.01
    assert error < float(mx.mean((reference.decode(x, bits) - x) ** 2)) * 1.01
    assert float(codes.scales.astype(mx.float32).min()) > 0


def test_scale_follows_the_vector() -> None:
    codec = Codec.of(64, 3)
    x = normal(4, 64)
    one, many = codec.encode(x), codec.encode(x * 100)
    assert mx.array_equal(one.words, many.words)
    zero = codec.decode(codec.encode(mx.zeros((1, 64))))
    assert mx.array_equal(zero, mx.zeros((1, 64)))
    assert isinstance(one, Codes)


def test_qjl_is_unbiased_and_costs_more_spread() -> None:
    x, q = normal(400, 128), normal(400, 128)[::-1]
    true = (q * x).sum(-1)
    qjl = (q * reference.decode_qjl(x, 3)).sum(-1) - true
    plain = (q * reference.decode(x, 3)).sum(-1) - true
    assert abs(float(qjl.mean())) < 0.4
    assert mx.var(qjl) > mx.var(plain)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        Codec(65, 4)
