"""The demo model's training loop: AdamW, cosine rate, a clock, the best checkpoint kept.

Runs on one CUDA device (bfloat16 autocast over float32 weights) or on CPU in float32. It keeps no
optimizer state: a resumed run starts from the weights, with a fresh warm-up.

    python -m tools.train_demo --out raw --steps 30
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from streamer.errors import StreamerError, UsageError
from tools import demo_corpus, demo_ops, raw_checkpoint
from tools.demo_model import DemoModel, demo_config

BETAS = (0.9, 0.95)
DECAY = 0.1
CLIP = 1.0
WARMUP = 200
BALANCE_WEIGHT = 0.01
FLOOR = 0.02
# Shares of the held-out files that fit an evaluation of a second or two.
EVALUATION_TOKENS = {"cpu": 8_192, "cuda": 400_000}
EVALUATIONS = 16
EVALUATION_DEPTH = 2
SKIPPED_STEPS = 100
PLACES = ("out", "corpus", "resume")


class DivergedError(StreamerError):
    """Training met too many steps with infinite gradients."""


def windows(
    ids: torch.Tensor, span: int, batch: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless batches [batch, span] of int64: every epoch cuts the row anew and shuffles."""
    count = (len(ids) - span) // span
    if count < batch:
        raise UsageError(f"the corpus has {len(ids)} tokens: too few for a batch of {batch}x{span}")
    steps = torch.arange(span, device=ids.device)
    while True:
        offset = int(torch.randint(span, (1,), generator=generator))
        order = torch.randperm(count, generator=generator).to(ids.device) * span + offset
        for starts in order[: count - count % batch].view(-1, batch):
            yield ids[starts[:, None] + steps].long()


def evaluate(
    model: DemoModel,
    ids: torch.Tensor,
    context: int,
    batch: int,
    precision: AbstractContextManager,
    *,
    limit: int,
) -> dict[str, float]:
    """Held-out losses (nats per token) and head agreement over consecutive windows.

    At most `limit` of `ids` are read.
    """
    span = context + 1 + EVALUATION_DEPTH
    limit = min(len(ids), limit)
    rows = ids[: limit - limit % span].view(-1, span).long()
    model.eval()
    found, weights = [], []
    with torch.no_grad(), precision:
        for part in rows.split(batch):
            losses = model.losses(part, EVALUATION_DEPTH)
            found.append(
                torch.stack([losses.trunk, *losses.heads, *losses.agreement, losses.balance])
            )
            weights.append(float(len(part)))
    model.train()
    share = torch.tensor(weights, device=ids.device) / sum(weights)
    values = (torch.stack(found).float() * share[:, None]).sum(0).tolist()
    depths = range(1, EVALUATION_DEPTH + 1)
    names = ["loss", *(f"mtp_loss_{d}" for d in depths), *(f"agreement_{d}" for d in depths)]
    return dict(zip([*names, "balance"], values, strict=True))


def optimizer_for(model: DemoModel, rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=fused)


