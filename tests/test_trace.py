"""What a traced array says of its bytes, against the bytes themselves."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.checkpoint import Checkpoint
from streamer.trace import FILE_SHIFT, Source, plain, source_of, tracing

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("traced")
    rng = np.random.default_rng(0)
    for shard in ("model-1", "model-2"):
        names = [f"{shard}.{i}" for i in range(3)]
        arrays = {n: mx.array(rng.integers(0, 1 << 30, (4, 6, 8)).astype(np.int32)) for n in names}
        mx.save_safetensors(str(folder / f"{shard}.safetensors"), arrays)
    (folder / "config.json").write_text('{"model_type": "none"}')
    return Checkpoint.open(folder)


def read(checkpoint: Checkpoint, source: Source) -> np.ndarray:
    """The bytes that a source names, as int32 of the source's shape."""
    blobs = [p.read_bytes() for p in checkpoint.files]
    out = []
    for address in source.starts.reshape(-1).tolist():
        at = address & ((1 << FILE_SHIFT) - 1)
        out.append(blobs[address >> FILE_SHIFT][at : at + source.block_bytes])
    return np.frombuffer(b"".join(out), np.int32).reshape(source.shape)


STEPS = st.one_of(
    st.tuples(st.just("slice"), st.integers(0, 2), st.integers(0, 2), st.integers(1, 4)),
    st.tuples(st.just("index"), st.integers(0, 1), st.just(0), st.just(0)),
    st.tuples(st.just("step"), st.integers(0, 2), st.integers(0, 1), st.just(2)),
    st.tuples(st.just("stack"), st.integers(0, 1), st.just(0), st.just(0)),
    st.tuples(st.just("concatenate"), st.integers(0, 1), st.just(0), st.just(0)),
    st.tuples(st.just("split"), st.integers(0, 2), st.just(0), st.just(0)),
    st.tuples(st.just("reshape"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("contiguous"), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=5))
def test_any_chain_of_operations(checkpoint: Checkpoint, steps: list) -> None:
    with tracing(checkpoint):
        loaded: dict = {}
        for path in checkpoint.files:
            loaded |= mx.load(str(path))
        a, b = loaded["model-1.0"], loaded["model-2.2"]
        for what, axis, low, high in steps:
            if axis >= a.ndim or min(a.shape) < 2 or a.ndim > 5:
                break
            index = [slice(None)] * axis
            if what == "slice":
                a, b = (x[(*index, slice(low, low + high))] for x in (a, b))
            elif what == "index":
                a, b = (x[(*index, 1)] for x in (a, b))
            elif what == "step":
                a, b = (x[(*index, slice(low, None, high))] for x in (a, b))
            elif what == "stack":
                a, b = mx.stack([a, b], axis), mx.stack([b, a], axis)
            elif what == "concatenate":
                a, b = mx.concatenate([a, b], axis), mx.concatenate([b, a], axis)
            elif what == "split":
                a, b = (mx.split(x, [1], axis)[1] for x in (a, b))
            elif what == "reshape":
                a, b = (x.reshape(*x.shape[:-1], 1, x.shape[-1]) for x in (a, b))
            else:
                a, b = mx.contiguous(a), mx.contiguous(b)
    for x in (a, b):
        source = source_of(x)
        if source is None:  # losing the trail is allowed, a wrong trail is not
            continue
        assert source.shape == x.shape
        np.testing.assert_array_equal(read(checkpoint, source), np.array(plain(x)))


def test_common_layouts_keep_their_source(checkpoint: Checkpoint) -> None:
    with tracing(checkpoint):
        w = mx.load(str(checkpoint.files[0]))
        stacked = mx.stack([w["model-1.0"], w["model-1.1"]])
        fused = w["model-1.2"][..., 3:, :]
        computed = w["model-1.0"] + 1
        moved = w["model-1.0"].swapaxes(-1, -2)
    stacked_source, fused_source = source_of(stacked), source_of(fused)
    assert stacked_source is not None and stacked_source.starts.shape == (2,)
    assert fused_source is not None and fused_source.block_bytes == 3 * 8 * 4
    assert source_of(computed) is None and source_of(moved) is None


def test_mlx_is_left_as_it_was(checkpoint: Checkpoint) -> None:
    before = (mx.load, mx.stack, mx.split)
    with pytest.raises(RuntimeError), tracing(checkpoint):
        raise RuntimeError
    assert (mx.load, mx.stack, mx.split) == before
