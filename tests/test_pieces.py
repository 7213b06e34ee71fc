"""Pieces of an array's rows, joined, are the array, whatever was done to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from streamer import pieces
from streamer.checkpoint import Checkpoint
from streamer.pieces import Pieces, piecewise, recipe

RNG = np.random.default_rng(0)
STORED = {
    "stacked": mx.array(RNG.standard_normal((6, 8, 64), np.float32)),
    "matrix": mx.array(RNG.standard_normal((40, 64), np.float32)),
    "codes": mx.array(RNG.integers(0, 255, (6, 8, 16), np.uint8)),
    "square": mx.array(RNG.standard_normal((6, 6, 6, 64), np.float32)),
    "scales": mx.array(RNG.standard_normal((6, 1, 1), np.float32)),
    "row": mx.array(RNG.standard_normal(64, np.float32)),
}
Arrays = dict[str, Any]

KEPT: dict[str, Callable[[Arrays], Any]] = {
    "loaded": lambda a: a["stacked"],
    "loaded matrix": lambda a: a["matrix"],
    "every other": lambda a: a["stacked"][..., ::2, :],
    "half": lambda a: a["stacked"][:, 4:],
    "one column": lambda a: a["stacked"][..., 3],
    "new axis": lambda a: a["stacked"][:, None],
    "method": lambda a: a["stacked"].swapaxes(-2, -1),
    "moved": lambda a: a["stacked"].moveaxis(1, 2),
    "turned": lambda a: mx.contiguous(mx.swapaxes(a["stacked"], 1, 2)),
    "moved by function": lambda a: mx.moveaxis(a["stacked"], 2, 1),
    "split": lambda a: mx.split(a["stacked"], 2, axis=-1)[1],
    "split at": lambda a: a["stacked"].split([1, 5], 1)[1],
    "reshaped": lambda a: a["stacked"].reshape(6, 2, -1),
    "flattened": lambda a: a["codes"].view(mx.uint32).flatten(-2),
    "cast": lambda a: a["stacked"].astype(mx.bfloat16),
    "fp8": lambda a: mx.from_fp8(a["codes"], dtype=mx.bfloat16),
    "doubled": lambda a: a["stacked"] * 2,
    "by expert": lambda a: a["stacked"] * a["scales"],
    "by column": lambda a: a["stacked"] * a["row"],
    "by itself": lambda a: a["stacked"] * a["stacked"],
    "stack": lambda a: mx.stack([a["row"], a["row"] + 1, a["row"] * 2]),
    "quantized": lambda a: mx.quantize(a["stacked"], 32, 4)[0],
    "its scales": lambda a: mx.quantize(a["stacked"], 32, 4)[1],
    "its biases": lambda a: mx.quantize(a["matrix"], 32, 4)[2],
    "dequantized": lambda a: mx.dequantize(*mx.quantize(a["stacked"], 32, 4), 32, 4),
    "scales cut otherwise": lambda a: mx.dequantize(
        mx.quantize(a["matrix"], 32, 8)[0], *mx.quantize(a["matrix"] + 0, 32, 8)[1:], 32, 8
    ),
    "mxfp4": lambda a: mx.dequantize(*mx.quantize(a["stacked"], mode="mxfp4"), mode="mxfp4"),
}
DROPPED: dict[str, Callable[[Arrays], Any]] = {
    "one": lambda a: a["square"][2],
    "rows": lambda a: a["square"][1:3],
    "row steps": lambda a: a["square"][::2, 1:],
    "all given after an ellipsis": lambda a: a["square"][..., 1:3, :, :, :],
    "by array": lambda a: a["square"][mx.array([3, 1])],
    "transposed": lambda a: a["square"].swapaxes(0, 1),
    "transposed by function": lambda a: mx.swapaxes(a["square"], -4, 1),
    "moved": lambda a: mx.moveaxis(a["square"], 2, 0),
    "joined": lambda a: mx.concatenate([a["square"], a["square"]], axis=0),
    "stack": lambda a: mx.stack([a["square"], a["square"]], axis=1),
    "split": lambda a: mx.split(a["square"], 3)[1],
    "fewer rows": lambda a: a["square"].reshape(36, -1),
    "flat": lambda a: a["stacked"].flatten(),
    "more axes": lambda a: a["row"] * a["stacked"][0] * a["stacked"][:, 0, None, :],
    "broadcast": lambda a: a["stacked"][:, :1, :1] * a["square"],
    "sum": lambda a: a["square"] + 1,
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(pieces, "PIECE", 600)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), STORED)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    return Checkpoint.open(tmp_path)


def made(checkpoint: Checkpoint, operation: Callable[[Arrays], Any]) -> mx.array:
    with piecewise(checkpoint):
        return operation(mx.load(str(checkpoint.files[0])))


def joined(array: mx.array) -> tuple[int, mx.array]:
    parts = list(recipe(array).take())
    return len(parts), mx.concatenate(parts)


@pytest.mark.parametrize("name", KEPT)
def test_what_leaves_rows_apart_is_made_in_pieces(checkpoint: Checkpoint, name: str) -> None:
    array, wanted = made(checkpoint, KEPT[name]), KEPT[name](STORED)
    count, got = joined(array)
    assert isinstance(array, Pieces)
    assert count > 1
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert mx.array_equal(got, wanted, equal_nan=True)
    assert mx.array_equal(array, wanted, equal_nan=True)


@pytest.mark.parametrize("name", DROPPED)
def test_what_mixes_rows_is_made_whole(checkpoint: Checkpoint, name: str) -> None:
    count, got = joined(made(checkpoint, DROPPED[name]))
    assert count == 1 or name in ("more axes", "broadcast")
    assert mx.array_equal(got, DROPPED[name](STORED))


@pytest.mark.parametrize("cut", [(6,), (1, 5), (3, 3)])
def test_parts_that_do_not_match_are_cut_anew(checkpoint: Checkpoint, cut: tuple) -> None:
    scales = STORED["scales"]
    other = pieces._pieces(scales, cut, pieces._cut(scales, cut))
    _, got = joined(made(checkpoint, lambda a: a["stacked"] * other))
    assert mx.array_equal(got, STORED["stacked"] * STORED["scales"])


def test_a_change_in_place_is_refused(checkpoint: Checkpoint) -> None:
    array = made(checkpoint, lambda a: a["stacked"])
    with pytest.raises(NotImplementedError):
        array[0] = 1
    with pytest.raises(NotImplementedError):
        array += 1


def test_quantized_pieces_are_given_out_once(checkpoint: Checkpoint) -> None:
    codes = recipe(made(checkpoint, lambda a: mx.quantize(a["stacked"], 32, 4)[0]))
    again = list(codes.parts)
    assert len(list(codes.take())) == 6
    with pytest.raises(KeyError):
        again[0]()


def test_mlx_is_left_as_it_was(checkpoint: Checkpoint) -> None:
    before = {name: getattr(mx, name) for name in (*pieces._PATCHES, "load")}
    with pytest.raises(ZeroDivisionError), piecewise(checkpoint):
        assert mx.stack is not before["stack"]
        raise ZeroDivisionError
    assert all(getattr(mx, name) is function for name, function in before.items())
