"""What the tests of the converter share; a test file takes `small_pieces` and `error` by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from streamer import convert, pieces

TOKENS = mx.array([[5, 9, 200, 31, 7, 8, 9, 100, 3, 3, 250, 17]])
SMALL = ["--shard-bytes", "200000"]
HEAD = {"fc.weight": mx.arange(12, dtype=mx.float32).reshape(3, 4), "norm": mx.ones(3, mx.bfloat16)}
Error = Callable[[], str]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the tests are read in pieces, as large ones are."""
    monkeypatch.setattr(pieces, "PIECE", 5000)


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Error:
    """The one line on stderr since it was last asked for."""

    def read() -> str:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return read


def run(*argv: Any) -> int:
    return convert.main([str(a) for a in argv])


def logits(model: Any) -> mx.array:
    return model(TOKENS, cache=make_prompt_cache(model))


def parameters(model: Any) -> dict[str, mx.array]:
    return {n: a for n, a in dict(tree_flatten(model.parameters())).items() if a is not None}


def assert_equal(got: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        assert mx.array_equal(got[name], array, equal_nan=True), name


def tensors(folder: Path) -> dict[str, mx.array]:
    return {n: a for f in folder.glob("model*.safetensors") for n, a in mx.load(str(f)).items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def add_tensors(path: Path, added: dict[str, mx.array]) -> None:
    held = dict(mx.load(str(path))) if path.exists() else {}
    mx.save_safetensors(str(path), held | added)
