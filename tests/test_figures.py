"""README and docs/benchmarks.md say the same."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.smoke
def test_the_readme_quotes_the_benchmarks() -> None:
    readme = (ROOT / "README.md").read_text()
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(rows) >= 6
    assert all(row in benchmarks for row in rows)


@pytest.mark.smoke
def test_ci_runs_the_readmes_second_command() -> None:
    commands = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "python3 -m venv" in line
    ]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text()
