"""Faster training forms of three Qwen3.5-MoE operations, checked against transformers' own.

The experts as one grouped or one dense product in bfloat16, the depthwise convolution as four
shifted products, and the chunked gated delta rule without in-place writes (which slow autograd).
`install` tries each on this device, forward and backward, and keeps transformers' own wherever a
form fails or strays, so training always starts. Only training uses them, never a reference.

    python -m tools.train_demo --out DIR --steps 30     # prints which forms were taken
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

CHUNK = 64
Form = Callable[..., Any]


def delta_rule(*inputs: Tensor, **named: Any) -> tuple[Tensor, None]:
    """`_delta_rule` outside of autocast, which would round its products to bfloat16."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _delta_rule(*inputs, **named)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Gated delta rule (arXiv:2412.06464) over whole sequences from a zero state, in float32.

    query, key [B, T, Hk, K]; value [B, T, Hv, V]; g (log decay), beta [B, T, Hv]. Queries and keys
    are L2-normalised here. Returns the outputs [B, T, Hv, V] in query's dtype, and no final state.
    """
    batch, rows, heads, width = value.shape
    repeats = heads // key.shape[2]
    pad = -rows % CHUNK

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x.float(), (0, 0, 0, 0, 0, pad)) if x.dim() == 4 else F.pad(x, (0, 0, 0, pad))
        return x.unflatten(1, (-1, CHUNK)).transpose(2, 3)  # [B, N, H, CHUNK, ...]

    def unit(x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)

    q = chunks((unit(query) * query.shape[-1] ** -0.5).repeat_interleave(repeats, 2))
    k = chunks(unit(key).repeat_interleave(repeats, 2))
    v, rate = chunks(value), chunks(beta.float()).unsqueeze(-1)
    total = chunks(g.float()).cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    since = total.exp().unsqueeze(-1)
    system = (rate * k) @ k.mT * between
    right = torch.cat([rate * v, rate * since * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    fresh, reads = solved.split([width, solved.shape[-1] - width], dim=-1)
    scores = q @ k.mT * between
    q_since = q * since
    k_until = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT
    kept = total[..., -1].exp()[..., None, None]

    state = torch.zeros(batch, heads, k.shape[-1], width, device=q.device)
    outputs = []
    for fresh_n, reads_n, scores_n, q_n, k_n, kept_n in zip(
        *(x.unbind(1) for x in (fresh, reads, scores, q_since, k_until, kept)), strict=True
    ):
        new = fresh_n - reads_n @ state
        outputs.append(q_n @ state + scores_n @ new)
        state = state * kept_n + k_n @ new
    out = torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)[:, :rows]
    return out.to(query.dtype), None


def causal_conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Depthwise causal convolution of [B, C, T] with weight [C, W], as W shifted products."""
    width, rows = weight.shape[-1], hidden_states.shape[-1]
    padded = F.pad(hidden_states, (width - 1, 0))
    weight = weight.to(hidden_states.dtype)
    out = sum(padded[..., i : i + rows] * weight[:, i, None] for i in range(width))
    assert isinstance(out, Tensor)
    out = out if bias is None else out + bias[:, None].to(out.dtype)
    return out if activation is None else ACT2FN[activation](out)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.is_cuda else x.dtype


