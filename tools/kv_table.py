"""Tables of the compressed KV cache: distortion at equal bytes, and quality on the demo.

Distortion: relative error of keys (mean squared, after what a codec stores) and the divergence of
attention (KL, nats) over 512 keys, for ours, the paper's Lloyd-Max with and without QJL, and
mlx-lm's group quantization. Bytes count scales, biases, and means over 8192
tokens. Codecs store different numbers of bits for a nominal width, so next to each figure stands
what it comes to at our bits, at the 6.02 dB a bit that all of them gain. Keys of the demo
are those of held-out files, after RoPE.

    python -m tools.kv_table distortion
    python -m tools.kv_table quality --windows 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from cache import reference
from cache.attention import install
from cache.choose import choose, measure
from cache.codec import Codec
from cache.make import kinds_of, make_cache
from tools import demo_corpus

DEMO = Path(__file__).parents[1] / "streamer" / "demo"
GROUP = 64
SEEN = 256  # tokens that spread is measured over
CONTEXT = 8192  # tokens that the bytes of a mean are spread over
Decoder = Callable[[mx.array], mx.array]


def codecs(dimension: int, bits: float) -> list[tuple[str, float, Decoder]]:
    """(name, stored bits per channel, codec) of all that have a width near `bits`."""
    ours = Codec.of(dimension, bits)

    def centred(x: mx.array) -> mx.array:
        mean = mx.mean(x[..., :64, :], axis=-2, keepdims=True)
        return ours.decode(ours.encode(x - mean)) + mean

    made: list[tuple[str, float, Decoder]] = [
        ("ours", 8 * ours.row_bytes / dimension + 32 / CONTEXT, centred),
        (
            "Lloyd-Max",
            reference.stored_bits(dimension, bits),
            lambda x: reference.decode(x, bits),
        ),
    ]
    if bits < 8:
        made.append(
            (
                "Lloyd-Max + QJL",
                reference.stored_bits(dimension, bits, qjl=True),
                lambda x: reference.decode_qjl(x, bits),
            )
        )
    if bits == int(bits):
        whole = int(bits)
        made.append(("mlx-lm", bits + 32 / GROUP, lambda x: _grouped(x, whole)))
    return made


def _grouped(x: mx.array, bits: int) -> mx.array:
    # float16 scales, as a cache of a float16 model has; float32 ones would cost twice
    quantized = mx.quantize(x.astype(mx.float16), group_size=GROUP, bits=bits)
    return mx.dequantize(*quantized, group_size=GROUP, bits=bits).astype(mx.float32)


def vectors(kind: str, dimension: int, seed: int = 3) -> tuple[mx.array, mx.array]:
    """Queries [64, D] and keys [8, 512, D] whose scores spread by about two nats."""
    random = np.random.default_rng(seed)
    k = random.standard_normal((8, 512, dimension)).astype(np.float32)
    if kind == "outliers":
        channels = random.choice(dimension, 4, replace=False)
        k[..., channels] *= 8
        k += 2 * random.standard_normal(dimension).astype(np.float32)
    else:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q = random.standard_normal((64, dimension)).astype(np.float32)
    q *= 2 / (q @ k.reshape(-1, dimension).T).std()
    return mx.array(q), mx.array(k)


def divergence(q: mx.array, k: mx.array, coded: mx.array) -> float:
    """KL of attention over coded keys from that over true ones, nats."""
    p = q @ k.swapaxes(-1, -2)
    r = q @ coded.swapaxes(-1, -2)
    p = p - mx.logsumexp(p, axis=-1, keepdims=True)
    r = r - mx.logsumexp(r, axis=-1, keepdims=True)
    return float(mx.mean(mx.sum(mx.exp(p) * (p - r), axis=-1)))


class _Recorder(KVCache):
    """Keeps what attention read, for `real`."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.seen = super().update_and_fetch(keys, values)
        return self, self

    def attend(self, q: mx.array, scale: float, mask: Any, sinks: Any = None) -> mx.array:
        self.queries = q * scale
        return mx.fast.scaled_dot_product_attention(q, *self.seen, scale=scale, mask=mask)


