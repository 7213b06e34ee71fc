"""The imagined machine of reads ahead: its disk, and a bound beside layer by layer."""

import pytest

from tools.ahead_disk import CHUNK, Disk, Read
from tools.ahead_table import main

pytestmark = pytest.mark.smoke


def test_demands_go_first_but_for_the_chunk_under_way() -> None:
    disk = Disk(float(CHUNK))  # a chunk a second
    late, near = Read(2, 0.0, deadline=5), Read(2, 0.0, deadline=1)
    disk.ask(late, 0.0)
    disk.ask(near, 0.0)
    demand = Read(1, 0.5)
    disk.ask(demand, 0.5)
    assert disk.left(0.5) == pytest.approx(1.5)
    assert [disk.finish(r) for r in (demand, near, late)] == pytest.approx([2.0, 3.0, 5.0])
    assert disk.busy == pytest.approx(5.0)


def test_guesses_are_taken_back_and_promoted() -> None:
    disk = Disk(float(CHUNK))
    wrong, right, begun = (Read(1, 0.0, deadline=d) for d in (3, 4, 0))
    for read in (wrong, right, begun):
        disk.ask(read, 0.0)
    assert disk.cancel(wrong, 0.5)
    disk.promote(right, 0.5)
    assert disk.left(0.5) == pytest.approx(1.5)
    assert disk.finish(right) == pytest.approx(2.0)
    assert not disk.cancel(begun, 1.5) and not disk.cancel(right, 9.0)


def test_a_bound_is_faster_than_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pools", "50", "--disks", "1", "--ways", ",look,draft,next"]
    assert main([*options, "--tokens", "8", "--texts", "2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[2] for row in rows] == ["layer-wise", "look", "draft", "next"]
    assert rows[0][4] == "1.00" and float(rows[3][4]) > 1.05
    assert float(rows[3][6]) > 0.5 and rows[0][6] == "" and rows[2][9] != " |"
