"""Opening checkpoint folders: what is refused, in which words, and how quickly."""

import gc
import json
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from streamer.checkpoint import INDEX, SETTINGS, Checkpoint, _check_counts
from streamer.errors import CheckpointError

pytestmark = pytest.mark.smoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in (1, 2):
        save_file({f"w{i}": np.ones(4, np.float32)}, tmp_path / f"model-{i}-of-2.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "hidden_size": 4}')
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
    assert [p.name for p in checkpoint.files] == [
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
    ]
    assert [p.name for p in checkpoint.side_files] == ["mtp.safetensors"]
    (folder / "._mtp.safetensors").write_bytes(b"macOS puts these on foreign disks")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert Checkpoint.open(folder) == checkpoint


def test_the_fingerprint_tells_models_apart(folder: Path, tmp_path: Path) -> None:
    seen = {Checkpoint.open(folder).fingerprint}
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (elsewhere / "config.json").write_text('{"hidden_size":4,"model_type":"olmoe"}')
    assert seen == {Checkpoint.open(elsewhere).fingerprint}
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    seen.add(Checkpoint.open(folder).fingerprint)
    (folder / INDEX).unlink()
    for changed in (
        {"w9": np.ones(4, np.float32)},
        {"w2": np.ones(4, np.int32)},
        {"w2": np.ones((2, 2), np.float32)},
        {"w2": np.ones(5, np.float32)},
        {"w2": np.ones(4, np.float32), "w3": np.ones(4, np.float32)},
    ):
        save_file(changed, folder / "model-2-of-2.safetensors")
        seen.add(Checkpoint.open(folder).fingerprint)
    save_file({"w2": np.ones(4, np.float32)}, folder / "model-2-of-2.safetensors", {"longer": "x"})
    seen.add(Checkpoint.open(folder).fingerprint)
    assert len(seen) == 8


def test_garbage_is_collected_again(folder: Path) -> None:
    try:
        for was in (gc.enable, gc.disable):
            was()
            before = gc.isenabled()
            Checkpoint.open(folder)
            refused(folder / "none", "no such folder")
            assert gc.isenabled() == before
    finally:
        gc.enable()


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", "GGUF is not read")
    (tmp_path / "m.safetensors").write_bytes(b"")
    refused(tmp_path / "m.safetensors", "give the folder that holds it, ")
    refused(tmp_path / "m.safetensors" / "x", "no such folder")
    refused(tmp_path / "a\0b", "no such folder")
    refused(tmp_path / ("x" * 5000), "File name too long")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "config.json is missing"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "config.json is not a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": ""}', "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "olmoe", "eos_token_id": "</s>"}', 'config.json: eos_token_id is "</s>"'),
    ],
)
def test_configurations(folder: Path, text: str | None, what: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, what)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON: 'utf-8' codec"),
        (b'{"eos_token_id": [1, "2"]}', 'eos_token_id is .1, "2"., not a token'),
        (b'{"eos_token_id": true}', "eos_token_id is true"),
        (None, "is missing; its link leads nowhere"),
    ],
)
def test_settings(folder: Path, name: str, data: bytes | None, what: str) -> None:
    if data is None:
        (folder / name).symlink_to("a-blob-that-is-gone")
    else:
        (folder / name).write_bytes(data)
    refused(folder, f"{name}:? {what}")


def test_other_formats(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX).unlink()
    refused(folder, "no model.*safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "only PyTorch files")
    (folder / "m.gguf").write_bytes(b"")
    refused(folder, "only GGUF files")


def test_no_tensors(folder: Path) -> None:
    (folder / INDEX).unlink()
    for file in folder.glob("model*"):
        save_file({}, file)
    refused(folder, "holds no tensors")


def test_shards(folder: Path) -> None:
    second = folder / "model-2-of-2.safetensors"
    save_file({"w1": np.ones(4, np.float32)}, second)
    refused(folder, "'w1' stands in both model-1-of-2.safetensors and model-2-of-2.safetensors")
    second.unlink()
    refused(folder, "model-2-of-2.safetensors is named by the index and missing$")
    second.symlink_to("a-blob-that-is-gone")
    refused(folder, "cannot read .*model-2-of-2.safetensors: No such file")
    second.unlink()
    for held in ({"other": np.ones(4, np.float32)}, {}):
        save_file(held, second)
        refused(folder, "'w2' is not in model-2-of-2.safetensors")
    second.unlink()
    (folder / "model-1-of-2.safetensors").unlink()
    refused(folder, r"model-1-of-2.safetensors is named by the index and missing \(and 1 more\)")


def test_side_files_that_the_index_names(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"mtp.fc": "mtp.safetensors"}}')
    refused(folder, "mtp.safetensors is named by the index and missing")
    save_file({"other": np.ones(4, np.float32)}, folder / "mtp.safetensors")
    refused(folder, "'mtp.fc' is not in mtp.safetensors")
    save_file({"mtp.fc": np.ones(4, np.float32)}, folder / "mtp.safetensors")
    assert Checkpoint.open(folder).tensors.keys() == {"w1", "w2"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "two\\nlines"}}',
        '{"weight_map": {"a": "\\ud800"}}',
    ],
)
def test_indexes(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, "index.json")


def test_an_index_that_is_no_file(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("a-blob-that-is-gone")
    refused(folder, "index.json is missing; its link leads nowhere")
    (folder / INDEX).unlink()
    (folder / INDEX).write_text('{"weight_map": {"a": "%s"}}' % ("x" * 300))
    refused(folder, "xxx is named by the index and missing")


def test_400_gb_open_in_two_seconds(tmp_path: Path) -> None:
    """100,000 sparse tensors in 160 shards: only headers can have been read.

    In processor time, which other work on the machine does not stretch so much.
    """
    shards, each, nbytes = 160, 625, 4_000_000
    weights: dict[str, str] = {}
    for i in range(shards):
        header = {
            f"model.layers.{i}.mlp.experts.{j // 3}.{['gate', 'up', 'down'][j % 3]}_proj.weight": {
                "dtype": "U8",
                "shape": [1000, 4000],
                "data_offsets": [j * nbytes, (j + 1) * nbytes],
            }
            for j in range(each)
        }
        shard = tmp_path / f"model-{i + 1:05}-of-{shards:05}.safetensors"
        weights |= dict.fromkeys(header, shard.name)
        text = json.dumps(header).encode()
        with open(shard, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + each * nbytes)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        checkpoint = Checkpoint.open(tmp_path)
        best = min(best, time.process_time() - began)
    assert checkpoint.nbytes == 400e9 and len(checkpoint.tensors) == 100_000
    assert best < 2, f"{best:.2f} s"


@pytest.mark.smoke
def test_a_dense_model_may_name_no_experts() -> None:
    _check_counts(Path("config.json"), {"num_local_experts": 0, "num_experts_per_tok": 0}, 10)
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 0"):
        _check_counts(Path("config.json"), {"num_local_experts": 8, "num_experts_per_tok": 0}, 10)
