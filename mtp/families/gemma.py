"""Gemma 4's assistant, a small model published beside each target."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
from mlx_lm.models.gemma4_text import DecoderLayer, ModelArgs

from ..assistant import FULL, SLIDING, Assistant, AssistantUnit
from ..head import Head, Trunk
from .family import Config, Family, Weights


class Gemma4(Family):
    """x = pre_projection([embed(t+1), h_t]), layers of queries alone over the target's KV, norm.

    Hidden states: after the final norm; post_projection(x) is fed back. Order: embedding
    first, scaled as the target scales it. Norms: none of the inputs; before the lm_head,
    as it multiplies. Embedding: the target's. lm_head: its own, tied to its own
    embedding, with clusters of tokens for E2B and E4B; not capped. Keys and values: of the
    target's last layer of either type that has its own, after RoPE. Position: of the
    token t+1, the same for every draft (transformers, openvino.genai).
    Heads: one, applied again.

    Its checkpoint lies apart (google/gemma-4-26B-A4B-it-assistant): its model.safetensors,
    put beside the target as mtp.safetensors, is found as it is, and tools/extract_mtp.py
    writes one at 8 bits. Its sizes are read off its tensors; RoPE and the window are the
    target's. Rows beyond the window are left out: transformers lets one more in after a
    long prompt. Source: transformers, modeling_gemma4_assistant.py and
    SinglePositionMultiTokenCandidateGenerator.
    """

    names = (
        (r"mtp\.pre_projection\.(.+)", r"units.0.join.\1"),
        (r"mtp\.post_projection\.(.+)", r"units.0.back.\1"),
        (r"mtp\.model\.embed_tokens\.(.+)", r"units.0.words.\1"),
        (r"mtp\.lm_head\..+", ""),  # the same again
        (r"mtp\.model\.norm\.(.+)", r"units.0.norm.\1"),
        (r"mtp\.model\.layers\.(\d+\..+)", r"units.0.blocks.\1"),
        (r"mtp\.masked_embedding\.centroids\.(.+)", r"units.0.centroids.\1"),
        (r"mtp\.masked_embedding\.token_ordering", r"units.0.order"),
    )

    def stub(self, config: Config, unit: int, names: Weights) -> nn.Module:
        args = ModelArgs.from_dict(config | _sizes(config, names))
        stub = nn.Module()
        stub.layers = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        return stub

    def unit(self, stub: nn.Module, config: Config, trunk: Trunk, names: Weights) -> AssistantUnit:
        width = names["norm.weight"].size
        norm = partial(nn.RMSNorm, eps=stub.layers[0].input_layernorm.eps)
        clusters = names["centroids.weight"].shape[0] if "centroids.weight" in names else 0
        vocabulary = names["words.weight"].shape[0]
        return AssistantUnit(
            stub.layers, norm(width), config["hidden_size"], width, vocabulary, clusters
        )

    def head(self, trunk: Trunk, units: Sequence[Any]) -> Head:
        return Assistant(trunk, units[0])

    def sanitize(self, stub: nn.Module, weights: Weights) -> Weights:
        return weights


def _sizes(config: Config, weights: Weights) -> Config:
    """What the assistant's own configuration says, from its tensors. Raises ValueError."""
    widths: list[int] = []
    while f"blocks.{len(widths)}.self_attn.q_norm.weight" in weights:
        widths.append(weights[f"blocks.{len(widths)}.self_attn.q_norm.weight"].size)
    if not widths:
        raise ValueError("it has no layers")
    narrow, wide = config["head_dim"], config.get("global_head_dim") or config["head_dim"]
    if not set(widths) <= {narrow, wide}:
        raise ValueError(f"its attention is {widths} wide, the target's {narrow} and {wide}")
    if narrow == wide:  # then as published: the last one sees everything
        types = [SLIDING] * (len(widths) - 1) + [FULL]
    else:
        types = [FULL if width == wide else SLIDING for width in widths]
    return {
        "hidden_size": weights["norm.weight"].size,
        "intermediate_size": weights["blocks.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": len(widths),
        "num_attention_heads": weights["blocks.0.self_attn.q_proj.weight"].shape[0] // widths[0],
        "num_kv_shared_layers": len(widths),
        "layer_types": types,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
    }
