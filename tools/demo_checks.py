"""What the demo's export measures: held-out loss, head agreement, agreement with transformers.

Losses come from transformers' trunk and the training code's head in float32, so the quantized
package is measured on what it multiplies out to (`tools.dequantize`), not on its kernels.

    python -m tools.train_demo export --raw raw --out demo     # prints all of it
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer

from streamer.errors import UsageError
from tools import demo_corpus, raw_checkpoint
from tools.demo_model import DemoModel
from tools.demo_training import evaluate
from tools.reference import PROMPTS, TOKENS, greedy, load_reference, logits

ROWS = 128
BATCH = 8
CONTINUED = 60


@dataclass(frozen=True)
class Agreement:
    """mlx-lm against transformers on the same float32 weights.

    `difference`: largest absolute difference of logits over ROWS tokens; `equal`: greedy tokens
    that agree before the first that does not, by prompt, of TOKENS.
    """

    difference: float
    equal: dict[str, int]


def held_out_ids(corpus: Path | None, raw: Path, report: dict[str, Any]) -> np.ndarray:
    """Ids [N] of the held-out files. Raises UsageError if it is not the corpus of the training."""
    texts = list(demo_corpus.read_corpus(corpus).held_out.values())
    ids = demo_corpus.encode(Tokenizer.from_file(str(raw / "tokenizer.json")), texts)
    if len(ids) != (wanted := report["held_out_tokens"]):
        raise UsageError(
            f"the corpus has {len(ids)} held-out tokens and the one trained on had {wanted};"
            " name that one with --corpus"
        )
    return ids


def held_out(folder: Path, ids: np.ndarray, context: int) -> dict[str, float]:
    """Losses, head agreement and balance of an unquantized checkpoint over all of `ids`."""
    checkpoint = raw_checkpoint.load(folder)
    model = DemoModel(checkpoint.config)
    model.load_weights({name: tensor.float() for name, tensor in checkpoint.weights.items()})
    rows = torch.from_numpy(ids)
    return evaluate(model, rows, context, BATCH, nullcontext(), limit=len(rows))


def continued(model: Any, ids: list[int], count: int) -> list[int]:
    """mlx-lm's greedy tokens after `ids`, past any end token."""
    steps = generate_step(mx.array(ids), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def compare(model: Any, raw: Path, ids: np.ndarray) -> Agreement:
    """Hold mlx-lm's unquantized float32 `model` against transformers' of the checkpoint `raw`."""
    reference = load_reference(raw)
    row = ids[:ROWS].tolist()
    ours = np.array(model(mx.array(row)[None])[0])
    difference = float(np.abs(ours - logits(reference, row)).max())
    tokenizer = Tokenizer.from_file(str(raw / "tokenizer.json"))
    equal: dict[str, int] = {}
    for prompt in PROMPTS:
        start = tokenizer.encode(prompt).ids
        pairs = zip(
            continued(model, start, TOKENS), greedy(reference, start, TOKENS).tokens, strict=True
        )
        equal[prompt] = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Agreement(difference, equal)
