"""Our GPU kernels in place of MLX's functions, where this GPU runs them right and faster.

    kernels.gpu.install(model, rows=[2, 3])     # once its weights are there
    print(kernels.gpu.describe())

Kernels come as source and are compiled by the user's own driver, so nothing is taken for granted:
each is checked against plain MLX, and products, which MLX tunes for one row or for many, are timed
beside MLX's own for every shape of the model. What is wrong is left out with a warning, what is not
faster silently. MLX's functions stay the fallback for all other shapes.

Limits: timings are of the weights alone in turns, on an otherwise idle GPU.

    python -m pytest tests/test_gpu.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle, islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, switch_layers

from .cuda import launch as cuda_launch
from .experts import Stack
from .metal import check, delta, products
from .metal import launch as metal_launch
from .metal.launch import Launch

Key = tuple[Any, ...]
Formats = tuple[check.Format, ...]

GAIN = 0.95  # of MLX's time, at most
TURNS, CALLS = 5, 8  # evaluations that take turns, products in each
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_mlx: dict[str, Callable[..., Any]] = {
    "quantized_matmul": mx.quantized_matmul,
    "gated_delta_ops": gated_delta.gated_delta_ops,
    "switch": switch_layers.SwitchGLU.__call__,
}


class Taken:
    """What was taken over in this process, and how it is launched."""

    def __init__(self) -> None:
        self.launch: Launch | None = None
        self.usable: dict[tuple[str, Formats], bool] = {}  # checks that were made
        self.tried: dict[Key, bool] = {}  # shapes of products that were timed

    def uses(self, name: str, formats: Formats = ()) -> bool:
        """Whether the check `name` passes on this GPU, with weights so; made at the first call."""
        if self.launch is None:
            return False
        key = name, formats
        if key not in self.usable:
            self.usable[key] = name in check.passing(self.launch, [name], formats)
        return self.usable[key]

    def prefers(self, key: Key, ours: Iterator[mx.array], theirs: Iterator[mx.array]) -> None:
        """Times both, if it was not done before."""
        if key not in self.tried:
            self.tried[key] = faster(ours, theirs)


_taken = Taken()


@cache
def launcher() -> Launch | None:
    """How kernels start on MLX's default device, or None where it is no GPU."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    if mx.metal.is_available():
        return metal_launch.metal
    return cuda_launch.cuda if mx.cuda.is_available() else None


def install(
    model: nn.Module,
    rows: Sequence[int] = (),
    switches: Sequence[nn.Module] = (),
    top_k: int = 0,
    launch: Launch | None = None,
) -> bool:
    """Take over what gains on this GPU, for `model` and passes of so many rows; False without one.

    rows: of verify passes, 2 to 16; none leaves linears to MLX. switches: the model's SwitchGLU
    over slots [S, ...], called with `top_k` of them a row. May be called again, for other models.
    """
    _taken.launch = launch or launcher()
    if _taken.launch is None:
        return False
    counts = [n for n in rows if 1 < n <= products.ROWS]
    # mlx-lm has a Metal kernel of its own, and elsewhere a loop over tokens in single operations
    if not mx.metal.is_available() and uses_delta(model) and uses("delta"):
        gated_delta.gated_delta_ops = gated_delta_ops
    if mx.metal.is_available() or launch is not None:  # measured with CUDA: nothing gained
        try_linears(model, counts)
        try_switches(switches, [1, *counts], top_k)
    if _gained("linear"):
        mx.quantized_matmul = quantized_matmul
    if _gained("switch"):
        switch_layers.SwitchGLU.__call__ = switch
    return True


def _gained(kind: str) -> int:
    """How many shapes of linears, or of switches, ours are faster for."""
    return sum(good for key, good in _taken.tried.items() if key[0] == kind)


