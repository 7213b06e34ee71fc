"""The demo model: transformers' own Qwen3.5-MoE trunk and an MTP head as published ones have it.

The trunk is `Qwen3_5MoeForCausalLM`, so its logits are a reference that owes nothing to this
project. The head predicts the token after the next: x = fc(concat[norm_e(embed(token t+1)),
norm_h(h_t)]) with h_t the trunk's hidden state after its final norm, one full-attention MoE layer,
logits = lm_head(mtp.norm(x)); a deeper draft feeds mtp.norm(x) back as the hidden state.

    python -m tools.train_demo --out DIR --steps 30     # builds, trains and saves one
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

MTP_PREFIX = "mtp."


def demo_config(
    *,
    vocabulary: int = 2048,
    hidden: int = 256,
    layers: int = 8,
    experts: int = 40,
    top_k: int = 4,
    intermediate: int = 64,
    context: int = 1024,
    end_token: int = 0,
) -> Qwen3_5MoeTextConfig:
    """The trunk's configuration; every quantized input dimension is a multiple of 64."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        full_attention_interval=4,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        linear_num_key_heads=max(1, hidden // 128),
        linear_num_value_heads=max(1, hidden // 64),
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=intermediate,
        shared_expert_intermediate_size=intermediate,
        max_position_embeddings=max(context, 4096),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=False,
        eos_token_id=end_token,
        bos_token_id=None,
        pad_token_id=None,
        dtype="float32",
        architectures=["Qwen3_5MoeForCausalLM"],
    )


class MTPHead(nn.Module):
    """One-layer head under the published names; borrows the trunk's embedding and lm_head."""

    def __init__(self, config: Qwen3_5MoeTextConfig):
        super().__init__()
        norm = modeling.Qwen3_5MoeRMSNorm
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding = norm(width, eps=eps)
        self.pre_fc_norm_hidden = norm(width, eps=eps)
        full = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([modeling.Qwen3_5MoeDecoderLayer(config, full)])
        self.norm = norm(width, eps=eps)
        self.rotary_emb = modeling.Qwen3_5MoeTextRotaryEmbedding(config)
        self._initialise(config.initializer_range)

    @torch.no_grad()
    def _initialise(self, deviation: float) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, deviation)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """`embedded` of token t+1 and `hidden` of token t, [B, T, D] both; mtp.norm(x), [B, T, D].

        Attention is causal over all T rows; a padding-free batch is assumed.
        """
        joined = torch.cat(
            [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1
        )
        x = self.fc(joined)
        batch, rows, _ = x.shape
        positions = torch.arange(rows, device=x.device).view(1, 1, -1).expand(3, batch, -1)
        x = self.layers[0](
            x,
            position_embeddings=self.rotary_emb(x, positions),
            attention_mask=_causal_mask(rows, x) if self._needs_mask() else None,
        )
        return self.norm(x)

    def _needs_mask(self) -> bool:
        # sdpa without a mask is causal by the module's is_causal; eager without one is not.
        return self.layers[0].self_attn.config._attn_implementation == "eager"


def _causal_mask(rows: int, like: Tensor) -> Tensor:
    blocked = torch.full((rows, rows), float("-inf"), device=like.device, dtype=like.dtype)
    return blocked.triu(1)[None, None]


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats per token; `balance` is 1 for perfectly even routing."""

    trunk: Tensor
    heads: tuple[Tensor, ...]
    balance: Tensor
    agreement: tuple[Tensor, ...]


class DemoModel(nn.Module):
    """Trunk and head trained together."""

    def __init__(self, config: Qwen3_5MoeTextConfig, dropout: float = 0.0):
        super().__init__()
        self.trunk = Qwen3_5MoeForCausalLM(config)
        self.mtp = MTPHead(self.trunk.config)
        self._randomise_routers(config.initializer_range)
        if dropout:
            self._drop_outputs(dropout)

    @torch.no_grad()
    def _randomise_routers(self, deviation: float) -> None:
        for router in self._routers():
            router.weight.normal_(0.0, deviation)

    def _drop_outputs(self, share: float) -> None:
        """Dropout after the embedding, each mixer and each MoE block, in training mode only."""

        def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (F.dropout(output[0], share, module.training), *output[1:])
            return F.dropout(output, share, module.training)

        dropped = (
            modeling.Qwen3_5MoeGatedDeltaNet,
            modeling.Qwen3_5MoeAttention,
            modeling.Qwen3_5MoeSparseMoeBlock,
            nn.Embedding,
        )
        for module in self.modules():
            if isinstance(module, dropped):
                module.register_forward_hook(drop)

    def _routers(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, modeling.Qwen3_5MoeTopKRouter)]

    @contextmanager
    def _recorded_routing(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.append((output[0], output[2]))

        hooks = [router.register_forward_hook(record) for router in self._routers()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def losses(self, ids: Tensor, depth: int = 1) -> Losses:
        """Losses of windows `ids` [B, T + 1 + depth]: T positions, `depth` recursive head steps.

        `agreement[d]`: share of positions where head step d's argmax is the trunk's own argmax for
        the same token. Rows of a recursive step attend to that step's rows, not to verified ones,
        so deeper agreement is a lower bound of what drafting sees.
        """
        rows = ids.shape[1] - 1 - depth
        with self._recorded_routing() as routing:
            hidden = self.trunk.model(input_ids=ids[:, :rows], use_cache=False).last_hidden_state
            logits = self.trunk.lm_head(hidden)
            trunk = _cross_entropy(logits, ids[:, 1 : rows + 1])
            chosen = logits.detach().argmax(-1)
            heads, agreement, state = [], [], hidden
            for step in range(1, depth + 1):
                embedded = self.trunk.model.embed_tokens(ids[:, step : step + rows])
                state = self.mtp(embedded, state)
                guess = self.trunk.lm_head(state)
                heads.append(_cross_entropy(guess, ids[:, step + 1 : step + 1 + rows]))
                same = guess.detach().argmax(-1)[:, :-step] == chosen[:, step:]
                agreement.append(same.float().mean())
        balance = torch.stack([_balance(*layer) for layer in routing]).mean()
        return Losses(trunk, tuple(heads), balance, tuple(agreement))

    def named_weights(self) -> dict[str, Tensor]:
        """Every tensor under its checkpoint name: the trunk's own names, and `mtp.*`."""
        weights = dict(self.trunk.state_dict())
        weights.update({MTP_PREFIX + k: v for k, v in self.mtp.state_dict().items()})
        return weights

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `named_weights`; raises RuntimeError for a missing or a foreign name."""
        head = {k[len(MTP_PREFIX) :]: v for k, v in weights.items() if k.startswith(MTP_PREFIX)}
        trunk = {k: v for k, v in weights.items() if not k.startswith(MTP_PREFIX)}
        self.trunk.load_state_dict(trunk)
        self.mtp.load_state_dict(head)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _balance(logits: Tensor, chosen: Tensor) -> Tensor:
    """Switch Transformer's balancing loss of one layer (arXiv:2101.03961, eq. 4), 1 when even."""
    experts = logits.shape[-1]
    share = F.one_hot(chosen.flatten(), experts).float().mean(0)
    return experts * (share * logits.float().softmax(-1).mean(0)).sum()
