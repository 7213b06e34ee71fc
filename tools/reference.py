"""transformers as the independent reference: float32 on CPU, greedy tokens one by one.

Needs torch; what it finds for the shipped demo is recorded in tests/golden.

    python -m tools.golden --check     # compares what is recorded with a live run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3_5MoeForCausalLM

from streamer.errors import CheckpointError

PROMPTS = ("def ", "import ", "class ")
TOKENS = 64


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens, and the smallest lead of a chosen logit over the runner-up."""

    tokens: list[int]
    margin: float


def load_reference(folder: Path) -> Any:
    """`Qwen3_5MoeForCausalLM` of an unquantized checkpoint, in float32.

    Raises CheckpointError if a weight is missing from the checkpoint or none of the model's.
    """
    model, report = Qwen3_5MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # The class itself leaves the MTP head out.
        wrong = sorted(str(key) for key in report[what] if not str(key).startswith("mtp."))
        if wrong:
            raise CheckpointError(f"{folder}: transformers finds {what} such as {wrong[0]}")
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    """Logits [T, V] of one pass over `ids`, as a NumPy array of float32."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> Continuation:
    """`count` greedy tokens after `ids`, past any end token."""
    tokens: list[int] = []
    margin, step, cache = float("inf"), torch.tensor([ids]), None
    while len(tokens) < count:
        out = model(step, past_key_values=cache, use_cache=True)
        best = out.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        step, cache = best.indices[:1][None], out.past_key_values
    return Continuation(tokens, margin)
