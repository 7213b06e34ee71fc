"""Tiny Gemma 4 assistants, as published: a folder of their own, or their weights beside a target.

make_assistant(path)                  # config.json and model.safetensors
make_assistant(target, beside=True)   # mtp.safetensors, of the same names
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from .configs import CONFIGS
from .heads import Shapes, _mlp, _norms, _random, _under
from .parts import Config

ASSISTED = ("gemma4", "gemma4_text")  # the families that may have one
TARGET = CONFIGS["gemma4_text"]
WIDTH, HEADS, CLUSTERS, INNER = 32, 4, 64, 64
TYPES = ["sliding_attention"] * 2 + ["full_attention"]
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def assistant_config(*, ordered: bool = False) -> Config:
    """As the published config.json spells it."""
    shared = ("head_dim", "global_head_dim", "rms_norm_eps", "vocab_size", "sliding_window")
    text = {key: TARGET[key] for key in shared} | {
        "model_type": "gemma4_text",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": len(TYPES),
        "num_kv_shared_layers": len(TYPES),
        "layer_types": TYPES,
        "num_attention_heads": HEADS,
        "num_key_value_heads": TARGET["num_key_value_heads"],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": TARGET["num_global_key_value_heads"],
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }
    return {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": TARGET["hidden_size"],
        "use_ordered_embeddings": ordered,
        "num_centroids": CLUSTERS,
        "centroid_intermediate_top_k": 32,
        "tie_word_embeddings": True,
        "text_config": text,
    }


def assistant_shapes(*, ordered: bool = False) -> Shapes:
    vocabulary, backbone = TARGET["vocab_size"], TARGET["hidden_size"]
    shapes: Shapes = {
        "pre_projection.weight": (WIDTH, 2 * backbone),
        "post_projection.weight": (backbone, WIDTH),
        "model.embed_tokens.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for i, kind in enumerate(TYPES):
        wide = TARGET["global_head_dim" if kind == "full_attention" else "head_dim"]
        layer: Shapes = {
            "self_attn.q_proj.weight": (HEADS * wide, WIDTH),
            "self_attn.o_proj.weight": (WIDTH, HEADS * wide),
            "self_attn.q_norm.weight": (wide,),
            "layer_scalar": (1,),
        }
        layer |= _under("mlp", _mlp(WIDTH, INNER)) | _norms(WIDTH, *_NORMS)
        shapes |= _under(f"model.layers.{i}", layer)
    if ordered:
        shapes["masked_embedding.centroids.weight"] = (CLUSTERS, WIDTH)
    return shapes


def assistant_weights(*, ordered: bool = False, seed: int = 5) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    shapes = sorted(assistant_shapes(ordered=ordered).items())
    weights = {n: _random(n, s, rng, 1.0) for n, s in shapes}
    for name in [n for n in weights if n.endswith("layer_scalar")]:
        weights[name] = weights[name] + 0.5
    if ordered:
        order = rng.permutation(TARGET["vocab_size"]).astype(np.int64)
        weights["masked_embedding.token_ordering"] = mx.array(order)
    return weights


def make_assistant(path: Path, *, beside: bool = False, ordered: bool = False) -> Path:
    """Write a random float32 assistant for the tiny "gemma4" and "gemma4_text"."""
    path.mkdir(parents=True, exist_ok=True)
    weights = assistant_weights(ordered=ordered)
    file = "mtp.safetensors" if beside else "model.safetensors"
    mx.save_safetensors(str(path / file), weights, {"format": "pt"})
    if not beside:
        (path / "config.json").write_text(json.dumps(assistant_config(ordered=ordered)))
    return path
