"""Files of ours and of others that were damaged anyhow: read, or refused with a sentence.

Each starts from a good file, and changes bytes of it, or values in its JSON.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache

from cache import prompt_file
from cache.prompt_file import Prefix, PromptCacheError
from streamer import plan
from streamer.budget import divide
from streamer.checkpoint import INDEX, Checkpoint
from streamer.errors import StreamerError
from streamer.heat import FORMAT, VERSION, Heat
from streamer.journal import NAME, Journal
from streamer.opened import open_model
from streamer.routes import Call, Group, Pass, Routes, RoutesError
from streamer.shards import Spec

JOB = {"source": "a"}
BELONGS = {"model": "a"}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([[], {}, [[]], [0], {"a": 1}, "", -1, 0, 1e308, "../x", "\x00", "\ud800"]),
)
Change = tuple[float, str, bytes]  # where in the file, what is done, with what
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["replace", "insert", "delete", "cut", "double"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def fuzz(examples: int) -> Callable[[Any], Any]:
    """The same examples every time, so that a run tells of the change under test."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def changed(data: bytes, changes: list[Change]) -> bytes:
    for where, what, more in changes:
        at = int(where * len(data))
        rest = data[at:]
        if what == "cut":
            rest = b""
        elif what == "double":
            rest = data[:at] + rest
        elif what == "insert":
            rest = more + rest
        else:
            rest = (more if what == "replace" else b"") + rest[len(more) :]
        data = data[:at] + rest
    return data


def places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document."""
    keys: Any = ()
    if isinstance(document, dict):
        keys = list(document)
    elif isinstance(document, list):
        keys = range(len(document))
    return [pair for k in keys for pair in [(document, k), *places(document[k])]]


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """`document` with up to three of its values gone or something else."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(document)):
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        if draw(st.booleans()) and isinstance(container, dict):
            del container[key]
        else:
            container[key] = copy.deepcopy(draw(ODD))  # which is changed in its turn
    return document


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files need not survive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "m", shards=2)


@pytest.fixture(scope="module")
def config(tiny: Path) -> Any:
    return json.loads((tiny / "config.json").read_text())


# Checkpoints


@fuzz(60)
@given(data=st.data())
def test_configurations(tiny: Path, config: Any, tmp_path: Path, data: st.DataObject) -> None:
    model = shutil.copytree(tiny, tmp_path / "m", dirs_exist_ok=True)
    (model / "config.json").write_text(json.dumps(data.draw(altered(config))))
    try:
        divide(open_model(model), "1GB", 100)
    except StreamerError as error:
        assert len(str(error).splitlines()) == 1


