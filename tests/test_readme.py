"""What the README says of models is what the tests hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import FAMILIES, METAL_ONLY
from test_families import CONVERTED

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.smoke


def models() -> tuple[str, str]:
    """What streams, and what does not yet."""
    text = README.partition("## Which models")[2].partition("\n## ")[0]
    streams, found, others = text.partition("Not yet:")
    assert found
    return streams, others


def test_the_families_that_stream() -> None:
    streams, _ = models()
    named = re.split(
        r",\s+", " ".join(streams.partition(": ")[2].partition(" and others")[0].split())
    )
    assert len(named) > 20
    assert set(named) <= set(FAMILIES) - set(METAL_ONLY)
    assert f"{len(FAMILIES) - len(METAL_ONLY)} are held to mlx-lm's bits" in " ".join(
        streams.split()
    )


def test_the_families_that_do_not() -> None:
    _, others = models()
    for family in [*METAL_ONLY, *(family for family, _ in CONVERTED)]:
        assert family in others, family
    assert "streamer convert" in others
    for words in ("AWQ", "GPTQ", "global scales"):
        assert words in others
