"""python -m tests.instruction_sets: what it forces, and that it says when a test failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels import backend

sys.path.insert(0, str(Path(__file__).parent))
import instruction_sets


def test_every_set_and_none() -> None:
    names = list(instruction_sets.settings())
    native = backend.native()
    assert names == [*(native.isas() if native is not None else []), "off"]
    assert "tests/test_kernels_linear.py" in instruction_sets.files()
    assert not any("bench" in file for file in instruction_sets.files())


@pytest.mark.parametrize("code", [0, 1])
def test_each_is_forced_and_reported(code: int, monkeypatch: Any, capsys: Any) -> None:
    seen: list[dict[str, str]] = []

    def pretended(argv: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append(env)
        return subprocess.CompletedProcess(argv, code, "...\n3 passed\n", "")

    monkeypatch.setattr(subprocess, "run", pretended)
    assert instruction_sets.main(["off"]) == code
    assert [env["STREAMER_KERNELS"] for env in seen] == ["off"]
    assert "off         STREAMER_KERNELS=off: " in capsys.readouterr().out


def test_an_unknown_set(capsys: Any) -> None:
    assert instruction_sets.main(["sse9"]) == 2
    assert "not here: sse9" in capsys.readouterr().out
