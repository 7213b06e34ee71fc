"""The demo package's model card: what it is, what it was trained on, what was measured.

Every number in it comes from training.json and from what the export measured.

    python -m tools.train_demo export --raw raw --out demo     # writes demo/README.md
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from tools.demo_checks import Agreement

MEASURES = {
    "loss": "next token, loss (nats per token)",
    "mtp_loss_1": "MTP head, depth 1, loss",
    "mtp_loss_2": "MTP head, depth 2, loss",
    "agreement_1": "MTP head, depth 1, argmax is the trunk's",
    "agreement_2": "MTP head, depth 2, argmax is the trunk's",
    "balance": "routing balance (1 is even)",
}

CARD = """\
---
license: mit
library_name: mlx
language:
- code
---

# Demo model of the streamer

A small Qwen3.5-MoE with a multi-token-prediction (MTP) head that writes Python. It is here so that
streaming, drafting and caching can be tried on a trained model: its routing, hit rates and accepted
drafts are real, its code is not. MIT licence, weights and training code.

## Data

Python sources, tests included: {source} ({characters:.1f} million characters,
{train_files} files; Python Software Foundation licence,
https://docs.python.org/3/license.html). {held_out_files} more files, chosen by a hash of their
path, are held out from the weights and from the tokenizer, a byte-level BPE of {vocabulary}
entries.

## Architecture

`Qwen3_5MoeForCausalLM`, text only: {layers} layers of which every fourth has full attention and
the others a gated delta net, hidden size {hidden}, {experts} experts of intermediate size
{intermediate} per layer of which {top_k} are chosen, and a shared one; {parameters:.1f}M
parameters, head included. The head is one more full-attention MoE layer behind `mtp.fc`, named as
published checkpoints name it: it takes the embedding of token t+1 and the trunk's hidden state of
token t after the final norm.

## Format

Trunk and experts: affine, 4 bits, groups of 64; routers and shared-expert gates at 8 bits. MTP
head: 8 bits, `mtp.fc` and norms unquantized. Scales, biases and norms are float32, so that
activations are float32 on CPU. Scales are fitted by least squares (`tools/demo_quantize.py`).

All norms, `mtp.*` included, are stored as they multiply: 1 is already added to the zero-centred
weights of Hugging Face checkpoints (`"mtp_norms_zero_centred": false` in config.json says so of
the head's). Experts are stacked (`switch_mlp.gate_proj` and so on), the head's too. mlx-lm loads
the folder as it is and leaves the head out.

## Measured

Held-out files, windows of {context} tokens, float32:

| | raw weights | this package |
|---|---|---|
{table}

Depth 2 feeds the head's own output back, over rows of drafts only: a lower bound of what drafting
sees. Raw weights in mlx-lm and in transformers: logits differ by {difference:.1e} at most over
{rows} tokens, greedy tokens agree for {equal}.

Greedy continuation of `def `:

```python
{continuation}
```

## Training

{runs}

Again:

{commands}
{note}
It trains on CPU too, some hundred times slower.

## Limits

A toy. It has seen one library in one language, repeats itself under greedy decoding, follows no
instructions and knows nothing. Texts of the standard library may come out verbatim.
"""


@dataclass(frozen=True)
class Measured:
    """What the card states: held-out measures of both forms, and the comparisons."""

    raw: dict[str, float]
    package: dict[str, float]
    agreement: Agreement
    continuation: str


def card(text: dict[str, Any], report: dict[str, Any], measured: Measured, rows: int) -> str:
    """README.md of the package. `text`: its text configuration; `report`: training.json.

    `report["note"]`, if there is one, says what about the runs is not known from records.
    """
    table = "\n".join(
        f"| {title} | {measured.raw[key]:.3f} | {measured.package[key]:.3f} |"
        for key, title in MEASURES.items()
    )
    equal = ", ".join(f"{n} after `{prompt}`" for prompt, n in measured.agreement.equal.items())
    return CARD.format(
        source=report["source"],
        characters=report["characters"] / 1e6,
        train_files=report["train_files"],
        held_out_files=report["held_out_files"],
        vocabulary=text["vocab_size"],
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        experts=text["num_experts"],
        intermediate=text["moe_intermediate_size"],
        top_k=text["num_experts_per_tok"],
        parameters=report["parameters"] / 1e6,
        context=report["context"],
        table=table,
        difference=measured.agreement.difference,
        rows=rows,
        equal=equal,
        continuation=measured.continuation,
        runs=_runs(report),
        commands=_commands(report),
        note=f"\n{textwrap.fill(report['note'], 99)}\n" if "note" in report else "",
    )


def _runs(report: dict[str, Any]) -> str:
    return "\n".join(
        f"{number}. {run['best']['tokens'] / 1e6:.1f}M tokens in {run['best']['seconds'] / 60:.1f}"
        f" minutes, set-up and evaluation included, on {run['hardware']}: held-out loss"
        f" {run['best']['loss']:.3f}"
        for number, run in enumerate([*report["earlier"], report], 1)
    )


def _commands(report: dict[str, Any]) -> str:
    """The command lines that made the runs, options at their defaults left out."""
    lines: list[str] = []
    for number, run in enumerate([*report["earlier"], report], 1):
        words = [f"python -m tools.train_demo --out raw{number}"]
        if number > 1:
            words.append(f"--resume raw{number - 1}")
        for name, value in run["options"].items():
            word = "--" + name.replace("_", "-")
            words.append(word if value is True else f"{word} {value}")
        lines.append(" ".join(words))
    lines.append(f"python -m tools.train_demo export --raw raw{len(lines)} --out demo")
    return "\n".join("    " + line for line in lines)
