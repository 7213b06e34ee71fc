"""MTP heads of tiny checkpoints, under the names that the original checkpoints use.

    make_head("deepseek_v3", path)     # a checkpoint of make_tiny with a head in it

Names and shapes are written out by hand from published checkpoints, not taken
from the code that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .checkpoint import make_tiny
from .configs import CONFIGS, DENSE
from .parts import Config

Shapes = dict[str, tuple[int, ...]]
SIDE = "mtp.safetensors"


def make_head(
    family: str,
    path: Path,
    *,
    side: bool = False,
    centred: bool | None = None,
    seed: int = 7,
    **options: Any,
) -> Path:
    """Write a checkpoint of `family` with a random float32 head into the folder `path`.

    side: in mtp.safetensors beside the checkpoint instead of a shard. centred: norms
    less 1; None: as the family publishes them. options: of `make_tiny`.
    """
    make_tiny(family, path, **options)
    weights = head_weights(family, centred=centred, seed=seed)
    file = SIDE if side else "model-mtp.safetensors"
    mx.save_safetensors(str(path / file), weights, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists() and not side:
        text = json.loads(index.read_text())
        text["weight_map"] |= dict.fromkeys(weights, file)
        index.write_text(json.dumps(text))
    return path


def head_weights(family: str, *, centred: bool | None = None, seed: int = 7) -> dict[str, mx.array]:
    """The head's tensors by original name, the same for equal arguments."""
    rng = np.random.default_rng(seed)
    shift = 0.0 if (family in CENTRED if centred is None else centred) else 1.0
    return {n: _random(n, s, rng, shift) for n, s in sorted(head_shapes(family).items())}


def head_shapes(family: str) -> Shapes:
    config = (CONFIGS | DENSE)[family]
    return HEADS[family](config.get("text_config", config))


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator, shift: float) -> mx.array:
    noise = np.clip(rng.standard_normal(shape, dtype=np.float32), -4, 4)
    if len(shape) == 1:
        norm = "norm" in name and name.endswith(".weight")
        own = 1.0 if "indexer" in name else shift
        return mx.array((own if norm else 0.0) + 0.1 * noise)
    return mx.array(noise / np.float32(shape[-1]) ** np.float32(0.5))


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _attention(
    c: Config, *, gated: bool = False, norms: bool = False, bias: bool = False
) -> Shapes:
    d, h, kv, n = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
        c["head_dim"],
    )
    shapes: Shapes = {
        "q_proj.weight": (h * n * (2 if gated else 1), d),
        "k_proj.weight": (kv * n, d),
        "v_proj.weight": (kv * n, d),
        "o_proj.weight": (d, h * n),
    }
    if norms:
        shapes |= {"q_norm.weight": (n,), "k_norm.weight": (n,)}
    if bias:
        shapes |= {"q_proj.bias": (h * n,), "k_proj.bias": (kv * n,), "v_proj.bias": (kv * n,)}
    return _under("self_attn", shapes)


def _latent(c: Config) -> Shapes:
    d, h, rope, nope = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["qk_rope_head_dim"],
        c["qk_nope_head_dim"],
    )
    q, kv, v = c["q_lora_rank"], c["kv_lora_rank"], c["v_head_dim"]
    shapes: Shapes = {
        "q_a_proj.weight": (q, d),
        "q_a_layernorm.weight": (q,),
        "q_b_proj.weight": (h * (nope + rope), q),
        "kv_a_proj_with_mqa.weight": (kv + rope, d),
        "kv_a_layernorm.weight": (kv,),
        "kv_b_proj.weight": (h * (nope + v), kv),
        "o_proj.weight": (d, h * v),
    }
    return _under("self_attn", shapes)


def _indexer(c: Config) -> Shapes:
    d, n, h = c["hidden_size"], c["index_head_dim"], c["index_n_heads"]
    shapes: Shapes = {
        "wq_b.weight": (h * n, c["q_lora_rank"]),
        "wk.weight": (n, d),
        "k_norm.weight": (n,),
        "k_norm.bias": (n,),
        "weights_proj.weight": (h, d),
    }
    return _under("self_attn.indexer", shapes)


