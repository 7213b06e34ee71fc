"""MTP heads in torch, from transformers' own layers: a reference that shares no code with ours.

Needs torch. The logits it gives for two tiny checkpoints are kept in
tests/golden/mtp_heads.json, for machines without it:

    PYTHONPATH=tests:. python tests/mtp_reference.py     # writes them again
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    Qwen3_5MoeTextConfig,
)
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen

GOLDEN = Path(__file__).parent / "golden" / "mtp_heads.json"
FAMILIES = ("qwen3_5_moe", "deepseek_v3", "glm4_moe")
ROWS = 12
KEPT = 12  # logits of a row in the golden file

Weights = dict[str, np.ndarray]


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [1, ROWS, D] and tokens [1, ROWS] that every test of parity uses."""
    rng = np.random.default_rng(11)
    hidden = rng.standard_normal((1, ROWS, config["hidden_size"])).astype(np.float32)
    return hidden, rng.integers(0, config["vocab_size"], (1, ROWS))


@torch.no_grad()
def logits(
    family: str, config: dict[str, Any], head: Weights, trunk: Weights, steps: int = 1
) -> list[np.ndarray]:
    """Logits [ROWS, V] of `steps` recursive steps of the head.

    config: the text model's; head: by original name; trunk: 'embed' and 'lm_head', [V, D].
    Every step attends to its own rows only.
    """
    make = {"qwen3_5_moe": _qwen, "deepseek_v3": _deepseek, "glm4_moe": _glm}[family]
    embed_norm, hidden_norm, join, layer, norm, rotary = make(config, head)
    hidden, tokens = (torch.from_numpy(a) for a in inputs(config))
    embedding, lm_head = torch.from_numpy(trunk["embed"]), torch.from_numpy(trunk["lm_head"])
    rows = torch.arange(ROWS)[None]
    mask = torch.full((ROWS, ROWS), float("-inf")).triu(1)[None, None]
    out, state = [], hidden
    for _ in range(steps):
        x = join(torch.cat([embed_norm(embedding[tokens]), hidden_norm(state)], dim=-1))
        positions = rows.expand(3, 1, -1) if family == "qwen3_5_moe" else rows
        x = layer(x, position_embeddings=rotary(x, positions), attention_mask=mask)
        state = norm(x[0] if isinstance(x, tuple) else x)
        out.append((state @ lm_head.T)[0].numpy())
    return out


def _qwen(config: dict[str, Any], head: Weights) -> tuple[nn.Module, ...]:
    torch_config = Qwen3_5MoeTextConfig(**config, attn_implementation="eager")
    layer = qwen.Qwen3_5MoeDecoderLayer(torch_config, config["full_attention_interval"] - 1)
    rotary = qwen.Qwen3_5MoeTextRotaryEmbedding(torch_config)
    named = {
        "embed": "mtp.pre_fc_norm_embedding.",
        "hidden": "mtp.pre_fc_norm_hidden.",
        "join": "mtp.fc.",
        "norm": "mtp.norm.",
        "layer": "mtp.layers.0.",
    }
    return _filled(qwen.Qwen3_5MoeRMSNorm, config, layer, rotary, named, head)


def _deepseek(config: dict[str, Any], head: Weights) -> tuple[nn.Module, ...]:
    torch_config = DeepseekV3Config(**config, attn_implementation="eager")
    layer = deepseek.DeepseekV3DecoderLayer(torch_config, config["num_hidden_layers"])
    rotary = deepseek.DeepseekV3RotaryEmbedding(torch_config)
    norm = deepseek.DeepseekV3RMSNorm
    return _filled(norm, config, layer, rotary, _appended(config), head)


def _glm(config: dict[str, Any], head: Weights) -> tuple[nn.Module, ...]:
    torch_config = Glm4MoeConfig(**config, attn_implementation="eager")
    layer = glm.Glm4MoeDecoderLayer(torch_config, config["num_hidden_layers"])
    rotary = glm.Glm4MoeRotaryEmbedding(torch_config)
    return _filled(glm.Glm4MoeRMSNorm, config, layer, rotary, _appended(config), head)


def _appended(config: dict[str, Any]) -> dict[str, str]:
    prefix = f"model.layers.{config['num_hidden_layers']}."
    return {
        "embed": f"{prefix}enorm.",
        "hidden": f"{prefix}hnorm.",
        "join": f"{prefix}eh_proj.",
        "norm": f"{prefix}shared_head.norm.",
        "layer": prefix,
    }


def _filled(
    norm_class: type[nn.Module],
    config: dict[str, Any],
    layer: nn.Module,
    rotary: nn.Module,
    named: dict[str, str],
    head: Weights,
) -> tuple[nn.Module, ...]:
    width = config["hidden_size"]
    norms = [norm_class(width, eps=config["rms_norm_eps"]) for _ in range(3)]
    join = nn.Linear(2 * width, width, bias=False)
    for module, key in zip((*norms, join), ("embed", "hidden", "norm", "join"), strict=True):
        weight = torch.from_numpy(head[f"{named[key]}weight"])
        module.load_state_dict({"weight": weight})
    layer.load_state_dict(_layer(layer, named["layer"], head))
    layer.eval()
    return norms[0], norms[1], join, layer, norms[2], rotary


