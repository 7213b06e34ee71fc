"""Opening checkpoint folders: what is refused, in which words, and how quickly."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from streamer.checkpoint import INDEX, Checkpoint
from streamer.errors import CheckpointError

pytestmark = pytest.mark.smoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in (1, 2):
        save_file({f"w{i}": np.ones(4, np.float32)}, tmp_path / f"model-{i}-of-2.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    weights = {f"w{i}": f"model-{i}-of-2.safetensors" for i in (1, 2)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    return tmp_path


def refused(path: Path, what: str) -> None:
    with pytest.raises(CheckpointError, match=what) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)


def test_a_whole_one(folder: Path) -> None:
    save_file({"mtp.fc": np.ones(4, np.float32)}, folder / "mtp.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == {"w1", "w2"} and checkpoint.nbytes == 32
    assert [p.name for p in checkpoint.side_files] == ["mtp.safetensors"]


def test_the_fingerprint_tells_models_apart(folder: Path) -> None:
    before = Checkpoint.open(folder).fingerprint
    assert before == Checkpoint.open(folder).fingerprint
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    assert before != Checkpoint.open(folder).fingerprint


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", "GGUF is not read")
    (tmp_path / "m.safetensors").write_bytes(b"")
    refused(tmp_path / "m.safetensors", "give the folder")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "config.json is missing"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
    ],
)
def test_configurations(folder: Path, text: str | None, what: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, what)


def test_other_formats(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX).unlink()
    refused(folder, "no model.*safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "only PyTorch files")


def test_shards(folder: Path) -> None:
    save_file({"w1": np.ones(4, np.float32)}, folder / "model-2-of-2.safetensors")
    refused(folder, "stands in both")
    (folder / "model-2-of-2.safetensors").unlink()
    refused(folder, "model-2-of-2.safetensors is named by the index and missing")
    save_file({"other": np.ones(4, np.float32)}, folder / "model-2-of-2.safetensors")
    refused(folder, "'w2' is not in model-2-of-2.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_indexes(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, "index.json")


def test_400_gb_open_in_two_seconds(tmp_path: Path) -> None:
    """100,000 tensors in 160 shards, sparse: only headers can have been read."""
    shards, each, nbytes = 160, 625, 4_000_000
    for i in range(shards):
        header = {
            f"model.layers.{i}.mlp.experts.{j // 3}.{['gate', 'up', 'down'][j % 3]}_proj.weight": {
                "dtype": "U8",
                "shape": [1000, 4000],
                "data_offsets": [j * nbytes, (j + 1) * nbytes],
            }
            for j in range(each)
        }
        text = json.dumps(header).encode()
        with open(tmp_path / f"model-{i:03}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + each * nbytes)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        checkpoint = Checkpoint.open(tmp_path)
        best = min(best, time.perf_counter() - began)
    assert checkpoint.nbytes == 400e9 and len(checkpoint.tensors) == 100_000
    assert best < 2, f"{best:.2f} s"
