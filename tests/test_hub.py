"""What a model's name leads to."""

from pathlib import Path

import pytest

from streamer import hub
from streamer.errors import CheckpointError

pytestmark = pytest.mark.smoke


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["none", "./no/where", "/no/where", "~/no", "a/b/c", "a b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        hub.resolve(name)


def test_offline_and_not_cached() -> None:
    with pytest.raises(CheckpointError, match="hub cannot be reached") as caught:
        hub.resolve("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hub.resolve("owner/name@v1") == tmp_path
    name, revision, patterns = asked[0]
    assert (name, revision) == ("owner/name", "v1")
    assert "model*.safetensors" in patterns and "*.bin" not in patterns
