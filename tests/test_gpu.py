"""Which GPU kernels are taken over, decided beside a launcher that runs them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_harness import emulator
from mlx_lm.models import gated_delta, qwen3_5, switch_layers
from test_metal_kernels import emulated as emulated_launch

from kernels import gpu

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="there is no C++ compiler")
MLX = (mx.quantized_matmul, switch_layers.SwitchGLU.__call__, gated_delta.gated_delta_ops)


class Emulated:
    """The kernels on the CPU; counts launches by name."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def __call__(self, name: str, *rest: Any) -> list[mx.array]:
        self.launched.append(name)
        return emulated_launch(name, *rest)


class Small(nn.Module):
    """A linear with a bias, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.switch = switch_layers.SwitchGLU(64, 64, 5)
        nn.quantize(self, group_size=32, bits=4)


@pytest.fixture
def emulated() -> Iterator[Emulated]:
    """MLX's functions are put back afterwards."""
    yield Emulated()
    gpu.uninstall()
    places = (mx.quantized_matmul, switch_layers.SwitchGLU.__call__, gated_delta.gated_delta_ops)
    assert places == MLX


def decide(monkeypatch: pytest.MonkeyPatch, *, faster: bool) -> None:
    """Trials end so."""
    monkeypatch.setattr(gpu, "faster", lambda ours, theirs: mx.eval(next(ours)) is None and faster)
    # all formats are what test_metal_kernels is for
    monkeypatch.setattr(gpu.check, "passing", lambda launch, names, formats: frozenset(names))


def close(a: mx.array, b: mx.array) -> bool:
    return mx.allclose(a, b, rtol=1e-4, atol=1e-4).item() is True


def test_what_gains_is_used_and_gives_what_mlx_gives(
    monkeypatch: pytest.MonkeyPatch, emulated: Emulated
) -> None:
    decide(monkeypatch, faster=True)
    model = Small()
    x, slots = mx.random.normal((3, 64)), mx.array([[0, 4], [4, 1], [2, 0]])
    wanted = model.linear(x), model.switch(x, slots)
    mx.eval(wanted)
    assert gpu.install(model, [3], [model.switch], 2, launch=emulated)
    emulated.launched.clear()
    assert close(model.linear(x), wanted[0]) and close(model.switch(x, slots), wanted[1])
    assert emulated.launched == ["linear", "experts", "experts"]
    emulated.launched.clear()
    model.linear(x[:2])  # two rows were not tried
    model.switch(x, slots[:, :1])  # nor was one slot a row
    assert not emulated.launched
    assert "linear of 1 of 1 shapes, switch of 2 of 2 shapes" in gpu.describe()


def test_what_does_not_gain_is_left_to_mlx(
    monkeypatch: pytest.MonkeyPatch, emulated: Emulated
) -> None:
    decide(monkeypatch, faster=False)
    model = Small()
    assert gpu.install(model, [2], [model.switch], 2, launch=emulated)
    assert mx.quantized_matmul is MLX[0]
    assert switch_layers.SwitchGLU.__call__ is MLX[1]


def test_what_is_wrong_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, emulated: Emulated
) -> None:
    def broken(*arguments: Any) -> list[mx.array]:
        return [a * 1.01 for a in emulated(*arguments)]

    monkeypatch.setattr(gpu, "faster", lambda ours, theirs: True)
    with pytest.warns(RuntimeWarning, match="'linear' is off"):
        gpu.install(Small(), [2], launch=broken)
    assert mx.quantized_matmul is MLX[0]


def test_without_a_gpu_nothing_happens() -> None:
    assert mx.default_device() == mx.gpu or not gpu.install(Small(), [2])


def test_gated_delta_is_one_launch(monkeypatch: pytest.MonkeyPatch, emulated: Emulated) -> None:
    decide(monkeypatch, faster=True)
    q, k = (mx.random.normal((1, 7, 1, 32)) / 32**0.5 for _ in range(2))
    v, state = mx.random.normal((1, 7, 2, 5)), mx.random.normal((1, 2, 5, 32))
    g, beta = mx.random.uniform(0.5, 1, (1, 7, 2)), mx.random.uniform(0, 1, (1, 7, 2))
    wanted = MLX[2](q, k, v, g, beta, state)
    model = nn.Sequential(qwen3_5.GatedDeltaNet(config()))
    gpu.install(model, launch=emulated)
    assert gated_delta.gated_delta_ops is not MLX[2]
    found = gated_delta.gated_delta_ops(q, k, v, g, beta, state)
    assert emulated.launched == ["delta"]
    assert all(close(a, b) for a, b in zip(found, wanted, strict=True))
    masked = gated_delta.gated_delta_ops(q, k, v, g, beta, state, mx.ones((1, 7), mx.bool_))
    assert emulated.launched == ["delta"] and close(masked[0], wanted[0])


def config() -> qwen3_5.TextModelArgs:
    return qwen3_5.TextModelArgs(
        model_type="qwen3_5",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
    )


@pytest.mark.timed
def test_faster_is_told_from_slower() -> None:
    small, large = mx.zeros((4, 4)), mx.random.normal((600, 600))
    assert gpu.faster((a + 1 for a in repeat(small)), (a @ a for a in repeat(large)))
    assert not gpu.faster((a @ a for a in repeat(large)), (a + 1 for a in repeat(small)))
