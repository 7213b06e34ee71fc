"""Tiny random checkpoints of every MoE family in mlx-lm, for tests.

    from families import FAMILIES, HF_FAMILIES, make_tiny
    make_tiny("qwen3_moe", path, quantization={"bits": 4, "group_size": 32})

Weights are float32, so that logits on CPU can be compared bit for bit. Random
weights route evenly and say nothing about a trained model's hit rates.
"""

from .assistant import ASSISTED, make_assistant
from .checkpoint import make_tiny
from .configs import CONFIGS, DENSE, METAL_ONLY
from .heads import HEADS, head_shapes, head_weights, make_head
from .hf import HF
from .packed import PACKED

FAMILIES = sorted(CONFIGS)
HF_FAMILIES = sorted(HF)

__all__ = [
    "ASSISTED",
    "CONFIGS",
    "DENSE",
    "FAMILIES",
    "HEADS",
    "HF_FAMILIES",
    "METAL_ONLY",
    "PACKED",
    "head_shapes",
    "head_weights",
    "make_assistant",
    "make_head",
    "make_tiny",
]
