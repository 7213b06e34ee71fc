"""Original Hugging Face names for a model's weights: the inverse of `sanitize`.

Every rule undoes a step exactly, so that a checkpoint in this layout gives the
same bits as one with mlx-lm's names. `HF` says which rules a family needs.
Without an entry: gpt_oss, published in a packed form only (`packed.py`), and
muse_spark, whose computed residual gates have no exact inverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx

from .parts import Config

Weights = dict[str, mx.array]
Rule = Callable[[Weights, Config], Weights]

_W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _experts(
    switch: str = "switch_mlp", to: str = "experts", names: dict[str, str] | None = None
) -> Rule:
    """One tensor per expert: `switch.gate_proj.weight` to `experts.0.gate_proj.weight`."""
    stacked = re.compile(
        rf"(.*)\.{switch}\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(weight|scales|biases|bias)"
    )

    def rule(weights: Weights, _: Config) -> Weights:
        out: Weights = {}
        for name, array in weights.items():
            if match := stacked.fullmatch(name):
                prefix, projection, kind = match.groups()
                projection = (names or {}).get(projection, projection)
                for e in range(array.shape[0]):
                    out[f"{prefix}.{to}.{e}.{projection}.{kind}"] = array[e]
            else:
                out[name] = array
        return out

    return rule


def _fused(switch: str, gate_up: str, down: str, *, transposed: bool = False) -> Rule:
    """Gate and up in one tensor, gate first: `[E, 2F, D]`, or `[E, D, 2F]` transposed."""

    def rule(weights: Weights, _: Config) -> Weights:
        out: Weights = {}
        for name, array in weights.items():
            prefix, found, projection = name.partition(f".{switch}.")
            if not found or projection not in (
                "gate_proj.weight",
                "up_proj.weight",
                "down_proj.weight",
            ):
                out[name] = array
                continue
            if projection == "up_proj.weight":
                continue
            if projection == "gate_proj.weight":
                array = mx.concatenate([array, weights[f"{prefix}.{switch}.up_proj.weight"]], 1)
            key = f"{prefix}.{gate_up if projection.startswith('gate') else down}"
            out[key] = array.swapaxes(1, 2) if transposed else array
        return out

    return rule


def _renamed(*pairs: tuple[str, str]) -> Rule:
    """Regular expressions and what they become, each tried on every name."""

    def rule(weights: Weights, _: Config) -> Weights:
        out: Weights = {}
        for name, array in weights.items():
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            out[name] = array
        return out

    return rule


def _changed(pattern: str, change: Callable[[mx.array], mx.array]) -> Rule:
    def rule(weights: Weights, _: Config) -> Weights:
        return {n: change(a) if re.search(pattern, n) else a for n, a in weights.items()}

    return rule


def _kv_b(weights: Weights, config: Config) -> Weights:
    """Latent attention's per-head matrices back in one `kv_b_proj`."""
    out: Weights = {}
    for name, array in weights.items():
        if name.endswith(".embed_q.weight"):
            prefix = name.removesuffix(".embed_q.weight")
            values = weights[f"{prefix}.unembed_out.weight"]
            joined = mx.concatenate([array.swapaxes(1, 2), values], axis=1)
            out[f"{prefix}.kv_b_proj.weight"] = joined.flatten(0, 1)
        elif not name.endswith(".unembed_out.weight"):
            out[name] = array
    return out


def _swapped(array: mx.array) -> mx.array:
    return array.swapaxes(1, 2)


_CONV1D = _changed(r"conv1d\.weight$", _swapped)
_QWEN_NORMS = _changed(
    r"(_layernorm|model\.norm|q_norm|k_norm)\.weight$",
    lambda a: a - 1,  # exact, as these weights lie within [0.5, 2]
)
_EXPERTS = (_experts(),)
_W = (_experts(names=_W123),)
_OWN_NAME = (_experts(switch="experts"),)
_LATENT = (_experts(), _kv_b)
_BAILING_GATE = _renamed((r"\.mlp\.gate\.gate_proj\.", ".mlp.gate."))
_GRANITE = _fused(
    "block_sparse_moe.switch_mlp",
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
)
_KIMI_MOE = _renamed(
    (r"\.mlp\.(experts|shared_experts\.|gate\.|routed)", r".block_sparse_moe.\1"),
    (r"\.mlp\.e_score_correction_bias", ".block_sparse_moe.gate.e_score_correction_bias"),
)

