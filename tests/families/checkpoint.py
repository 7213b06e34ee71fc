"""Write a tiny random checkpoint of a family, as mlx-lm or as Hugging Face names it."""

from __future__ import annotations

import copy
import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model, save_config

from .configs import CONFIGS, DENSE
from .hf import HF, Weights, hf_weights
from .packed import PACKED
from .parts import Config
from .tokenizer import write_tokenizer


def make_tiny(
    family: str,
    path: Path,
    *,
    quantization: dict[str, Any] | None = None,
    dtype: str = "float32",
    layout: str = "mlx",
    shards: int = 1,
    changes: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of `family` with its tokenizer into the folder `path`.

    quantization: `bits`, `group_size`, `mode`, `global_scale` as mlx-lm's convert
    takes them; the family's own rules for routers hold. An entry `layers` maps
    patterns of module paths to other parameters, or to False:
    {"*.down_proj": {"bits": 6, "group_size": 32}}.
    dtype: of floating tensors, scales among them; float32 gives exact logits.
    layout: 'mlx'; 'hf' for the original names, for families in `HF`; 'packed' for
    the quantized form a family in `PACKED` was published in.
    shards: safetensors files; neighbouring tensors lie in different ones.
    changes: to the text part of the configuration, e.g. {"num_experts": 64}.
    Equal arguments give equal bytes; layouts give models with equal logits.
    """
    model, config = _random_model(family, changes or {}, seed)
    _cast(model, dtype)
    if layout == "packed":
        quantization = PACKED[family].quantization
    elif layout != "mlx" and (layout != "hf" or family not in HF):
        raise ValueError(f"{family} has no layout {layout!r}")
    if quantization is not None:
        model, config = _quantized(model, config, quantization)
    weights = _flat(model)
    if layout != "mlx":
        weights = hf_weights(family, weights, config)
    if layout == "packed":
        weights = PACKED[family].rule(weights, config)
        config.pop("quantization", None)
        config["quantization_config"] = PACKED[family].config
    path.mkdir(parents=True, exist_ok=True)
    config["eos_token_id"] = write_tokenizer(path)
    save_config(config, path / "config.json")
    _save(path, weights, shards)
    return path


def _random_model(family: str, changes: Config, seed: int) -> tuple[nn.Module, Config]:
    config = copy.deepcopy((CONFIGS | DENSE)[family])
    config.get("text_config", config).update(changes)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)  # a few parameters are drawn by the model itself
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    rng = np.random.default_rng(seed)
    parameters = _flat(model)
    model.update(tree_unflatten([(n, _random(n, parameters[n], rng)) for n in sorted(parameters)]))
    mx.eval(model.parameters())
    return model, config


def _flat(model: nn.Module) -> Weights:
    return dict(tree_flatten(model.parameters()))


def _random(name: str, initial: mx.array, rng: np.random.Generator) -> mx.array:
    """Matrices of unit gain; vectors near where the model starts them, none at rest."""
    noise = np.clip(rng.standard_normal(initial.shape, dtype=np.float32), -4, 4)
    if initial.ndim < 2 or name.endswith("A_log"):
        return initial + mx.array(0.1 * noise).astype(initial.dtype)
    fan_in = initial.shape[-1] if "conv" not in name else int(np.prod(initial.shape[1:]))
    return mx.array(noise / np.float32(fan_in) ** np.float32(0.5)).astype(initial.dtype)


def _cast(model: nn.Module, dtype: str) -> None:
    kept: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    flat = _flat(model).items()
    cast = [(n, p.astype(getattr(mx, dtype)) if kept(n) else p) for n, p in flat]
    model.update(tree_unflatten(cast))


def _quantized(
    model: nn.Module, config: Config, quantization: dict[str, Any]
) -> tuple[nn.Module, Config]:
    layers: dict[str, Any] = quantization.get("layers", {})
    family_rule: Callable[[str, nn.Module], Any] | None = getattr(model, "quant_predicate", None)

    def rule(path: str, module: nn.Module) -> Any:
        for pattern, parameters in layers.items():
            if fnmatch.fnmatch(path, pattern):
                return parameters
        return family_rule(path, module) if family_rule else True

    return quantize_model(
        model,
        config,
        quantization.get("group_size"),
        quantization.get("bits"),
        mode=quantization.get("mode", "affine"),
        global_scale=quantization.get("global_scale", False),
        quant_predicate=rule,
    )


def _save(path: Path, weights: Weights, shards: int) -> None:
    weights = {name: mx.contiguous(weights[name]) for name in sorted(weights)}
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
        return
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[i::shards]}
        mx.save_safetensors(str(path / file), part, {"format": "mlx"})
        index |= dict.fromkeys(part, file)
    total = sum(a.nbytes for a in weights.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (path / "model.safetensors.index.json").write_text(text)
