"""Record what transformers generates from the demo package's weights, for tests without torch.

The package is multiplied out to float32 (`tools.dequantize`) and transformers' own modelling code
continues each prompt greedily. A prompt whose choice is ever close is refused: another machine's
rounding could turn it. `--check` makes the same run and compares it with what is recorded.

    python -m tools.golden
    python -m tools.golden --check
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from streamer.console import write_json
from streamer.errors import StreamerError
from tools.dequantize import dequantize
from tools.reference import PROMPTS, TOKENS, greedy, load_reference

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamer" / "demo"
GOLDEN = ROOT / "tests" / "golden" / "demo_greedy.json"
MARGIN = 1e-3


class GoldenError(StreamerError):
    """Recorded tokens that are unsafe to record, or that a live run does not give."""


def fingerprint(package: Path) -> str:
    """SHA-256 of the package's weights, in hexadecimal digits."""
    return hashlib.sha256((package / "model.safetensors").read_bytes()).hexdigest()


def run(package: Path) -> dict[str, Any]:
    """Greedy tokens by prompt, and which weights they belong to.

    Raises GoldenError when the best two logits of any step are within MARGIN.
    """
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        dequantize(package, dense)
        model = load_reference(dense)
    found: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        greedily = greedy(model, ids, TOKENS)
        if greedily.margin < MARGIN:
            raise GoldenError(
                f"after {prompt!r} two logits are within {greedily.margin:.1e}: choose another"
            )
        entry = {"prompt": prompt, "ids": ids, "tokens": greedily.tokens}
        found.append(entry | {"text": tokenizer.decode(greedily.tokens)})
    return {"weights_sha256": fingerprint(package), "runs": found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record transformers' greedy tokens.")
    parser.add_argument("--package", type=Path, default=PACKAGE)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    try:
        found = run(options.package)
        if options.check:
            if found != json.loads(options.out.read_text()):
                raise GoldenError(f"{options.out} records other tokens than transformers gives")
            return 0
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, found)
    except StreamerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in found["runs"]:
        print(entry["prompt"] + entry["text"], end="\n---\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
