"""The unquantized demo checkpoint: Hugging Face names, bfloat16, shards of at most 14 MB.

`Qwen3_5MoeForCausalLM.from_pretrained` loads the trunk as is and ignores `mtp.*`. The folder is
written aside and renamed, so a reader never sees half of one.

    python -m tools.train_demo --out raw --steps 30     # writes one
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen3_5MoeTextConfig

from streamer.errors import CheckpointError
from tools.demo_corpus import save_tokenizer
from tools.demo_model import DemoModel

SHARD_BYTES = 14_000_000


@dataclass(frozen=True)
class RawCheckpoint:
    """Weights by checkpoint name as stored, the configuration, and what training.json says."""

    weights: dict[str, torch.Tensor]
    config: Qwen3_5MoeTextConfig
    report: dict[str, Any]


def _shards(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def outer_config(text: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The text model's configuration in its place, as published Qwen3.5-MoE checkpoints have it."""
    dropped = ("_name_or_path", "architectures", "dtype", "id2label", "label2id")
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe",
        "dtype": dtype,
        "eos_token_id": text["eos_token_id"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {k: v for k, v in text.items() if k not in dropped},
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(aside: Path, folder: Path) -> None:
    """Sync the files of `aside` and rename it to `folder`, replacing one that is there."""
    for path in aside.iterdir():
        _sync(path)
    former = folder.with_name(folder.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    aside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def save(model: DemoModel, tokenizer: Tokenizer, report: dict[str, Any], folder: Path) -> None:
    """Write the folder anew; an earlier one of that name is replaced."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.named_weights().items()
    }
    shards = _shards(weights)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, aside / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": places,
    }
    (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    text = json.loads(model.trunk.config.to_json_string(use_diff=False))
    text |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    config = outer_config(text, "bfloat16")
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, aside, model.trunk.config.max_position_embeddings)
    (aside / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    put_in_place(aside, folder)


def load(folder: Path) -> RawCheckpoint:
    """Read a folder that `save` or `dequantize` wrote; `report` is empty for the latter.

    Raises CheckpointError if a part is missing or damaged.
    """
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        weights: dict[str, torch.Tensor] = {}
        for name in sorted(set(index["weight_map"].values())):
            weights.update(load_file(folder / name))
        config = Qwen3_5MoeTextConfig.from_pretrained(folder)
        training = folder / "training.json"
        report = json.loads(training.read_text()) if training.exists() else {}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no demo checkpoint: {error}") from error
    if missing := set(index["weight_map"]) - set(weights):
        raise CheckpointError(f"{folder} lacks the tensor {min(missing)}")
    return RawCheckpoint(weights, config, report)
