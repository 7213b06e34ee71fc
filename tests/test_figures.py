"""README and docs/benchmarks.md say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)")
pytestmark = pytest.mark.smoke


def figures(readme: str) -> str:
    """The part of the README that quotes measurements."""
    _, mark, rest = readme.partition("<!-- figures: docs/benchmarks.md -->")
    assert mark
    return rest.partition("\n## ")[0]


def disagreements(readme: str, benchmarks: str) -> list[str]:
    """What the README says and the benchmarks do not: rows of tables, and numbers in the text."""
    lines = figures(readme).splitlines()
    known = set(benchmarks.splitlines())
    found = [line for line in lines if line.startswith("|") and line not in known]
    text = " ".join(line for line in lines if not line.startswith("|"))
    numbers = {float(n) for n in NUMBER.findall(benchmarks)}
    return found + [n for n in NUMBER.findall(text) if not _rounded(n, numbers)]


def _rounded(number: str, numbers: set[float]) -> bool:
    """Whether one of `numbers`, with as many places, reads like this."""
    places = len(number.partition(".")[2])
    return any(f"{n:.{places}f}" == number for n in numbers)


def test_the_readme_quotes_the_benchmarks() -> None:
    assert sum(line.startswith("|") for line in figures(README).splitlines()) >= 6
    assert disagreements(README, BENCHMARKS) == []


def test_tables_are_quoted_in_that_part_only() -> None:
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert rows == [line for line in figures(README).splitlines() if line.startswith("|")]


def test_any_other_figure_in_a_table_is_noticed() -> None:
    start = README.index(figures(README))
    for row in [line for line in figures(README).splitlines() if line.startswith("|")]:
        for number in NUMBER.finditer(row):
            at = README.index(row, start) + number.start()
            other = README[:at] + "9" + README[at:]
            assert disagreements(other, BENCHMARKS), (row, number[0])
            changed = row.replace(number[0], "9" + number[0])
            assert disagreements(README, BENCHMARKS.replace(row, changed))


def test_any_other_figure_in_the_text_is_noticed() -> None:
    start = README.index(figures(README))
    text = figures(README)
    checked = 0
    for number in NUMBER.finditer(text):
        line = text[text.rfind("\n", 0, number.start()) + 1 :]
        if line.startswith("|"):
            continue
        at = start + number.start()
        other = README[:at] + "98765" + README[at:]
        assert disagreements(other, BENCHMARKS), number[0]
        checked += 1
    assert checked


def test_ci_runs_the_readmes_second_command() -> None:
    commands = [line for line in README.splitlines() if "python3 -m venv" in line]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text()