HF: dict[str, tuple[Rule, ...]] = {
    "Klear": _OWN_NAME,
    "afmoe": _OWN_NAME,
    "bailing_hybrid": (*_LATENT, _BAILING_GATE),
    "bailing_moe": (*_EXPERTS, _BAILING_GATE),
    "bailing_moe_linear": (*_EXPERTS, _BAILING_GATE),
    "bailing_moe_v3": (*_LATENT, _changed(r"_conv1d\.weight$", _swapped)),
    "deepseek": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v41": (
        _changed(r"o_a_proj\.weight$", lambda a: a.flatten(0, 1)),
        _experts(switch=r"experts\.switch_mlp", names=_W123),
        _renamed(
            (r"shared_experts\.gate_proj", "shared_experts.w1"),
            (r"shared_experts\.down_proj", "shared_experts.w2"),
            (r"shared_experts\.up_proj", "shared_experts.w3"),
            (r"gate\.e_score_correction_bias", "gate.bias"),
            (r"indexer\.k_proj", "indexer.wk"),
            (r"compressor\.kv_norm", "compressor.norm"),
            (r"q_a_norm", "q_norm"),
            (r"o_b_proj", "wo_b"),
            (r"o_a_proj", "wo_a"),
            (r"\.gate_proj", ".wgate"),
            (r"\.kv_proj", ".wkv"),
            (r"q_b_proj", "wq_b"),
            (r"q_a_proj", "wq_a"),
            (r"\.sinks", ".attn_sink"),
            (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
            (r"input_layernorm", "attn_norm"),
            (r"post_attention_layernorm", "ffn_norm"),
            (r"\.mlp\.", ".ffn."),
            (r"\.self_attn\.", ".attn."),
            (r"model\.embed_tokens", "embed"),
            (r"^lm_head", "head"),
            (r"^model\.", ""),
        ),
    ),
    "dots1": _OWN_NAME,
    "ernie4_5_moe": _EXPERTS,
    "exaone_moe": (*_EXPERTS, _renamed((r"\.gate\.(e_score_correction_bias)", r".\1"))),
    "gemma4": (
        _fused("experts.switch_glu", "experts.gate_up_proj", "experts.down_proj"),
        _renamed((r"^language_model\.model\.", "model.language_model.")),
    ),
    "gemma4_text": (_fused("experts.switch_glu", "experts.gate_up_proj", "experts.down_proj"),),
    "glm4_moe": _EXPERTS,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "granitemoe": (_GRANITE,),
    "granitemoehybrid": (_GRANITE, _CONV1D),
    "hunyuan": _EXPERTS,
    "jamba": (*_EXPERTS, _CONV1D),
    "kimi_k25": _LATENT,
    "kimi_k3": (*_W, _kv_b, _KIMI_MOE),
    "kimi_linear": (
        *_W,
        _kv_b,
        _KIMI_MOE,
        _changed(r"_conv\.conv\.weight$", _swapped),
        _renamed((r"([qkv])_conv\.conv\.weight", r"\1_conv1d.weight")),
    ),
    "kimi_vl": _EXPERTS,
    "laguna": (
        *_EXPERTS,
        _renamed(
            (r"\.gate\.proj\.", ".gate."),
            (r"\.gate\.(e_score_correction_bias)", r".experts.\1"),
        ),
    ),
    "lfm2_moe": (
        *_W,
        _renamed(
            (r"feed_forward\.gate_proj", "feed_forward.w1"),
            (r"feed_forward\.down_proj", "feed_forward.w2"),
            (r"feed_forward\.up_proj", "feed_forward.w3"),
        ),
        _changed(r"conv\.weight$", _swapped),
    ),
    "llama4": (_fused("experts", "experts.gate_up_proj", "experts.down_proj", transposed=True),),
    "longcat_flash": _LATENT,
    "longcat_flash_ngram": (
        *_LATENT,
        _renamed((r"ngram_embeddings\.word_embeddings", "embed_tokens")),
    ),
    "mellum": _EXPERTS,
    "mimo_v2_flash": _EXPERTS,
    "minimax": _W,
    "minimax_m3_vl": _W,
    "mistral3": (
        *_LATENT,
        _renamed((r"^language_model\.model\.", "model.language_model.")),
    ),
    "mistral4": (
        _fused("mlp.switch_mlp", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        _kv_b,
    ),
    "mixtral": _W,
    "nemotron_h": (_experts(names={"fc1": "up_proj", "fc2": "down_proj"}), _CONV1D),
    "olmoe": _EXPERTS,
    "phimoe": _W,
    "phixtral": (_experts(to="mlp"),),
    "qwen2_moe": _EXPERTS,
    "qwen3_5_moe": (
        _fused("mlp.switch_mlp", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        _QWEN_NORMS,
        _CONV1D,
        _renamed(
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head", "lm_head"),
        ),
    ),
    "qwen3_moe": _EXPERTS,
    "qwen3_next": (*_EXPERTS, _QWEN_NORMS, _CONV1D),
    "qwen3_vl_moe": (
        _fused(
            "mlp.switch_mlp", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True
        ),
        _renamed(
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head", "lm_head"),
        ),
    ),
    "solar_open": _EXPERTS,
    "step3p5": (
        _changed(r"norm\.weight$", lambda a: a - 1),
        _renamed(
            (r"\.mlp\.switch_mlp\.", ".moe."),
            (r"\.mlp\.gate\.gate\.", ".moe.gate."),
            (r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
            (r"\.mlp\.share_expert\.", ".share_expert."),
        ),
    ),
}


def hf_weights(family: str, weights: Weights, config: Config) -> Weights:
    """`weights` under the family's original names, where `HF` has any."""
    for rule in HF.get(family, ()):
        weights = rule(weights, config)
    return weights
