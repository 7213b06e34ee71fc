"""Train the demo model: a small Qwen3.5-MoE with an MTP head, on Python sources.

Writes a checkpoint under Hugging Face names (`--out`): sharded safetensors, config.json, the
tokenizer and training.json. `export` turns it into the quantized package that mlx-lm loads.
Nothing is downloaded. `--minutes` is a wall-clock limit that includes set-up, evaluation and
saving; the checkpoint with the lowest held-out loss is the one kept.

    python -m tools.train_demo --out raw --steps 30
    python -m tools.train_demo --out raw --minutes 20
    python -m tools.train_demo export --raw raw --out demo
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from streamer.errors import StreamerError


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Train the demo model on Python sources.")
    result.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    limit = result.add_mutually_exclusive_group(required=True)
    limit.add_argument("--minutes", type=float, default=0.0, help="wall-clock limit, all included")
    limit.add_argument("--steps", type=int, default=0)
    result.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    result.add_argument("--corpus", type=Path, help="folder or tar; default: standard library")
    result.add_argument("--resume", type=Path, help="checkpoint folder whose weights to start from")
    result.add_argument("--context", type=int, default=0, help="default: 1024 on CUDA, else 256")
    result.add_argument("--batch", type=int, default=0, help="default: 32 on CUDA, else 8")
    result.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    result.add_argument("--dropout", type=float, default=0.0)
    result.add_argument("--mtp-weight", type=float, default=0.3)
    result.add_argument("--recursion", type=float, default=0.0, help="second head step's weight")
    result.add_argument("--cut", type=int, default=60, help="train also on texts cut about here")
    result.add_argument("--vocabulary", type=int, default=2048)
    result.add_argument("--hidden", type=int, default=256)
    result.add_argument("--layers", type=int, default=8)
    result.add_argument("--experts", type=int, default=40)
    result.add_argument("--intermediate", type=int, default=64)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--compile", action="store_true", help="try torch.compile, keep if faster")
    return result


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["export"]:
            from tools import demo_export

            return demo_export.main(arguments[1:])
        defaults = parser()
        options = defaults.parse_args(arguments)
        changed = {k: v for k, v in vars(options).items() if v != defaults.get_default(k)}
        # Imported here because torch takes seconds to import, and the clock must see them.
        from tools.demo_training import Training

        training = Training(options, changed, started)

        def stop(*_: Any) -> None:
            training.stopped = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        training.run()
    except StreamerError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.out} after {training.elapsed():.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
