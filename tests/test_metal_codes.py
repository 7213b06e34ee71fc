"""Attention over codes for the GPU, run on the CPU, against the reference of the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_harness import emulator
from test_metal_kernels import emulated

from cache import attention
from cache.compressed import CompressedKVCache
from cache.side import BLOCK
from kernels.metal import codes, launch

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="there is no C++ compiler")


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def held(
    tokens: int, bits: tuple[float, float], D: int, Dv: int, B: int = 1, H: int = 1
) -> CompressedKVCache:
    """A cache of so many tokens, off centre."""
    cache = CompressedKVCache(*bits)
    cache.update_and_fetch(normal(1, B, H, tokens, D) + 1, normal(2, B, H, tokens, Dv) - 0.5)
    cache.commit()
    return cache


def both(
    cache: CompressedKVCache,
    q: mx.array,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    crossing: int = 0,
    launched: Any = emulated,
) -> tuple[mx.array, mx.array]:
    """What the kernels give, and the reference."""
    keys, values, scale = cache.keys, cache.values, q.shape[-1] ** -0.5
    B, heads, T, D = q.shape
    assert keys.recent is not None
    scaled = (q * scale).reshape(B, keys.recent.shape[1], -1, D)
    whole = attention.as_array(mask, T, cache.offset)
    bias = None if not isinstance(mask, mx.array) else mx.where(mask, 0.0, -mx.inf)
    y, rest = codes.attend(
        launched,
        scaled,
        keys.codec.rotation.forward(scaled),
        attention.as_kernel_side(keys, crossing),
        attention.as_kernel_side(values, crossing),
        rows=T,
        coded=keys.coded,
        crossing=crossing,
        causal=isinstance(mask, str),
        bias=bias,
        sinks=sinks,
    )
    found = (values.codec.rotation.back(y) + rest).reshape(B, heads, T, -1)
    if not crossing:
        return found, attention.attend(q, keys, values, scale, whole, sinks)
    parts = [
        attention.attend(
            q[:, :, part], keys, values, scale, None if whole is None else whole[part], sinks, ahead
        )
        for part, ahead in ((slice(0, crossing), 0), (slice(crossing, T), BLOCK))
    ]
    return found, mx.concatenate(parts, axis=2)


def near(found: mx.array, wanted: mx.array) -> None:
    assert found.shape == wanted.shape
    assert mx.abs(found - wanted).max() <= 1e-5 * mx.abs(wanted).max()


def trace(
    name: str, inputs: Sequence[mx.array], template: Any, groups: Any, threads: int, outputs: Any
) -> list[mx.array]:
    """A launch that runs nothing: its program goes to TRACED."""
    arguments = launch.arguments(inputs, template, groups, threads, outputs)
    TRACED.append(emulator.code_of(launch.built(name), inputs, arguments))
    return [mx.zeros(shape, dtype) for shape, dtype in outputs]


TRACED: list[str] = []


@pytest.fixture(scope="module")
def programs() -> None:
    """The programs of the tests below that have one or two each, compiled side by side."""
    for bits, tokens in LAYOUTS:
        of_layout(bits, tokens, trace)
    for case in SHAPES:
        of_shape(case, trace)
    for seed in SEEDS:
        of_seed(seed, trace)
    emulator.compile_all(TRACED)


LAYOUTS = [(bits, tokens) for bits in (2, 2.5, 3, 3.5, 4, 8) for tokens in (140, 421)]


def of_layout(bits: float, tokens: int, launched: Any = emulated) -> tuple[mx.array, mx.array]:
    cache = held(tokens, (bits, bits), 64, 64, H=2)
    return both(cache, normal(3, 1, 6, 3, 64), "causal", launched=launched)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("bits", "tokens"), LAYOUTS)
def test_every_layout(bits: float, tokens: int) -> None:
    """One tile less than full, and several spans of which the last is short."""
    near(*of_layout(bits, tokens))


SHAPES = [  # D, Dv, key heads, query heads, rows, tokens
    (64, 64, 2, 2, 1, 300),
    (72, 72, 1, 3, 2, 200),
    (80, 80, 2, 8, 1, 300),
    (96, 64, 1, 4, 5, 300),
    (128, 128, 1, 8, 8, 300),
    (192, 128, 1, 1, 6, 200),
    (256, 256, 2, 16, 1, 300),
    (256, 256, 1, 8, 4, 200),
    (512, 512, 1, 2, 1, 200),
    (512, 512, 1, 16, 8, 140),  # rows that two threadgroups share
]


def of_shape(case: tuple[int, ...], launched: Any = emulated) -> tuple[mx.array, mx.array]:
    D, Dv, H, heads, rows, tokens = case
    bits = (8.0, 4.0) if rows % 2 else (3.5, 2.5)
    cache = held(tokens, bits, D, Dv, B=2 if D < 128 else 1, H=H)
    mask = None if rows == 1 else "causal"
    return both(cache, normal(3, 2 if D < 128 else 1, heads, rows, D), mask, launched=launched)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_heads_and_rows(case: tuple[int, ...]) -> None:
    near(*of_shape(case))


SEEDS = range(4)


def of_seed(seed: int, launched: Any = emulated) -> tuple[mx.array, mx.array]:
    random = np.random.default_rng(seed)
    bits = tuple(random.choice([2, 2.5, 3, 3.5, 4, 8], 2))
    D, Dv = (int(n) for n in random.choice([64, 68, 100, 112, 144, 160], 2))
    H, group, rows = (int(random.integers(1, n)) for n in (4, 9, 9))
    cache = held(int(random.integers(140, 700)), bits, D, Dv, H=H)
    cache.trim(int(random.integers(0, 60)))
    cache.update_and_fetch(normal(7, 1, H, rows, D), normal(8, 1, H, rows, Dv))
    return both(cache, normal(seed, 1, H * group, rows, D), "causal", launched=launched)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_shapes(seed: int) -> None:
    near(*of_seed(seed))


@pytest.mark.parametrize("tokens", [1, 4, 100, 132])
def test_lengths(tokens: int) -> None:
    """Nothing but first tokens, nothing coded yet, and the first block."""
    near(*both(held(tokens, (3.5, 3.5), 64, 64), normal(3, 1, 2, min(tokens, 3), 64), "causal"))


def test_masks_and_sinks() -> None:
    cache, q = held(400, (3, 3), 64, 64, H=2), normal(3, 1, 4, 4, 64)
    sinks = normal(4, 4) + 3
    window = cache.make_mask(4, window_size=200, return_array=True)[:, :400]
    holes = normal(6, 4, 400) > 0
    for mask in ("causal", window, holes):
        near(*both(cache, q, mask, sinks))
        near(*both(cache, q, mask))


def test_a_crossing() -> None:
    """Some rows read a block ahead as codes."""
    for tokens in (131, 131 + 192):
        cache = held(tokens, (3.5, 4), 64, 64, H=2)
        view, _ = cache.update_and_fetch(normal(4, 1, 2, 6, 64), normal(5, 1, 2, 6, 64))
        assert view.crossing
        near(*both(cache, normal(3, 1, 4, 6, 64), "causal", crossing=view.crossing))


def test_a_pass_is_one_launch_and_a_merge() -> None:
    names: list[tuple[str, int]] = []

    def counted(name: str, inputs: Any, template: Any, groups: Any, threads: int, o: Any) -> Any:
        names.append((name, threads))
        return emulated(name, inputs, template, groups, threads, o)

    cache = held(421, (3.5, 3.5), 64, 64, H=2)
    both(cache, normal(3, 1, 8, 8, 64), "causal", launched=counted)
    assert [name for name, _ in names] == ["codes", "codes_merge"]
    assert all(threads <= 896 for _, threads in names)
    names.clear()
    both(held(140, (3.5, 3.5), 64, 64), normal(3, 1, 2, 1, 64), launched=counted)
    assert [name for name, _ in names] == ["codes"]


@pytest.mark.parametrize("rows", [1, 8, 64, 65, 128, 512])
def test_sums_fit_a_threadgroup(rows: int) -> None:
    for D in (64, 80, 128, 256, 512):
        taken, simdgroups = codes.shape(rows, D)
        assert 0 < taken <= rows and taken * D <= codes.SUMS + D
        assert -(-rows // taken) * taken - rows < taken
        memory = 32 * 65 + 33 * taken + 2 * 512  # floats: tile, weights and factors, codebooks
        assert 4 * memory <= 32768
        assert 32 * simdgroups <= 896 and taken * D <= 64 * 32 * simdgroups + D
    assert codes.shape(64, 512)[0] == 64


def test_a_long_context_has_no_more_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans grow where they would be more than the merge has room for."""
    seen: list[list[int]] = []

    def dry(
        name: str, inputs: Sequence[mx.array], t: Any, g: Any, n: int, outputs: Any
    ) -> list[mx.array]:
        seen.append(inputs[-1].tolist())  # type: ignore[arg-type]
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    cache = held(200, (3.5, 3.5), 64, 64)
    side = attention.as_kernel_side(cache.keys, 0)
    for coded in (1, 128, 129, 16384, 16385, 131072, 1 << 20):
        codes.over_codes(dry, normal(1, 1, 1, 1, 64), side, side, rows=1, coded=coded)
        _, _, span, splits = seen[-1]
        assert splits <= codes.SPLITS and span % 32 == 0
        assert (splits - 1) * span < coded <= splits * span


def test_rows_that_recent_tokens_lack() -> None:
    cache = held(300, (3.5, 3.5), 64, 64)
    cache.trim(106)
    with pytest.raises(ValueError, match="rows"):
        both(cache, normal(3, 1, 2, 8, 64), "causal")
