"""The header reader against the safetensors library, and against anything at all."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from streamer.errors import CheckpointError
from streamer.header import MAX_HEADER, read_header

pytestmark = pytest.mark.smoke
fuzz = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def accepted_by_the_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), s.get_shape()) for n, s in slices.items()}
    except (SafetensorError, ValueError):
        return None


def test_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.random((3, 5)).astype(np.float32),
        "b": rng.integers(0, 9, (2, 2, 2)).astype(np.uint8),
        "c.d": np.zeros((0, 4), np.float16),
        "e": np.array(7, np.int64),
    }
    save_file(arrays, tmp_path / "m.safetensors", {"format": "np"})
    tensors = read_header(tmp_path / "m.safetensors")
    assert tensors.keys() == arrays.keys()
    blob = (tmp_path / "m.safetensors").read_bytes()
    for name, array in arrays.items():
        t = tensors[name]
        assert t.shape == array.shape
        assert blob[t.offset : t.offset + t.nbytes] == array.tobytes()


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        ({"a": entry()}, b"1234567", "cut off"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlaps"),
        ({"a": entry(), "b": entry(offsets=[16, 24])}, bytes(24), "hole"),
        ({"a": entry()}, bytes(12), "no tensor names"),
        ({"a": entry(shape=[3])}, bytes(8), "needs 12"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "takes bytes 8 to 0"),
        ({"a": entry(shape=[-2])}, bytes(8), "lists of sizes"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "lists of sizes"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8), "needs"),
        ({"a": entry(dtype="F99")}, bytes(8), "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "not described"),
        ({"a": 3}, b"", "not described"),
        ([1], b"", "not a JSON object"),
        (b'{"a": ', b"", "damaged header"),
        (b"\xff\xfe{}", b"", "damaged header"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
    ],
)
def test_a_lying_header_is_named(tmp_path: Path, header: object, data: bytes, what: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=what) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert accepted_by_the_library(path) is None


@pytest.mark.parametrize(
    "text",
    [
        b'{"__metadata__":{"a":"1","a":"2"}}',
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":1}}',
    ],
)
def test_stricter_than_the_library(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "strict.safetensors", text)
    assert accepted_by_the_library(path) is not None
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 1 << 63, 4096])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError):
        read_header(write(tmp_path / "x", {}, length=length))


def test_missing_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="3 bytes long"):
        read_header(tmp_path / "short")


@fuzz
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    agree(tmp_path, data)


@fuzz
@given(st.binary(max_size=100), st.binary(max_size=40))
def test_random_headers(tmp_path: Path, text: bytes, data: bytes) -> None:
    agree(tmp_path, struct.pack("<Q", len(text)) + text + data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 66) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "F8_E4M3", "I64"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
    }
)


@fuzz
@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3), st.integers(0, 64))
def test_random_json(tmp_path: Path, header: dict, size: int) -> None:
    text = json.dumps(header).encode()
    agree(tmp_path, struct.pack("<Q", len(text)) + text + bytes(size))


def agree(folder: Path, blob: bytes) -> None:
    """Accepted exactly when the library accepts, with the same dtypes and shapes."""
    path = folder / "fuzzed.safetensors"
    path.write_bytes(blob)
    theirs = accepted_by_the_library(path)
    try:
        ours = {n: (t.dtype, list(t.shape)) for n, t in read_header(path).items()}
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert theirs is None, f"the library accepts what is refused here: {error}"
    else:
        assert theirs == ours
