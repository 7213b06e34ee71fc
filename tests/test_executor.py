"""The layer-wise executor: bits, reads, what prefill keeps, and refilled slots."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import make_tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from streamer.errors import StreamerError
from streamer.experts import is_switch, stored_bytes
from streamer.loading import load_streamed
from streamer.prefill import batch_of
from streamer.store import Store

TOKENS = np.random.default_rng(3).integers(0, 250, 400)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), layout="hf")


def run(model: Any, rows: list[int]) -> list[mx.array]:
    cache, out, at = make_prompt_cache(model), [], 0
    for n in rows:
        out.append(model(mx.array(TOKENS[at : at + n])[None], cache=cache))
        mx.eval(out[-1])
        at += n
    return out


@pytest.mark.smoke
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_bits_do_not_depend_on_what_is_resident(tiny: Path, share: float) -> None:
    rows = [1, 1, 4, 120, 1, 2, 30, 1, 1]
    expected = run(load_model(tiny)[0], rows)
    model = load_streamed(tiny, slots=int(share * 32))
    for want, got in zip(expected, run(model, rows), strict=True):
        assert mx.array_equal(want, got)


def test_a_prefill_chunk_reads_each_expert_at_most_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_streamed(tiny, slots=8)
    streamer = model.streamer
    asked: list[tuple[int, int]] = []
    read = Store.read

    def note(self: Store, pieces: Any, *rest: Any) -> Any:
        asked.extend((p.file, p.offset) for p in pieces)
        return read(self, pieces, *rest)

    monkeypatch.setattr(Store, "read", note)
    run(model, [300])
    assert len(asked) == len(set(asked)) > 0
    size = stored_bytes(streamer.opened.layers[0].format)
    assert streamer.counters.bytes_wanted == streamer.counters.misses * size
    assert streamer.counters.misses <= streamer.total


@pytest.mark.parametrize("slots", [8, 20, 32])
def test_a_long_prompts_pairs_go_in_parts(
    tiny: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts absent, with all of a layer there, and with no experts missed."""
    rows = [70, 70, 3]
    want = run(load_streamed(tiny, slots=slots), rows)
    monkeypatch.setattr("streamer.prefill.MAX_PAIRS", 16)
    for expected, got in zip(want, run(load_streamed(tiny, slots=slots), rows), strict=True):
        assert mx.array_equal(expected, got)


def test_prefill_keeps_what_decoding_uses(tiny: Path) -> None:
    model = load_streamed(tiny, slots=16)
    pool = model.streamer.executors[0].pool
    run(model, [1] * 30)
    before = set(pool.victims())
    assert not pool.free  # decoding filled it
    run(model, [300])
    batch = batch_of(model.streamer.executors[0].pool)
    kept = set(pool.victims())
    assert len(kept) >= len(before) - 2 * batch
    assert kept <= before


def test_a_cold_prefill_leaves_a_share_of_every_layer(tiny: Path) -> None:
    model = load_streamed(tiny, slots=20)
    run(model, [300])
    pool = model.streamer.executors[0].pool
    assert all(n > 0 for n in pool.resident)
    assert max(pool.resident) <= pool.slots // len(pool.resident)


def test_slots_are_not_refilled_under_a_pending_pass(tiny: Path) -> None:
    """Two sequences whose logits are asked for only at the end."""
    reference, model = load_model(tiny)[0], load_streamed(tiny, slots=0)
    lazy = [model(mx.array(TOKENS[i : i + 3])[None]) for i in range(0, 60, 3)]
    for i, got in zip(range(0, 60, 3), lazy, strict=True):
        assert mx.array_equal(got, reference(mx.array(TOKENS[i : i + 3])[None]))


def test_with_all_experts_resident_the_switches_are_mlx_lms_own(tiny: Path) -> None:
    model = load_streamed(tiny)
    run(model, [50, 1, 1])
    assert model.streamer.resident and model.streamer.counters.syncs == 0
    switches = [m for m in model.modules() if is_switch(m)]
    assert len(switches) == len(model.streamer.opened.layers)
    (arrays,) = (e.arrays for e in model.streamer.executors)
    arrays.rows[0][:] = 0  # the first tensor of every expert, in the pool
    for switch in switches:
        first = dict(tree_flatten(switch.parameters()))
        name = f"{arrays.format[0].projection}.{arrays.format[0].kind}"
        assert not first[name].any(), "a copy of the pool"


def test_covered_layers_are_counted_and_stay_recent(tiny: Path) -> None:
    model = load_streamed(tiny, slots=31)
    run(model, [1] * 40)
    counters = model.streamer.counters
    executor = model.streamer.executors[0]
    executor.settle()
    layers = len(model.streamer.opened.layers)
    assert counters.hits + counters.misses == 40 * layers * model.streamer.opened.top_k
    assert counters.syncs < 40 * layers


def test_a_failed_read_is_an_error_and_not_an_expert(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_streamed(tiny, slots=0)
    run(model, [1])

    def broken(*_: Any) -> Any:
        raise StreamerError("the disk is gone")

    monkeypatch.setattr(Store, "read", broken)
    with pytest.raises(StreamerError, match="disk is gone"):
        run(model, [1, 1, 1])
    monkeypatch.undo()
    reference = load_model(tiny)[0]
    for want, got in zip(run(reference, [5, 1]), run(model, [5, 1]), strict=True):
        assert mx.array_equal(want, got)