def _layer(layer: nn.Module, prefix: str, head: Weights) -> dict[str, Tensor]:
    """The layer's state by transformers' names, which keep all experts in two tensors."""
    state: dict[str, Tensor] = {}
    for name in layer.state_dict():
        if name.endswith("experts.gate_up_proj") and prefix + name not in head:
            state[name] = _experts(prefix, head, "gate_proj", "up_proj")
        elif name.endswith("experts.down_proj") and prefix + name not in head:
            state[name] = _experts(prefix, head, "down_proj")
        else:
            state[name] = torch.from_numpy(head[prefix + name])
    return state


def _experts(prefix: str, head: Weights, *projections: str) -> Tensor:
    found = []
    while f"{prefix}mlp.experts.{len(found)}.{projections[0]}.weight" in head:
        base = f"{prefix}mlp.experts.{len(found)}"
        parts = [torch.from_numpy(head[f"{base}.{p}.weight"]) for p in projections]
        found.append(torch.cat(parts))
    return torch.stack(found)


@torch.no_grad()
def whole(path: Path, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits of transformers' trunk [T, V] and of two steps of its MtpModel [T - 1, V].

    path: a checkpoint by the original names; tokens: [1, T]. The second step takes
    the first one's output. Raises ImportError where transformers has none.
    """
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    main = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # transformers knows the published models' layer numbers only
    first = main.config.num_hidden_layers
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first}\."]
    mtp = MtpModel.from_pretrained(main).eval()
    ids = torch.from_numpy(tokens)
    out = main(ids, output_hidden_states=-1, use_cache=False)
    state, logits = out.hidden_states[-1][:, :-1], [out.logits[0].numpy()]
    rows = torch.arange(ids.shape[1] - 1)[None]
    for _ in range(2):
        cache = MtpCache(config=main.config.get_mtp_config())
        state = mtp.forward_layer(0, state, rows, cache, input_ids=ids[:, 1:])
        logits.append(mtp._project_to_logits(state)[0].numpy())
    return logits


@torch.no_grad()
def assisted(
    target: Path,
    assistant: Path,
    tokens: np.ndarray,
    given: tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three drafts of transformers' Gemma 4 assistant after tokens [1, T]: logits [V], states [D].

    target, assistant: checkpoints by the original names. The target runs all tokens but
    the last. given: another target's last state [1, 1, D], and its keys and values
    [1, H, N, D] by type of layer; None: this one's, all there are up to the window less 1.
    """
    from transformers import Gemma4AssistantForCausalLM, Gemma4TextConfig

    sharing = Gemma4TextConfig.kv_sharing_modes
    try:  # 5.23 refuses a model all of whose layers share
        everything = property(
            lambda c: (
                ["reuse"] * c.num_hidden_layers
                if c.num_kv_shared_layers == c.num_hidden_layers
                else sharing.fget(c)
            )
        )
        Gemma4TextConfig.kv_sharing_modes = everything
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        main = AutoModelForCausalLM.from_pretrained(target, **options).eval()
        drafter = Gemma4AssistantForCausalLM.from_pretrained(assistant, **options).eval()
    finally:
        Gemma4TextConfig.kv_sharing_modes = sharing
    ids = torch.from_numpy(tokens)
    out = main(ids[:, :-1], output_hidden_states=True, use_cache=True)
    kinds = main.config.layer_types
    layers = zip(kinds, out.past_key_values.layers, strict=True)
    shared = {kind: (layer.keys, layer.values) for kind, layer in layers}
    state, token, drafts = out.hidden_states[-1][:, -1:], ids[:, -1:], []
    if given is not None:
        state = torch.from_numpy(given[0])
        shared = {k: (torch.from_numpy(a), torch.from_numpy(b)) for k, (a, b) in given[1].items()}
    for _ in range(3):
        made = drafter(
            inputs_embeds=torch.cat([main.get_input_embeddings()(token), state], dim=-1),
            position_ids=torch.tensor([[ids.shape[1] - 1]]),
            shared_kv_states=shared,
        )
        token, state = made.logits.argmax(-1), made.last_hidden_state
        drafts.append((made.logits[0, 0].numpy(), state[0, 0].numpy()))
    return drafts


def main() -> None:
    from test_mtp_heads import reference_case  # the same weights as the test's

    golden = {f: [a[:, :KEPT].tolist() for a in logits(*reference_case(f), 2)] for f in FAMILIES}
    rounded = json.loads(json.dumps(golden), parse_float=lambda text: round(float(text), 6))
    GOLDEN.write_text(json.dumps(rounded) + "\n")
    print(f"wrote {GOLDEN.name}, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
