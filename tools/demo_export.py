"""Turn a trained demo checkpoint into the package that ships: 4-bit trunk, 8-bit MTP head.

The trunk goes through mlx-lm's own conversion of Qwen3.5-MoE. mlx-lm has no MTP head: the head is
converted here the same way (norms with 1 added, experts stacked) and stored beside the trunk as
`mtp.*`. The package is measured, described in its README.md and only then put in place.

    python -m tools.train_demo export --raw raw --out demo
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_5_moe import Model, ModelArgs
from mlx_lm.utils import load_model, quantize_model
from safetensors.numpy import save_file

from streamer.errors import CheckpointError
from tools import demo_checks, demo_quantize, raw_checkpoint
from tools.demo_card import MEASURES, Measured, card
from tools.demo_corpus import save_settings
from tools.dequantize import dequantize

BITS, HEAD_BITS, GROUP = 4, 8, 64
LIMIT = 16_000_000  # bytes of the whole package
FACTS = ("source", "characters", "hardware", "options", "earlier", "best")


class Widened(Model):
    """Qwen3.5-MoE whose raw weights become float32 before the norms get their 1.

    Zero-centred bfloat16 norms plus 1 in bfloat16 lose most of their bits.
    """

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({k: v.astype(mx.float32) for k, v in weights.items()})


def raw_text_config(raw: Path) -> dict[str, Any]:
    """The text model's configuration, standing alone or inside a larger one."""
    try:
        config = json.loads((raw / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{raw / 'config.json'} cannot be read: {error}") from error
    return config.get("text_config", config)


def load_trunk(raw: Path, config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model of the raw weights in float32, unquantized."""
    model, _ = load_model(
        raw, model_config=config, get_model_classes=lambda config: (Widened, ModelArgs)
    )
    return model


def quantize_trunk(
    model: nn.Module, config: dict[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """(tensors, configuration) as mlx-lm quantizes `model`, with fitted scales."""
    dense = {path: m.weight for path, m in model.named_modules() if hasattr(m, "to_quantized")}
    model, config = quantize_model(model, config, GROUP, BITS)
    for path, module in model.named_modules():
        if hasattr(module, "scales"):
            module.weight, module.scales, module.biases = demo_quantize.quantize(
                dense[path], bits=module.bits, group_size=module.group_size
            )
    return dict(tree_flatten(model.parameters())), config


def convert_head(
    weights: dict[str, mx.array],
) -> tuple[dict[str, mx.array], dict[str, dict[str, Any]]]:
    """(tensors, quantization block) of the raw `mtp.*` weights."""
    dense: dict[str, mx.array] = {}
    for name, tensor in weights.items():
        tensor = tensor.astype(mx.float32)
        if name.endswith(".experts.gate_up_proj"):
            base = name.replace("experts.gate_up_proj", "switch_mlp")
            gate, up = mx.split(tensor, 2, axis=-2)
            dense |= {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            dense[name.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = tensor
        else:
            dense[name] = tensor + 1.0 if tensor.ndim == 1 else tensor
    tensors: dict[str, mx.array] = {}
    block: dict[str, dict[str, Any]] = {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 1 or module == "mtp.fc":
            tensors[name] = tensor
            continue
        codes = demo_quantize.quantize(tensor, bits=HEAD_BITS, group_size=GROUP)
        tensors |= zip((name, f"{module}.scales", f"{module}.biases"), codes, strict=True)
        block[module] = {"group_size": GROUP, "bits": HEAD_BITS}
    return tensors, block


def write_package(raw: Path, model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Weights, config.json and tokenizer of the package, into the empty `folder`."""
    tensors, config = quantize_trunk(model, config)
    stored: dict[str, mx.array] = {}
    for file in raw.glob("model*.safetensors"):
        stored.update(cast(dict[str, mx.array], mx.load(str(file))))
    head, block = convert_head({k: v for k, v in stored.items() if k.startswith("mtp.")})
    config["quantization"] |= block
    config["quantization_config"] = config["quantization"]
    arrays = {name: np.array(tensor) for name, tensor in (tensors | head).items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(raw / "tokenizer.json", folder / "tokenizer.json")
    # not the raw folder's, which may be from before a change of the template
    save_settings(folder, config["text_config"]["max_position_embeddings"])
    for path in folder.iterdir():
        path.chmod(0o644)


def export(raw: Path, out: Path, corpus: Path | None) -> None:
    """Convert, measure, describe, put in place.

    Raises CheckpointError for a raw checkpoint that is damaged or a package that is too large, and
    UsageError when the corpus is not the one trained on.
    """
    report = raw_checkpoint.load(raw).report
    for fact in FACTS:
        if fact not in report:
            raise CheckpointError(f"{raw / 'training.json'} lacks {fact!r}, which the card states")
    text = raw_text_config(raw)
    config = raw_checkpoint.outer_config(text, "float32") | {"mtp_norms_zero_centred": False}
    ids = demo_checks.held_out_ids(corpus, raw, report)
    model = load_trunk(raw, config)
    agreement = demo_checks.compare(model, raw, ids)
    print(f"logits differ from transformers' by {agreement.difference:.1e} at most")
    print(f"greedy tokens of {demo_checks.TOKENS} that agree: {agreement.equal}", flush=True)
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_package(raw, model, config, aside)
        measured = Measured(
            demo_checks.held_out(raw, ids, report["context"]),
            _measure_package(aside, ids, report["context"]),
            agreement,
            continuation(aside),
        )
        for key, title in MEASURES.items():
            print(f"{title}: raw {measured.raw[key]:.4f}, package {measured.package[key]:.4f}")
        print(measured.continuation)
        (aside / "README.md").write_text(card(text, report, measured, demo_checks.ROWS))
        size = sum(path.stat().st_size for path in aside.iterdir())
        if size > LIMIT:
            raise CheckpointError(f"the package takes {size} bytes, more than {LIMIT}")
        raw_checkpoint.put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"wrote {out}: {size} bytes", flush=True)


def _measure_package(folder: Path, ids: np.ndarray, context: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        dequantize(folder, dense)
        return demo_checks.held_out(dense, ids, context)


def continuation(package: Path, prompt: str = "def ") -> str:
    """`prompt` and its greedy continuation, by mlx-lm from the package as it is."""
    model, tokenizer = mlx_lm.load(str(package))[:2]
    ids = tokenizer.encode(prompt)
    return tokenizer.decode([*ids, *demo_checks.continued(model, ids, demo_checks.CONTINUED)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="train_demo export", description="Make the quantized package."
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder that train_demo wrote")
    parser.add_argument("--out", type=Path, required=True, help="package folder, replaced")
    parser.add_argument("--corpus", type=Path, help="the one trained on; default: standard library")
    options = parser.parse_args(arguments)
    export(options.raw, options.out, options.corpus)
    return 0