def dense_experts(module: Any, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """Every expert on every row, then weighted by score or zero: more products, no gathers."""
    dtype = _work_dtype(x)
    experts, double, width = module.gate_up_proj.shape
    weights = torch.zeros(x.shape[0], experts, device=x.device, dtype=dtype)
    weights = weights.scatter(1, chosen, scores.to(dtype))
    gate_up = x.to(dtype) @ module.gate_up_proj.to(dtype).view(-1, width).T
    gate, up = gate_up.view(-1, experts, 2, double // 2).unbind(2)
    inner = F.silu(gate) * up * weights.unsqueeze(-1)
    down = module.down_proj.to(dtype).transpose(1, 2).reshape(-1, width)
    return (inner.flatten(1) @ down).to(x.dtype)


class _Dispatch(torch.autograd.Function):
    """Rows copied to their experts' places; backward gathers instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        gradient = gradients[0][back]
        return gradient.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def grouped_experts(module: Any, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """Rows sorted by expert, one grouped product a projection."""
    dtype = _work_dtype(x)
    top_k, experts = chosen.shape[1], module.gate_up_proj.shape[0]
    order = chosen.flatten().argsort()
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    counts = (chosen.flatten().unsqueeze(-1) == torch.arange(experts, device=x.device)).sum(0)
    ends = counts.cumsum(0).to(torch.int32)
    picked = _Dispatch.apply(x.to(dtype), order, back, top_k)
    gate_up = F.grouped_mm(picked, module.gate_up_proj.to(dtype).transpose(1, 2), offs=ends)
    gate, up = gate_up.chunk(2, -1)
    weight = _Dispatch.apply(scores.to(dtype).flatten(), order, back, 1)
    inner = F.silu(gate) * up * weight.unsqueeze(-1)
    out = F.grouped_mm(inner, module.down_proj.to(dtype).transpose(1, 2), offs=ends)
    returned = _Dispatch.apply(out, back, order, 1)
    return returned.unflatten(0, (-1, top_k)).sum(1).to(x.dtype)


def _relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    errors = [
        (f.float() - w.float()).norm() / w.float().norm().clamp_min(1e-12)
        for f, w in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(errors).max())


def _trial(
    call: Callable[[], Tensor], inputs: list[Tensor], seed: Tensor
) -> tuple[list[Tensor], float]:
    """Output and gradients of one call, and the seconds that the third call took."""

    def once() -> list[Tensor]:
        out = call()
        return [out.detach(), *torch.autograd.grad(out, inputs, seed.to(out.dtype))]

    result = once()
    once()
    _synchronise(seed)
    start = time.perf_counter()
    once()
    _synchronise(seed)
    return result, time.perf_counter() - start


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def fastest(
    name: str,
    forms: dict[str, Callable[[], Tensor]],
    inputs: list[Tensor],
    tolerance: float,
) -> str:
    """The fastest form that agrees with the first one listed, forward and backward.

    The first form is the reference and must run. Prints one line of milliseconds.
    """
    reference, *others = forms
    seed = torch.randn_like(forms[reference]().detach().float())
    wanted, seconds = _trial(forms[reference], inputs, seed)
    timings, notes = {reference: seconds}, [f"{reference} {seconds * 1e3:.1f} ms"]
    for other in others:
        try:
            found, seconds = _trial(forms[other], inputs, seed)
        except Exception as error:
            # Whatever an optional form fails with, the reference remains.
            notes.append(f"{other} failed ({type(error).__name__}: {str(error)[:80]!r})")
            continue
        wrong = _relative_error(found, wanted)
        if wrong <= tolerance:
            timings[other] = seconds
        notes.append(f"{other} {seconds * 1e3:.1f} ms (off by {wrong:.1e})")
    best = min(timings, key=timings.__getitem__)
    print(f"{name}: {', '.join(notes)}; taking {best}", flush=True)
    return best


def install(model: Any, batch: int, context: int, *, compiled: bool = False) -> None:
    """Choose the form of each operation for `model` on its device, at [batch, context] rows.

    Call it under the autocast that training will use. Patches transformers' module, so it holds
    for the whole process.
    """
    config, device = model.trunk.config, next(model.parameters()).device
    tolerance = 5e-2 if device.type == "cuda" else 1e-3

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key_width, value_width = config.linear_key_head_dim, config.linear_value_head_dim
    # Keys already repeated per value head: some versions of transformers do that in the caller.
    q, k = random(batch, context, values, key_width), random(batch, context, values, key_width)
    v = random(batch, context, values, value_width)
    g, beta = random(batch, context, values), random(batch, context, values)

    def rule(form: Form) -> Callable[[], Tensor]:
        return lambda: form(
            q, k, v, g=-F.softplus(g), beta=beta.sigmoid(), use_qk_l2norm_in_kernel=True
        )[0]

    rules: dict[str, Form] = {
        "transformers": modeling.torch_chunk_gated_delta_rule,
        "demo": delta_rule,
    }
    if compiled:
        rules["compiled"] = torch.compile(delta_rule, dynamic=False)
    with torch.autocast(device.type, enabled=False):
        best = fastest(
            "delta rule", {n: rule(f) for n, f in rules.items()}, [q, k, v, g, beta], tolerance
        )
    modeling.torch_chunk_gated_delta_rule = rules[best]

    channels = 2 * keys * key_width + values * value_width
    x, weight = random(batch, channels, context), random(channels, config.linear_conv_kernel_dim)
    convolutions: dict[str, Form] = {
        "transformers": modeling.causal_conv1d_fn,
        "demo": causal_conv,
    }

    def convolve(form: Form) -> Callable[[], Tensor]:
        return lambda: form(x.to(_work_dtype(x)), weight, activation="silu")

    best = fastest(
        "convolution", {n: convolve(f) for n, f in convolutions.items()}, [x, weight], tolerance
    )
    modeling.causal_conv1d_fn = convolutions[best]

    for form_name, form in (("dense", dense_experts), ("grouped", grouped_experts)):
        ALL_EXPERTS_FUNCTIONS.register(form_name, form)
    experts = model.trunk.model.layers[0].mlp.experts
    rows = random(batch * context, config.hidden_size)
    scores, chosen = torch.rand(batch * context, config.num_experts, device=device).topk(
        config.num_experts_per_tok
    )
    scores.requires_grad_()

    def run(implementation: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            config._experts_implementation = implementation
            return experts(rows, chosen, scores)

        return call

    best = fastest(
        "experts",
        {n: run(n) for n in ("eager", "grouped_mm", "dense", "grouped")},
        [rows, scores, experts.gate_up_proj, experts.down_proj],
        tolerance,
    )
    config._experts_implementation = best
