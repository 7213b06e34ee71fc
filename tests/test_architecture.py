"""Dependencies point one way, and docs/architecture.* and the packages' READMEs are the code's."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tools import draw_architecture as drawing

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def found() -> drawing.Imports:
    return drawing.imports(drawing.sources())


def test_dependencies_point_one_way(found: drawing.Imports) -> None:
    assert drawing.breaches(found) == []
    rooms = {name: {m.split(".")[0] for m in others} for name, others in found.items()}
    assert all(rooms[n] <= {"kernels"} for n in found if n.startswith("kernels"))
    assert all("streamer" not in rooms[n] for n in found if n.startswith(("mtp", "cache")))
    assert "tools" not in {room for n in found if not n.startswith("tools") for room in rooms[n]}


@pytest.mark.parametrize(
    "line",
    [
        "import streamer.store",
        "from streamer import store",
        "from streamer.store import Store",
        "def late():\n    from streamer.store import Store",
    ],
)
def test_a_breach_is_seen(line: str, tmp_path: Path) -> None:
    for package in drawing.RULE:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "streamer" / "store.py").write_text("class Store: ...\n")
    (tmp_path / "kernels" / "linear.py").write_text(line + "\n")
    against = drawing.breaches(drawing.imports(drawing.sources(tmp_path)))
    assert len(against) == 1 and against[0].startswith("kernels.linear imports streamer")


def test_relative_imports_are_followed(found: drawing.Imports) -> None:
    assert "streamer.pool" in found["streamer.residency"]
    assert "mtp.families.family" in found["mtp.families.qwen"]


def test_floors() -> None:
    names = ["a", "b", "c", "d", "e"]
    below = {"a": {"b", "c"}, "b": {"c"}, "c": {"b"}, "d": set(), "e": {"b"}}
    assert drawing.floors(names, below) == [["a", "e"], ["b", "c", "d"]]


def test_the_drawing_is_the_codes(found: drawing.Imports) -> None:
    """python -m tools.draw_architecture makes it so."""
    assert drawing.main(["--check"]) == 0
    svg = drawing.SVG.read_text()
    for name in found:
        assert f">{name.partition('.')[2] or name}</text>" in svg, name


def test_an_old_drawing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = drawing.sources()
    monkeypatch.setattr(
        drawing, "sources", lambda: real | {"streamer.extra": real["streamer.pool"]}
    )
    assert drawing.main(["--check"]) == 2
    assert "run this without --check" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["streamer", "mtp", "cache", "kernels", "tools", "tests"])
def test_a_packages_readme_names_its_files(package: str) -> None:
    folder = ROOT / package
    text = (folder / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert "python" in text  # a command to try
    named = set(re.findall(r"`([\w./*]+)`", text))
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }
    absent = [f for f in files if not any(fnmatch(f, pattern) for pattern in named)]
    assert not absent, f"{package}/README.md says nothing of {', '.join(sorted(absent))}"
    for name in named:
        if name.endswith(".py") and "/" not in name and "*" not in name and name != "__init__.py":
            assert (folder / name).exists(), f"{package}/README.md names {name}"