def uninstall() -> None:
    """Put MLX's functions back and forget what was tried."""
    global _taken
    _taken = Taken()
    mx.quantized_matmul = _mlx["quantized_matmul"]
    gated_delta.gated_delta_ops = _mlx["gated_delta_ops"]
    switch_layers.SwitchGLU.__call__ = _mlx["switch"]


def uses(name: str, formats: Formats = ()) -> bool:
    """Whether the kernel of that check runs in this process, with weights of these formats."""
    return _taken.uses(name, formats)


def launch() -> Launch:
    """How kernels start, where `uses` says that one runs."""
    assert _taken.launch is not None
    return _taken.launch


def describe() -> str:
    """One line for people."""
    names = {"delta": "gated delta", "codes": "attention over codes"}
    good = [text for name, text in names.items() if _taken.usable.get((name, ()))]
    for kind in ("linear", "switch"):
        if gained := _gained(kind):
            tried = sum(key[0] == kind for key in _taken.tried)
            good.append(f"{kind} of {gained} of {tried} shapes")
    return f"GPU kernels: {', '.join(good) or 'MLX own'}"


def uses_delta(model: nn.Module) -> bool:
    """Whether a module of mlx-lm's model has gated delta nets, by its name for the update."""
    modules = {type(layer).__module__ for _, layer in model.named_modules()}
    return any(hasattr(sys.modules.get(name), "gated_delta_update") for name in modules)


def try_linears(model: nn.Module, rows: Iterable[int]) -> None:
    """Time products of so many rows for every form of the model's quantized linears."""
    alike: dict[Key, list[Stack]] = {}
    for _, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            stack = plain(Stack.of(layer))
            alike.setdefault(form(stack), []).append(stack)
    for stacks in alike.values():
        for count in rows:
            x = like(stacks[0], count)
            if products.fits(x, stacks[0]) and uses("linear", (format_of(stacks[0]),)):
                ours = (products.linear(launch(), x, s) for s in cycle(stacks))
                theirs = (by_mlx(x, s) for s in cycle(stacks))
                _taken.prefers(("linear", count, *form(stacks[0])), ours, theirs)


def try_switches(switches: Sequence[nn.Module], rows: Iterable[int], top_k: int) -> None:
    """Time the experts of rows that choose `top_k` slots each, at random, for every form."""
    alike: dict[Key, list[nn.Module]] = {}
    for layer in switches:
        if known(layer):
            alike.setdefault(forms(layer), []).append(layer)
    for layers in alike.values():
        gate = Stack.of(layers[0]["gate_proj"])
        for count in rows:
            x = like(gate, count)
            slots = mx.random.randint(0, gate.w.shape[0], (count, top_k))
            formats = tuple(format_of(stack) for stack in stacks_of(layers[0])[1:])
            if fits(x, layers[0]) and uses("experts", formats):
                ours = (
                    products.gather_swiglu(launch(), x, slots, *stacks_of(s)) for s in cycle(layers)
                )
                theirs = (_mlx["switch"](s, x, slots) for s in cycle(layers))
                _taken.prefers(("switch", count, top_k, *forms(layers[0])), ours, theirs)


