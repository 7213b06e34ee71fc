"""A byte-level BPE tokenizer of 320 tokens that any text passes through unharmed.

Byte-level, because transformers picks the tokenizer class by the model type
and drops a word-level model silently.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .parts import VOCABULARY

END = "<|endoftext|>"

_SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
_TEXT = "the quick brown fox jumps over the lazy dog; def main(self): return self.value\n"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    return tokenizer.to_str()


def write_tokenizer(path: Path) -> int:
    """Write `tokenizer.json` and its config into `path`; return the end token's id."""
    text = _tokenizer_json()
    (path / "tokenizer.json").write_text(text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return _SPECIAL.index(END)  # special tokens come first
