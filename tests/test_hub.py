"""What a model's name leads to, with the real huggingface_hub wherever that needs no network."""

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streamer import hub
from streamer.checkpoint import INDEX
from streamer.errors import CheckpointError

pytestmark = pytest.mark.smoke
NOWHERE = [
    "", "none", "./no", "../no", "/no/where", "~/no", "~nobody-at-all/no", "a/b/c", "a b/c",
    "a--b/c", "é/b", "a/b@", "a/", "a\0/b", "x" * 5000,
]  # fmt: skip
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    return tmp_path / "cache"


def online(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def refused(model: str, what: str) -> str:
    with pytest.raises(CheckpointError, match=what) as caught:
        hub.resolve(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def store(cache: Path) -> Path:
    """Put owner/name into the cache as a finished download would."""
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def empty_hub() -> Iterator[int]:
    """The port of a hub that has no repositories."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("name", NOWHERE)
def test_no_such_folder(name: str) -> None:
    refused(name, "no such folder")


def test_offline_and_not_cached() -> None:
    text = refused("owner/name", "^owner/name is neither .* in the local cache, and the hub cannot")
    assert "HF_HUB_OFFLINE" in text


def test_offline_and_cached(cache: Path) -> None:
    snapshot = store(cache)
    assert hub.resolve("owner/name") == snapshot


def test_a_hub_that_refuses_connections(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    online(monkeypatch, port)
    refused("owner/name", "hub cannot be reached: .*refused")
    snapshot = store(cache)
    assert hub.resolve("owner/name") == snapshot


def test_a_hub_that_never_answers(
    cache: Path, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.PATIENCE <= 15
    before = set(threading.enumerate())
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    online(monkeypatch, silent)
    began = time.perf_counter()
    refused("owner/name", "hub cannot be reached: (no answer within|.*timed out)")
    snapshot = store(cache)
    assert hub.resolve("owner/name") == snapshot
    assert time.perf_counter() - began < 5
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), "the request outlives its timeout"


def test_a_name_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[threading.Thread] = []
    answered = threading.Event()

    def wait(*_: object, **__: object) -> None:  # what getaddrinfo does, which heeds no timeout
        asked.append(threading.current_thread())
        answered.wait(60)

    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub.HfApi, "repo_info", wait)
    began = time.perf_counter()
    refused("owner/name", "no answer within 0.2 seconds")
    assert time.perf_counter() - began < 20
    answered.set()
    assert asked[0].daemon, "leaving the program would wait for it"


def test_a_hub_that_knows_no_such_repository(
    empty_hub: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, empty_hub)
    refused("owner/name", "nor a repository that the hub shows you")


def test_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "_unreachable", lambda name, revision: None)
    assert hub.resolve("owner/name@refs/pr/1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "refs/pr/1")
    assert asked["local_files_only"] is False and asked["tqdm_class"] is hub._TerminalBar
    assert {"model*.safetensors", "mtp*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not {"*", "*.safetensors", "*.bin", "*.gguf", "*.py"} & set(asked["allow_patterns"])
    assert hub.resolve("owner/name") == tmp_path and asked["revision"] is None


@pytest.mark.parametrize("index", [None, ["model.safetensors"], ["model.safetensors", "a[1].st"]])
def test_what_the_index_names_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: list[str] | None
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    if index:
        weights = {f"w{i}": file for i, file in enumerate(index)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    asked: list = []

    def fetch(name: str, **options: object) -> str:
        asked.append((options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "_unreachable", lambda name, revision: None)
    assert hub.resolve("owner/name@v1") == tmp_path
    more = [("v1", ["a[[]1].st"])] if index and len(index) > 1 else []
    assert asked == [("v1", hub.PATTERNS), *more]
    (tmp_path / INDEX).write_text("[")
    refused("owner/name", "index.json is not valid JSON")


def test_what_a_folder_is_called(tmp_path: Path) -> None:
    assert hub.called(tmp_path) == str(tmp_path)
    assert hub.called(store(tmp_path)) == "owner/name"
    assert hub.called(Path("m")) == "m" and hub.called(Path("/")) == "/"


def failure(kind: type[Exception], **attributes: object) -> Exception:
    error = kind.__new__(kind, "first line\nsecond line")
    vars(error).update(attributes)
    return error


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (failure(GatedRepoError), "licence"),
        (failure(RepositoryNotFoundError), "neither a folder here nor a repository"),
        (failure(RevisionNotFoundError), "owner/name has no revision v1"),
        (failure(LocalEntryNotFoundError), "neither a folder here nor in the local cache"),
        (failure(LocalEntryNotFoundError, snapshot_path="x"), "only partly in the local cache"),
        (
            OSError(28, "No space left\non device"),
            "could not be fetched: .*No space left on device",
        ),
        (RuntimeError(), "could not be fetched: RuntimeError"),
        (ValueError("x" * 10_000), r"could not be fetched: x+\.\.\.$"),
    ],
)
def test_failures_are_one_line(
    error: Exception, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "_unreachable", lambda name, revision: None)
    refused("owner/name@v1", what)


def test_bars_are_for_terminals() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pipe, terminal = io.StringIO(), Terminal()
    for file in (pipe, terminal):
        assert list(hub._TerminalBar(range(3), file=file)) == [0, 1, 2]
    assert pipe.getvalue() == "" and "3/3" in terminal.getvalue()