def faster(ours: Iterator[mx.array], theirs: Iterator[mx.array]) -> bool:
    """Whether evaluating `ours` takes less time, by `GAIN`: medians of evaluations in turns."""
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 1):  # the first compiles
        for side, times in zip((ours, theirs), took, strict=True):
            start = time.perf_counter()
            mx.eval(list(islice(side, CALLS)))
            if turn:
                times.append(time.perf_counter() - start)
    mine, other = (sorted(times)[TURNS // 2] for times in took)
    return mine < GAIN * other


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    **options: Any,
) -> mx.array:
    """x [..., K] times w [N, K]: ours where it was faster for this shape, MLX's otherwise."""
    count = x.size // x.shape[-1] if x.size else 0
    if 1 < count <= products.ROWS and transpose and w.ndim == 2 and not options:
        stack = Stack(w, scales, biases, None, group_size or 64, bits or 4, mode)
        if _taken.tried.get(("linear", count, *form(stack))) and products.fits(x, stack):
            return products.linear(launch(), x, stack)
    return _mlx["quantized_matmul"](
        x,
        w,
        scales=scales,
        biases=biases,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=mode,
        **options,
    )


def gated_delta_ops(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """mlx-lm's gated delta rule: (y [B, T, Hv, Dv], state [B, Hv, Dv, Dk] float32)."""
    if mask is not None or not delta.fits(k) or not k.shape[1]:
        return _mlx["gated_delta_ops"](q, k, v, g, beta, state, mask)
    if state is None:
        state = mx.zeros((v.shape[0], *v.shape[2:], k.shape[-1]))
    y, after, _ = delta.steps(launch(), q, k, v, g, beta, state)
    return y, after


def switch(self: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
    """SwitchGLU: x [..., D], indices [..., k] -> [..., k, D]."""
    count = x.size // x.shape[-1] if x.size else 0
    if 0 < count <= products.ROWS:
        of = self.__dict__.get("_forms")
        if of is None:
            of = self.__dict__["_forms"] = forms(self) if known(self) else ()
        if _taken.tried.get(("switch", count, indices.shape[-1], *of)) and fits(x, self):
            return products.gather_swiglu(launch(), x, indices, *stacks_of(self))
    return _mlx["switch"](self, x, indices)


def known(layer: nn.Module) -> bool:
    """Whether a switch is SwiGLU over quantized weights whose gate and up are alike."""
    if type(layer) is not switch_layers.SwitchGLU:
        return False
    linears = [layer[name] for name in PROJECTIONS]
    quantized = all("scales" in linear and "bias" not in linear for linear in linears)
    swiglu = type(layer.activation) is switch_layers.SwiGLU
    return swiglu and quantized and form(Stack.of(linears[0])) == form(Stack.of(linears[1]))


def fits(x: mx.array, layer: nn.Module) -> bool:
    """Whether the kernel takes rows of this type with a switch that is `known`."""
    return all(products.fits(x, stack) for stack in stacks_of(layer))


def stacks_of(layer: nn.Module) -> tuple[Stack, Stack, Stack]:
    """Gate, up and down."""
    gate, up, down = (Stack.of(layer[name]) for name in PROJECTIONS)
    return gate, up, down


def forms(layer: nn.Module) -> Key:
    """What times of a switch depend on, beside rows and slots."""
    gate, _, down = stacks_of(layer)
    return form(gate) + form(down)


def form(stack: Stack) -> Key:
    """What times of a product depend on, beside rows and slots."""
    scales = None if stack.scales is None else stack.scales.dtype
    return (*stack.w.shape[-2:], stack.group_size, stack.bits, stack.mode, scales)


def format_of(stack: Stack) -> check.Format:
    """As the check names it."""
    return stack.mode, stack.group_size, stack.bits


def plain(stack: Stack) -> Stack:
    """Without the bias, which the layer adds."""
    return replace(stack, bias=None)


def like(stack: Stack, rows: int) -> mx.array:
    """Random rows of the width and type that go with these weights."""
    assert stack.scales is not None
    dtype = stack.scales.dtype if stack.mode == "affine" else mx.bfloat16
    return mx.random.normal((rows, stack.w.shape[-1] * 32 // stack.bits)).astype(dtype)


def by_mlx(x: mx.array, stack: Stack) -> mx.array:
    """products.linear by MLX."""
    w, scales, biases = stack.arrays
    options: dict[str, Any] = {"bits": stack.bits, "group_size": stack.group_size}
    return _mlx["quantized_matmul"](
        x, w, scales=scales, biases=biases, transpose=True, mode=stack.mode, **options
    )


if __name__ == "__main__":
    _taken.launch = launcher()
    right = [name for name in check.CHECKS if uses(name, check.FORMATS)]
    print(f"GPU kernels that are right here: {', '.join(right) or 'none'}")
