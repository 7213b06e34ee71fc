"""Which kernels run: the C++ extension on the CPU, or the pure-MLX fallbacks.

The extension is used where it was built, accepts this MLX's arrays and MLX's default device is the
CPU; STREAMER_KERNELS=off turns it off. STREAMER_ISA forces one of its instruction sets,
STREAMER_THREADS its threads, STREAMER_SPIN_US how long they spin before they sleep (60).

    python -m kernels.backend
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType

import mlx.core as mx

MODULE = "kernels.native"


@cache
def native() -> ModuleType | None:
    """The extension, or None; why not is said once, as a warning, unless it was turned off."""
    if os.environ.get("STREAMER_KERNELS", "on") == "off":
        return None
    try:
        # After mlx.core: the extension finds MLX's library already loaded.
        module = importlib.import_module(MODULE)
        works = module.linear(mx.ones((1, 4)), mx.ones((1, 4)), stream=mx.cpu).item() == 4
        reason = "" if works else "it computes wrongly here"
    except ImportError as error:
        reason = str(error)
    except TypeError:
        reason = "it was built against another MLX"
    if reason:
        warnings.warn(
            f"CPU kernels are off, MLX's own run instead: {reason}. "
            "A C++ compiler, Python's headers and a reinstall would bring them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    wanted = os.environ.get("STREAMER_ISA", module.isa())
    if wanted != module.isa():
        warnings.warn(
            f"STREAMER_ISA={wanted} is not among {', '.join(module.isas())}: using {module.isa()}",
            RuntimeWarning,
            stacklevel=2,
        )
    return module


def available() -> bool:
    """Whether the extension runs for arrays on the default device."""
    return mx.default_device() == mx.cpu and native() is not None


def isa() -> str:
    """The instruction set in use: one of `native.isas()`, or mlx for the fallbacks."""
    module = native()
    return module.isa() if module is not None and available() else "mlx"


def threads() -> int:
    """How many threads share one product (1 with the fallbacks)."""
    module = native()
    return module.threads() if module is not None else 1


def set_threads(count: int) -> None:
    """Shares products among `count` threads, the calling one included; at least 1."""
    module = native()
    if module is not None:
        module.set_threads(max(1, count))


def describe() -> str:
    """One line for people: back end, instruction set, threads."""
    if not available():
        return "kernels: MLX's own"
    return f"kernels: {isa()}, {threads()} thread{'s' * (threads() != 1)}"


if __name__ == "__main__":
    print(describe())
