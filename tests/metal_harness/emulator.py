"""Runs Metal kernels on the CPU: MLX's own generated source, compiled against metal.h.

`source` traces a kernel as mx.fast.metal_kernel would be called and takes the source that MLX would
give to Metal; `run` compiles that with the system's compiler and runs it. C++ has no address
spaces, so three spellings are rewritten, and nothing else: pointers to device or constant memory,
arrays in threadgroup memory, and attributes in [[ ]].

    python -m pytest tests/test_metal_harness.py
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HEADER = Path(__file__).with_name("metal.h")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{\n", re.S)
POINTER = re.compile(r"(const\s+)?\b(?:device|constant)\s+(\w+)\s*\*")
SCALAR = re.compile(r"(const\s+)\bconstant\s+(\w+)\s*&")
SHARED = re.compile(r"\bthreadgroup\s+(\w+)\s+(\w+)\[([^\]]+)\];")


class Caught(Exception):
    """A mistake of a kernel that the harness found."""


def source(
    build: Callable[..., Any], inputs: Sequence[mx.array], arguments: dict[str, Any]
) -> tuple[str, str]:
    """The generated source of one call, and its instance, such as kernel<float, 4>."""

    def call(*arrays: mx.array) -> Any:
        options = {**arguments, "inputs": list(arrays), "verbose": True, "stream": mx.gpu}
        return build(**options)

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder, "traced.mlxfn")), call, *inputs)
        finally:
            os.dup2(before, 1)
            os.close(before)
        printed.seek(0)
        text = printed.read().decode()
    text = text.split("```")[1].strip("\n")
    instance = re.search(r"^template \[\[host_name.*?decltype\((.*?)\) ", text, re.M)
    if instance is None:
        return text, SIGNATURE.search(text)[1]  # type: ignore[index]
    return text[: instance.start()], instance[1]


def translated(text: str) -> str:
    """The source with the spellings rewritten that C++ has not."""
    text = POINTER.sub(r"Device<\1\2>", text)
    text = SCALAR.sub(r"\1\2&", text)
    text = SHARED.sub(r'static Shared<\1, \3> \2("\2");', text)
    return re.sub(r"\[\[[^\]]*\]\]", "", text)


def program(
    text: str,
    instance: str,
    grid: Sequence[int],
    threads: Sequence[int],
    widths: Sequence[tuple[int, int]],
) -> str:
    """A main() that reads a file per input, runs the grid and writes a file per output.

    widths: elements and bytes of an element, of each output.
    """
    parameters = [
        p.strip()
        for p in re.split(r",\n", SIGNATURE.search(text)[2])  # type: ignore[index]
    ]
    setup, passed, saved = [], [], []
    buffers = [p for p in parameters if "[[buffer(" in p]
    for i, parameter in enumerate(buffers):
        kind, name = re.fullmatch(  # type: ignore[union-attr]
            r"(.*?[*&]) (\w+) \[\[.*", parameter
        ).groups()
        output = i - (len(buffers) - len(widths))
        if output < 0:
            setup.append(f'auto b{i} = harness::Buffer::input("{name}", argv[{i + 1}]);')
        else:
            count, width = widths[output]
            setup.append(f'auto b{i} = harness::Buffer::output("{name}", {count}, {width});')
            saved.append(f"b{i}.save(argv[{i + 1}]);")
        if kind.endswith("&"):
            plain = kind.rstrip("&").split()[-1]
            passed.append(f"Device<const {plain}>(b{i})[0]")
        else:
            passed.append(f"{translated(kind)}(b{i})")
    for parameter in parameters[len(buffers) :]:
        passed.append(f"attribute::{parameter.split()[1]}()")
    dims = [f"{{{', '.join(str(d) for d in dim)}}}" for dim in (grid, threads)]
    return "\n".join(
        [
            '#include "metal.h"',
            '#line 1 "kernel"',
            translated(text),
            "int main(int, char** argv) {",
            *setup,
            f"harness::launch({dims[0]}, {dims[1]}, [&] {{ {instance}({', '.join(passed)}); }});",
            *saved,
            "}",
        ]
    )


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where programs lie, until Python ends, beside the headers, which GCC reads compiled."""
    made = tempfile.TemporaryDirectory(prefix="metal-harness-")
    for header in HEADER.parent.glob("*.h"):
        shutil.copy(header, made.name)
    header = Path(made.name, HEADER.name)
    _compile("-x", "c++-header", str(header), "-o", f"{header}.gch")
    return made


def _compile(*arguments: str) -> None:
    assert COMPILER is not None
    flags = ["-std=c++20", "-O1", "-w", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern"]
    done = subprocess.run([COMPILER, *flags, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled(code: str) -> Path:
    """The program of that code; each is compiled once."""
    path = Path(folder().name, hashlib.sha256(code.encode()).hexdigest()[:16])
    if not path.exists():
        path.with_suffix(".cpp").write_text(code)
        _compile(f"-I{folder().name}", str(path.with_suffix(".cpp")), "-o", str(path))
    return path


def compile_all(codes: Iterable[str]) -> None:
    """Compile programs side by side, for `run` to find."""
    folder()
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as workers:
        list(workers.map(compiled, dict.fromkeys(codes)))


def code_of(
    build: Callable[..., Any], inputs: Sequence[mx.array], arguments: dict[str, Any]
) -> str:
    """The program of one call."""
    shapes, dtypes = arguments["output_shapes"], arguments["output_dtypes"]
    text, instance = source(build, inputs, arguments)
    widths = [(int(np.prod(s)), d.size) for s, d in zip(shapes, dtypes, strict=True)]
    return program(text, instance, arguments["grid"], arguments["threadgroup"], widths)


def run(
    build: Callable[..., Any], inputs: Sequence[mx.array], arguments: dict[str, Any]
) -> list[mx.array]:
    """What the kernel's outputs hold; raises Caught with what it did wrong."""
    shapes, dtypes = arguments["output_shapes"], arguments["output_dtypes"]
    path = compiled(code_of(build, inputs, arguments))
    with tempfile.TemporaryDirectory(dir=folder().name) as work:
        names = [Path(work, str(i)) for i in range(len(inputs) + len(shapes))]
        for name, array in zip(names, inputs, strict=False):
            name.write_bytes(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
        done = subprocess.run([path, *names], capture_output=True, text=True, timeout=120)
        if done.returncode == 3:
            raise Caught(done.stderr.strip())
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
        written = [np.frombuffer(n.read_bytes(), np.uint8) for n in names[len(inputs) :]]
    return [
        mx.array(bytes_).view(dtype).reshape(shape)
        for bytes_, dtype, shape in zip(written, dtypes, shapes, strict=True)
    ]