def _earlier(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a resumed checkpoint comes from, oldest first."""
    kept = ("device", "hardware", "options", "best")
    return [*report.get("earlier", []), {k: report[k] for k in kept if k in report}]


class Training:
    """One run: model, data and clock. `changed`: the options that are not at their defaults."""

    def __init__(self, options: argparse.Namespace, changed: dict[str, Any], started: float):
        self.options, self.changed, self.started = options, changed, started
        wanted = options.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(wanted)
        cuda = self.device.type == "cuda"
        self.context = options.context or (1024 if cuda else 256)
        self.batch = options.batch or (32 if cuda else 8)
        self.depth = 2 if options.recursion > 0 else 1
        self.stopped = False
        self.history: list[dict[str, float]] = []
        self.best = math.inf
        torch.manual_seed(options.seed)
        if cuda:
            torch.set_float32_matmul_precision("high")
        self._prepare()

    def precision(self) -> AbstractContextManager:
        """Mixed precision on CUDA (weights stay float32), plain float32 on CPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def _prepare(self) -> None:
        options, cuda = self.options, self.device.type == "cuda"
        corpus = demo_corpus.read_corpus(options.corpus)
        resumed = raw_checkpoint.load(options.resume) if options.resume else None
        train = list(corpus.train.values())
        if resumed is None:
            self.tokenizer = demo_corpus.train_tokenizer(train, options.vocabulary)
            config = demo_config(
                vocabulary=options.vocabulary,
                hidden=options.hidden,
                layers=options.layers,
                experts=options.experts,
                intermediate=options.intermediate,
            )
        else:
            self.tokenizer = Tokenizer.from_file(str(options.resume / "tokenizer.json"))
            config = resumed.config
        self.train_ids = self._ids(train)
        if options.cut:
            cut = demo_corpus.encode_cut(self.tokenizer, train, options.cut, options.seed)
            self.train_ids = torch.cat([self.train_ids, torch.from_numpy(cut).to(self.device)])
        self.held_out_ids = self._ids(list(corpus.held_out.values()))
        self.facts: dict[str, Any] = {
            "train_files": len(corpus.train),
            "held_out_files": len(corpus.held_out),
            "characters": corpus.size,
            "train_tokens": len(self.train_ids),
            "held_out_tokens": len(self.held_out_ids),
            "context": self.context,
            "device": self.device.type,
            "hardware": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
            "source": options.corpus.name if options.corpus else demo_corpus.stdlib_name(),
            "options": {k: v for k, v in self.changed.items() if k not in PLACES},
            "earlier": _earlier(resumed.report) if resumed is not None else [],
        }
        print(f"corpus: {self.facts} after {self.elapsed():.0f} s", flush=True)
        self.model = DemoModel(config, options.dropout).to(self.device)
        if resumed is not None:
            self.model.load_weights(resumed.weights)
        self.model.train()
        parameters = sum(p.numel() for p in self.model.parameters())
        self.facts["parameters"] = parameters
        with self.precision():
            demo_ops.install(self.model, self.batch, self.context, compiled=options.compile)
        print(f"model: {parameters / 1e6:.1f}M parameters on {self.device}", flush=True)

    def _ids(self, texts: list[str]) -> torch.Tensor:
        row: np.ndarray = demo_corpus.encode(self.tokenizer, texts)
        return torch.from_numpy(row).to(self.device)

    def progress(self, step: int) -> float:
        """Share of the run that is done, 0 to 1; by time or by steps, whichever limits."""
        if self.options.steps:
            return min(1.0, step / self.options.steps)
        usable = self.options.minutes * 60 - self.first - self.reserve
        return min(1.0, (self.elapsed() - self.first) / max(usable, 1e-9))

    def run(self) -> None:
        """Train to the limit; leaves the best checkpoint in `--out`."""
        options, model = self.options, self.model
        optimizer = optimizer_for(model, options.rate)
        generator = torch.Generator().manual_seed(options.seed)
        batches = windows(self.train_ids, self.context + 1 + self.depth, self.batch, generator)
        # Seconds kept back for the last evaluation and the save; grows to what they take.
        self.first, self.reserve = self.elapsed(), 5.0
        warmup = min(WARMUP, options.steps // 10) if options.steps else WARMUP
        step, skipped, marked, evaluated = 0, 0, self.elapsed(), 0.0
        smooth = math.nan
        while (done := self.progress(step)) < 1 and not self.stopped:
            rate = options.rate * min(1.0, (step + 1) / max(1, warmup))
            rate *= FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with self.precision():
                losses = model.losses(next(batches), self.depth)
                total = losses.trunk + BALANCE_WEIGHT * losses.balance
                for loss, weight in zip(
                    losses.heads, (options.mtp_weight, options.recursion), strict=False
                ):
                    total = total + weight * loss
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            if bool(torch.isfinite(norm)):
                optimizer.step()
                value = float(losses.trunk.detach())
                smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
            else:
                skipped += 1
                if skipped > SKIPPED_STEPS:
                    raise DivergedError(f"training diverged at step {step}: lower --rate")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            now = self.elapsed()
            if step in (3, 10, 30) or now - marked > 10:
                marked = now
                speed = step * self.batch * self.context / (now - self.first)
                print(
                    f"step {step} {now:.0f} s {done:.0%} train loss {smooth:.3f} rate {rate:.1e}"
                    f" {speed:.0f} tokens/s skipped {skipped}",
                    flush=True,
                )
            if (done - evaluated) * EVALUATIONS >= 1:
                evaluated = done
                self.measure(step)
        if not self.history or self.history[-1]["step"] != step:
            self.measure(step)

    def measure(self, step: int) -> None:
        """Evaluate; save if this is the best so far."""
        begun = self.elapsed()
        found = evaluate(
            self.model,
            self.held_out_ids,
            self.context,
            self.batch,
            self.precision(),
            limit=EVALUATION_TOKENS[self.device.type],
        )
        found |= {"step": step, "seconds": round(self.elapsed(), 1)}
        found["tokens"] = step * self.batch * self.context
        self.history.append(found)
        if best := found["loss"] < self.best:
            self.best = found["loss"]
            report = {**self.facts, "best": found, "history": self.history}
            raw_checkpoint.save(self.model, self.tokenizer, report, self.options.out)
        taken = self.elapsed() - begun
        self.reserve = max(self.reserve, 1.5 * taken + 1)
        print(
            f"held out at step {step}: "
            + " ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "step")
            + (" (best, saved)" if best else "")
            + f" in {taken:.1f} s",
            flush=True,
        )