def held_out(context: int, windows: int) -> list[list[int]]:
    """Windows of ids of the demo's held-out files."""
    _, tokenizer = load(str(DEMO))
    texts = demo_corpus.read_corpus().held_out
    found: list[list[int]] = []
    for text in texts.values():
        ids = list(tokenizer.encode(text[: 40 * context]))
        if len(ids) > context:
            found.append(ids[: context + 1])
        if len(found) == windows:
            break
    return found


def real(what: str) -> tuple[mx.array, mx.array]:
    """Queries and keys, or values in the keys' place, of the demo's last attention layer."""
    model, _ = load(str(DEMO))
    cache = make_prompt_cache(model)
    at = [i for i, kind in enumerate(kinds_of(model, cache)) if kind][-1]
    cache[at] = recorder = _Recorder()
    install()
    (ids,) = held_out(576, 1)
    mx.eval(model(mx.array(ids)[None], cache=cache))
    keys, values = recorder.seen
    heads = keys.shape[1]
    q = recorder.queries[0].reshape(heads, -1, *recorder.queries.shape[2:])[:, 0, -64:]
    return q, (keys if what == "demo keys" else values)[0]


def distortion(widths: list[float]) -> None:
    """Print the first table."""
    print("vectors    bits codec            stored  error    at ours  KL       at ours")
    for kind in ("unit", "outliers", "demo keys", "demo values"):
        q, x = real(kind) if kind.startswith("demo") else vectors(kind, 128)
        for bits in widths:
            base = 0.0
            for name, stored, decode in codecs(x.shape[-1], bits):
                base = base or stored
                coded = decode(x)
                error = float(mx.mean((coded - x) ** 2) / mx.mean(x * x))
                kl = divergence(q, x, coded)
                fair = 4.0 ** (stored - base)
                print(
                    f"{kind:11}{bits:4} {name:16} {stored:6.3f}  {error:.2e} {error * fair:.2e}"
                    f" {kl:.2e} {kl * fair:.2e}",
                    flush=True,
                )


def quality(widths: list[float], context: int, windows: int, step: int) -> None:
    """Print the second table: teacher-forced in passes of `step` rows, so that codes are read."""
    model, _ = load(str(DEMO))
    ids = held_out(context, windows)

    def logits(make: Callable[[], list[Any]]) -> tuple[float, list[np.ndarray]]:
        loss, tops = 0.0, []
        for window in ids:
            cache = make()
            row = mx.array(window)[None]
            parts = []
            for at in range(0, context, step):
                parts.append(model(row[:, at : min(at + step, context)], cache=cache))
                mx.eval(parts[-1])
            out = mx.concatenate(parts, 1)[0]
            chosen = mx.take_along_axis(out, row[0, 1:, None], -1)[:, 0]
            loss += float(mx.mean(mx.logsumexp(out, -1) - chosen)) / len(ids)
            tops.append(np.array(mx.argmax(out, -1)))
        return loss, tops

    def grouped(bits: int) -> list[Any]:
        cache = make_prompt_cache(model)
        return [QuantizedKVCache(GROUP, bits) if type(c) is KVCache else c for c in cache]

    spread = measure(model, ids[0][:SEEN])
    print("spread", [None if s is None else round(s, 2) for s in spread])
    full, best = logits(lambda: make_prompt_cache(model))
    print(f"{len(ids)} windows of {context} tokens, full precision: loss {full:.4f}")
    for bits in widths:
        rows = [("ours", lambda b=bits: make_cache(model, b, b))]
        if bits <= 4:
            chosen = choose(spread, bits)
            rows.append(("by layer", lambda c=chosen: make_cache(model, layers=c)))
        if bits == int(bits):
            rows.append(("mlx-lm", lambda b=int(bits): grouped(b)))
        for name, make in rows:
            loss, tops = logits(make)
            same = np.mean([np.mean(a == b) for a, b in zip(tops, best, strict=True)])
            print(
                f"{bits:4} {name:8} loss {loss:.4f} ({loss / full - 1:+.2%}) top-1 {same:.1%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["distortion", "quality"])
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 2.5, 3, 3.5, 4, 8])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--step", type=int, default=8)
    args = parser.parse_args()
    if args.table == "distortion":
        distortion(args.bits)
    else:
        quality(args.bits, args.context, args.windows, args.step)


if __name__ == "__main__":
    main()
