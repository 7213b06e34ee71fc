"""Compressed caches inside mlx-lm's models: who gets one, and what the model then says."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models import deepseek_v3, gemma2, gpt_oss, llama, qwen3_next

from cache.compressed import CompressedKVCache
from cache.make import make_cache

TOKENS = 190


def small(name: str) -> Any:
    mx.random.seed(4)
    common: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rms_norm_eps": 1e-5,
        "head_dim": 32,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    }
    if name == "llama":
        args: Any = llama.ModelArgs(model_type=name, num_hidden_layers=2, **common)
        return llama.Model(args)
    if name == "gemma2":
        return gemma2.Model(
            gemma2.ModelArgs.from_dict({"model_type": name, "num_hidden_layers": 2, **common})
        )
    if name == "gpt_oss":
        return gpt_oss.Model(
            gpt_oss.ModelArgs(
                num_hidden_layers=2,
                num_local_experts=2,
                num_experts_per_tok=1,
                vocab_size=64,
                hidden_size=64,
                intermediate_size=64,
                head_dim=32,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=16,
            )
        )
    if name == "qwen3_next":
        return qwen3_next.Model(
            qwen3_next.ModelArgs(
                model_type=name,
                num_hidden_layers=4,
                linear_num_value_heads=2,
                linear_num_key_heads=2,
                linear_key_head_dim=32,
                linear_value_head_dim=32,
                linear_conv_kernel_dim=3,
                num_experts=0,
                num_experts_per_tok=1,
                decoder_sparse_step=1,
                shared_expert_intermediate_size=32,
                mlp_only_layers=[],
                moe_intermediate_size=32,
                partial_rotary_factor=0.5,
                **common,
            )
        )
    common.pop("head_dim")
    return deepseek_v3.Model(
        deepseek_v3.ModelArgs(
            **{**common, "num_key_value_heads": 4},
            model_type=name,
            num_hidden_layers=2,
            moe_intermediate_size=32,
            n_routed_experts=None,
            n_shared_experts=None,
            kv_lora_rank=64,
            q_lora_rank=None,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=2,
        )
    )


KINDS = {
    "llama": ["full", "full"],
    "gpt_oss": [None, "full"],
    "qwen3_next": [None, None, None, "full"],
    "deepseek_v3": ["latent", "latent"],
    "gemma2": [None, None],
}


def said(model: Any, cache: list[Any], cuts: list[int]) -> mx.array:
    tokens = mx.arange(sum(cuts))[None] * 7 % 64
    parts, at = [], 0
    for n in cuts:
        parts.append(model(tokens[:, at : at + n], cache=cache))
        mx.eval(parts[-1], [c.state for c in cache])
        at += n
    return mx.concatenate(parts, 1)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_says_the_same(name: str) -> None:
    model = small(name)
    model.update(tree_map(lambda w: w.astype(mx.float32), model.parameters()))
    cache = make_cache(model, 8, 8)
    compressed = [isinstance(c, CompressedKVCache) for c in cache]
    assert compressed == [kind is not None for kind in KINDS[name]]
    cuts = [TOKENS, 1, 4, 1, 1]
    true = said(model, mlx_cache.make_prompt_cache(model), cuts)
    out = said(model, cache, cuts)
    assert mx.abs(out - true).max() < 0.02 * mx.abs(true).max()
    if any(compressed):  # and the codes were read
        assert not mx.array_equal(out, true)
        held = cache[compressed.index(True)]
        assert held.keys.coded == 128 and held.latent == (name == "deepseek_v3")


def test_layers_keep_the_bits_named_for_them() -> None:
    cache = make_cache(small("llama"), layers=[(2, 8), None])
    assert (cache[0].keys.bits, cache[0].values.bits) == (2, 8)
    assert type(cache[1]) is mlx_cache.KVCache