@fuzz(100)
@given(data=st.data())
def test_indices(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    model = shutil.copytree(tiny, tmp_path / "m", dirs_exist_ok=True)
    index = json.loads((tiny / INDEX).read_text())
    (model / INDEX).write_text(json.dumps(data.draw(altered(index))))
    try:
        Checkpoint.open(model)
    except StreamerError as error:
        assert len(str(error).splitlines()) == 1


@fuzz(100)
@given(name=st.sampled_from(["config.json", INDEX, "shard"]), changes=CHANGES)
def test_damaged_files(tiny: Path, tmp_path: Path, name: str, changes: list[Change]) -> None:
    model = shutil.copytree(tiny, tmp_path / "m", dirs_exist_ok=True)
    file = next(model.glob("*.safetensors")) if name == "shard" else model / name
    file.write_bytes(changed(file.read_bytes(), changes))
    try:
        Checkpoint.open(model)
    except StreamerError as error:
        assert len(str(error).splitlines()) == 1


# What conversions, sessions and recordings leave behind


@fuzz(150)
@given(data=st.data(), changes=st.none() | CHANGES)
def test_journals(tmp_path: Path, data: st.DataObject, changes: list[Change] | None) -> None:
    folder = tmp_path / "j"
    shutil.rmtree(folder, ignore_errors=True)
    with Journal(folder, JOB) as journal:
        journal.write("a.safetensors", [Spec("a", "U8", (3,))], [b"abc"], lambda n: None)
    file = folder / NAME
    if changes:
        file.write_bytes(changed(file.read_bytes(), changes))
    else:
        file.write_text(json.dumps(data.draw(altered(json.loads(file.read_text())))))
    try:
        with Journal(folder, JOB) as journal:
            assert journal.nbytes >= 0
            journal.verify(lambda *_: None)
    except StreamerError as error:
        assert len(str(error).splitlines()) == 1


@fuzz(150)
@given(data=st.data(), changes=st.none() | CHANGES)
def test_heat(
    tiny: Path, tmp_path: Path, data: st.DataObject, changes: list[Change] | None
) -> None:
    opened = open_model(tiny)
    file = tmp_path / "heat"
    document = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": opened.checkpoint.fingerprint,
        "uses": {layer.path: [3] * layer.count for layer in opened.layers},
    }
    if changes:
        file.write_bytes(changed(json.dumps(document).encode(), changes))
    else:
        file.write_text(json.dumps(data.draw(altered(document))))
    for path, uses in Heat(opened, file).load().items():
        assert len(uses) == 16 and path in document["uses"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prefix") / "p"
    rows, states = KVCache(), ArraysCache(2)
    rows.update_and_fetch(mx.ones((1, 1, 4, 8)), mx.ones((1, 1, 4, 8)))
    states[0] = mx.ones((1, 2, 3))
    prompt_file.save(file, Prefix([rows, states], [1, 2, 3, 4], [{"role": "user"}]), BELONGS)
    return file


@fuzz(200)
@given(data=st.data(), changes=st.none() | CHANGES)
def test_prompt_caches(
    prefix: Path, tmp_path: Path, data: st.DataObject, changes: list[Change] | None
) -> None:
    file, whole = tmp_path / "p", prefix.read_bytes()
    file.write_bytes(changed(whole, changes) if changes else resealed(whole, data))
    for read in (prompt_file.peek, prompt_file.load):
        try:
            assert all(isinstance(token, int) for token in read(file, BELONGS).tokens)
        except PromptCacheError as error:
            assert len(str(error).splitlines()) == 1


def resealed(whole: bytes, data: st.DataObject) -> bytes:
    """Other values in the header of a prompt cache, or in that of its arrays; no checksum."""
    length = int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8 : 8 + length])
    if data.draw(st.booleans()):
        entries = data.draw(altered(entries))
    else:
        header = json.loads(entries["__metadata__"]["prompt_cache"])
        entries["__metadata__"]["prompt_cache"] = json.dumps(data.draw(altered(header)))
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def recording() -> Routes:
    group = Group((0, 1), 4, 100)
    calls = [Call(0, layer, np.array([[1, 2], [3, 0]], np.uint16)) for layer in (0, 1)]
    passes = [Pass("prefill", 0, np.array([5, 6], np.int32), 2)]
    return Routes("m", "f", (4, 4), 2, 2, (group,), 3, 1, calls, passes)


@fuzz(150)
@given(data=st.data(), changes=st.none() | CHANGES)
def test_recordings(tmp_path: Path, data: st.DataObject, changes: list[Change] | None) -> None:
    file = tmp_path / "r"
    recording().save(file)
    if changes:
        file.write_bytes(changed(file.read_bytes(), changes))
    else:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            held = dict(arrays)
        name = data.draw(st.sampled_from(["header", *sorted(held)]))
        if name == "header":
            text = json.dumps(data.draw(altered(json.loads(held[name].tobytes()))))
            held[name] = np.frombuffer(text.encode(), np.uint8)
        elif data.draw(st.booleans()):
            del held[name]
        else:
            held[name] = np.array(data.draw(st.lists(st.integers(-3, 70_000), max_size=9)))
        with open(file, "wb") as out:
            np.savez_compressed(out, **held)
    try:
        routes = Routes.load(file)
        assert all(call.layer < len(routes.counts) for call in routes.calls)
    except StreamerError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("flag", [0x01, 0x20])
def test_a_recording_as_another_kind_of_zip(tmp_path: Path, flag: int) -> None:
    """Encrypted, or patched."""
    recording().save(tmp_path / "r")
    data = bytearray((tmp_path / "r").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= flag
    data[data.index(b"PK\x03\x04") + 6] |= flag
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(RoutesError, match="a damaged one"):
        Routes.load(tmp_path / "r")


@fuzz(150)
@given(data=st.data())
def test_profiles(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    opened = open_model(tiny)
    costs = {"hit": 1.0, "per_call": 0.1, "per_miss": 0.1, "resident": 0.5, "tokens": 1.0}
    curve = [1.0, 2.0, 3.0]
    names = ("share", "own", "bytes_per_token", "tokens_per_second")
    document = {
        "model": {"fingerprint": opened.checkpoint.fingerprint},
        "costs": {"disk_bytes_per_second": 1e9},
        "run": {"tokens_per_second": 5.0},
        "pool": {"costs": costs} | dict.fromkeys(names, curve),
    }
    file = tmp_path / "p.json"
    file.write_text(json.dumps(data.draw(altered(document))))
    try:
        told = plan.from_profile(file, opened, divide(opened, "50%", 100))
        assert all(speed >= 0 for speed in told.tokens_per_second)
        json.dumps(asdict(told), allow_nan=False)
    except StreamerError as error:
        assert len(str(error).splitlines()) == 1