def _mlp(d: int, f: int) -> Shapes:
    return {"gate_proj.weight": (f, d), "up_proj.weight": (f, d), "down_proj.weight": (d, f)}


def _norms(d: int, *names: str) -> Shapes:
    return {f"{name}.weight": (d,) for name in names}


_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def _qwen_moe(c: Config) -> Shapes:
    d, f, e = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    shapes: Shapes = {"gate.weight": (e, d), "shared_expert_gate.weight": (1, d)}
    shapes |= _under("shared_expert", _mlp(d, c["shared_expert_intermediate_size"]))
    for i in range(e):
        shapes |= _under(f"experts.{i}", _mlp(d, f))
    return _under("mlp", shapes)


def _qwen(c: Config) -> Shapes:
    d = c["hidden_size"]
    mlp = _qwen_moe(c) if c.get("num_experts") else _under("mlp", _mlp(d, c["intermediate_size"]))
    layer = _attention(c, gated=True, norms=True) | mlp | _norms(d, *_LAYER_NORMS)
    top = _norms(d, "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    return _under("mtp", {"fc.weight": (d, 2 * d)} | top | _under("layers.0", layer))


def _qwen_fused(c: Config) -> Shapes:
    """The experts of all in two tensors, as transformers keeps Qwen3.5's."""
    d, f, e = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    shapes = {n: s for n, s in _qwen(c).items() if ".experts." not in n}
    base = "mtp.layers.0.mlp.experts"
    return shapes | {f"{base}.gate_up_proj": (e, 2 * f, d), f"{base}.down_proj": (e, d, f)}


def _grouped_moe(c: Config) -> Shapes:
    d, f, e = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    shapes: Shapes = {"gate.weight": (e, d), "gate.e_score_correction_bias": (e,)}
    shapes |= _under("shared_experts", _mlp(d, f * c["n_shared_experts"]))
    for i in range(e):
        shapes |= _under(f"experts.{i}", _mlp(d, f))
    return _under("mlp", shapes)


def _appended(attention: Callable[[Config], Shapes]) -> Callable[[Config], Shapes]:
    """DeepSeek's and GLM's: one more layer, with copies of the embedding and the lm_head."""

    def shapes(c: Config) -> Shapes:
        d, v = c["hidden_size"], c["vocab_size"]
        layer = attention(c) | _grouped_moe(c) | _norms(d, *_LAYER_NORMS)
        layer |= _norms(d, "enorm", "hnorm", "shared_head.norm") | {"eh_proj.weight": (d, 2 * d)}
        layer |= {"embed_tokens.weight": (v, d), "shared_head.head.weight": (v, d)}
        return _under(f"model.layers.{c['num_hidden_layers']}", layer)

    return shapes


def _mimo(c: Config) -> Shapes:
    d = c["hidden_size"]
    layer = _attention(c, bias=True) | _under("mlp", _mlp(d, c["intermediate_size"]))
    layer |= _norms(d, *_LAYER_NORMS, "token_layernorm", "hidden_layernorm", "final_layernorm")
    return _under("model.mtp_layers.0", layer | {"input_proj.weight": (d, 2 * d)})


def _mimo_v2(c: Config) -> Shapes:
    d, h, kv = c["hidden_size"], c["swa_num_attention_heads"], c["swa_num_key_value_heads"]
    n, v = c["swa_head_dim"], c["swa_v_head_dim"]
    attention: Shapes = {
        "q_proj.weight": (h * n, d),
        "k_proj.weight": (kv * n, d),
        "v_proj.weight": (kv * v, d),
        "o_proj.weight": (d, h * v),
        "attention_sink_bias": (h,),
    }
    layer = _under("self_attn", attention) | _under("mlp", _mlp(d, c["intermediate_size"]))
    layer |= _norms(d, "input_layernorm", "pre_mlp_layernorm", "final_layernorm", "enorm", "hnorm")
    layer |= {"eh_proj.weight": (d, 2 * d)}
    return {n: s for i in range(3) for n, s in _under(f"model.mtp.layers.{i}", layer).items()}


def _ernie(c: Config) -> Shapes:
    d = c["hidden_size"]
    block = _attention(c) | _under("mlp", _mlp(d, c["intermediate_size"]))
    block |= _norms(d, *_LAYER_NORMS)
    top = {
        "mtp_emb_norm.0.weight": (d,),
        "mtp_hidden_norm.0.weight": (d,),
        "mtp_linear_proj.0.weight": (d, 2 * d),
    }
    return _under("model", top | _under("mtp_block.0", block))


def _nemotron(c: Config) -> Shapes:
    d, f, e, latent = (
        c["hidden_size"],
        c["moe_intermediate_size"],
        c["n_routed_experts"],
        c["moe_latent_size"],
    )
    shared = c["moe_shared_expert_intermediate_size"]
    attention = {n.removeprefix("self_attn."): s for n, s in _attention(c).items()}
    experts: Shapes = {
        "gate.weight": (e, d),
        "gate.e_score_correction_bias": (e,),
        "shared_experts.up_proj.weight": (shared, d),
        "shared_experts.down_proj.weight": (d, shared),
        "fc1_latent_proj.weight": (latent, d),
        "fc2_latent_proj.weight": (d, latent),
    }
    for i in range(e):
        experts |= {
            f"experts.{i}.up_proj.weight": (f, latent),
            f"experts.{i}.down_proj.weight": (latent, f),
        }
    first = _norms(d, "enorm", "hnorm", "norm") | {"eh_proj.weight": (d, 2 * d)}
    first |= _under("mixer", attention)
    second = _norms(d, "norm", "final_layernorm") | _under("mixer", experts)
    return _under("mtp.layers.0", first) | _under("mtp.layers.1", second)


def _step(c: Config) -> Shapes:
    d, n, v = c["hidden_size"], c["head_dim"], c["vocab_size"]
    other = c["attention_other_setting"]
    h, kv = other["num_attention_heads"], other["num_attention_groups"]
    attention = _attention(c | {"num_attention_heads": h, "num_key_value_heads": kv}, norms=True)
    layer = attention | {"self_attn.g_proj.weight": (h, d)}
    assert layer["self_attn.q_norm.weight"] == (n,)
    layer |= _under("mlp", _mlp(d, c["intermediate_size"])) | _norms(d, *_LAYER_NORMS)
    layer |= _norms(d, "enorm", "hnorm", "transformer.shared_head.norm")
    layer |= {"eh_proj.weight": (d, 2 * d), "transformer.shared_head.output.weight": (v, d)}
    first = c["num_hidden_layers"]
    return {
        n: s for i in range(first, first + 3) for n, s in _under(f"model.layers.{i}", layer).items()
    }


def _longcat(c: Config) -> Shapes:
    d = c["hidden_size"]
    layer = _latent(c) | _under("transformer_layer.mlp", _mlp(d, c["ffn_hidden_size"]))
    layer |= _norms(d, *_LAYER_NORMS, "enorm.m", "hnorm.m") | {"eh_proj.weight": (d, 2 * d)}
    top = {"embed_tokens.weight": (c["vocab_size"], d), "norm.weight": (d,)}
    return _under("model.mtp", top | _under("layers.0", layer))


CENTRED = {"qwen3_5", "qwen3_5_moe", "qwen3_next", "step3p5"}
HEADS: dict[str, Callable[[Config], Shapes]] = {
    "deepseek_v3": _appended(_latent),
    "deepseek_v32": _appended(lambda c: _latent(c) | _indexer(c)),
    "ernie4_5_moe": _ernie,
    "glm4_moe": _appended(lambda c: _attention(c, norms=c["use_qk_norm"])),
    "glm4_moe_lite": _appended(_latent),
    "glm_moe_dsa": _appended(lambda c: _latent(c) | _indexer(c)),
    "longcat_flash": _longcat,
    "mimo": _mimo,
    "mimo_v2_flash": _mimo_v2,
    "nemotron_h": _nemotron,
    "qwen3_5": _qwen,
    "qwen3_5_moe": _qwen_fused,
    "qwen3_next": _qwen,
    "step3p5": _step,
}
