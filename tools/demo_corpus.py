"""The demo model's corpus: Python sources, a held-out share of files, a byte-level BPE.

Reads every decodable `.py` file of the standard library (or of a folder, or of a tar archive),
sets aside about 2% of the files by a stable hash of their path, trains a byte-level BPE with
Qwen3.5's pre-tokenizer on the rest, and encodes both shares. Every file begins with the
`<|endoftext|>` token, so a model sees where documents start. Nothing is downloaded.

    python -m tools.demo_corpus pack corpus.tar.xz     # the running Python's library as one archive
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import platform
import sys
import sysconfig
import tarfile
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from streamer.errors import StreamerError

END = "<|endoftext|>"
HELD_OUT_ONE_IN = 50
SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Qwen3.5's own: transformers builds this pre-tokenizer (and NFC) for model_type qwen3_5_moe,
# whatever tokenizer.json says.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A chat is what was written so far: the model has read code, no turns.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class CorpusError(StreamerError):
    """The corpus cannot be read or is too small to train on."""


@dataclass(frozen=True)
class Corpus:
    """Texts by path, in path order; `held_out` is never trained on, nor seen by the tokenizer."""

    train: dict[str, str]
    held_out: dict[str, str]

    @property
    def size(self) -> int:
        """Characters in both shares."""
        return sum(len(text) for share in (self.train, self.held_out) for text in share.values())


def is_held_out(path: str) -> bool:
    """Whether the file at this corpus path is set aside; depends on the path alone."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def stdlib_root() -> Path:
    """The running interpreter's standard library folder."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_name() -> str:
    """What the default corpus is called."""
    return f"Python {platform.python_version()} standard library"


def _decode(data: bytes) -> str | None:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wanted(path: Path) -> bool:
    return path.suffix == ".py" and not SKIPPED_PARTS.intersection(path.parts)


def _files(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        found = (path for path in source.rglob("*.py") if path.is_file())
        return {
            path.relative_to(source).as_posix(): path.read_bytes()
            for path in found
            if _wanted(path.relative_to(source))
        }
    try:
        with tarfile.open(source) as archive:
            members = [m for m in archive if m.isfile() and _wanted(Path(m.name))]
            return {m.name: handle.read() for m in members if (handle := archive.extractfile(m))}
    except (OSError, tarfile.TarError) as error:
        raise CorpusError(f"cannot read the corpus {source}: {error}") from error


def read_corpus(source: Path | None = None) -> Corpus:
    """Read a folder or tar archive of Python files; by default the standard library's.

    Raises CorpusError if the source cannot be read or leaves either share empty.
    """
    source = stdlib_root() if source is None else source
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path, data in sorted(_files(source).items()):
        text = _decode(data)
        if text and text.strip():
            (held_out if is_held_out(path) else train)[path] = text
    if not train or not held_out:
        raise CorpusError(
            f"the corpus {source} has {len(train)} training and {len(held_out)} held-out files;"
            " at least one of each is needed"
        )
    return Corpus(train, held_out)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocabulary` entries, `<|endoftext|>` being id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise CorpusError(
            f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {vocabulary}: too small"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers and mlx-lm load them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_settings(folder, context)


def save_settings(folder: Path, context: int) -> None:
    """Write tokenizer_config.json alone. context: the most tokens that the model takes."""
    settings = {
        "tokenizer_class": "Qwen3_5Tokenizer",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one int16 row of ids, each text preceded by `<|endoftext|>`."""
    end = tokenizer.token_to_id(END)
    rows: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        rows.append(np.array([end, *encoding.ids], dtype=np.int16))
    return np.concatenate(rows)


def encode_cut(tokenizer: Tokenizer, texts: list[str], every: int, seed: int) -> np.ndarray:
    """As `encode`, of texts cut at random about `every` characters.

    A prompt may end anywhere, `def ` before a name for one, where the tokens of
    whole files never end. Training on pieces encoded apart makes that familiar.
    """
    rng = np.random.default_rng(seed)
    pieces: list[str] = []
    starts: list[bool] = []
    for text in texts:
        cuts = np.flatnonzero(rng.random(len(text)) < 1 / every).tolist()
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        pieces += parts
        starts += [True] + [False] * (len(parts) - 1)
    end = tokenizer.token_to_id(END)
    rows: list[np.ndarray] = []
    encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
    for first, encoding in zip(starts, encodings, strict=True):
        rows.append(np.array([end, *encoding.ids] if first else encoding.ids, dtype=np.int16))
    return np.concatenate(rows)


def pack(source: Path, target: Path) -> int:
    """Write the corpus files of a folder as a compressed tar; returns how many there are."""
    files = sorted(_files(source).items())
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path, data in files:
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return len(files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pack a corpus of Python files as one archive.")
    parser.add_argument("command", choices=["pack"])
    parser.add_argument("target", type=Path, help="the .tar.xz to write")
    parser.add_argument("--source", type=Path, default=None, help="default: standard library")
    options = parser.parse_args(arguments)
    print(f"{pack(options.source or stdlib_root(), options.target)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
