"""Perfect foresight, by hand."""

import pytest

from tools.demands import Demand
from tools.prefetch_bound import bounds

pytestmark = pytest.mark.smoke


def test_one_pass_by_hand() -> None:
    step = Demand(1, 1, [4] * 4, [1, 0, 2, 0])
    layerwise, ahead, whole, ever = bounds([step], step=4.0, read=3.0, before=0.5)
    assert layerwise == 4 + 9
    # layer 0 waits till .5 + 3, layer 1 chooses at 4.5; reads of layer 2 run from there to 10.5
    assert ahead == pytest.approx(10.5 + 0.5 + 1)
    # its reads are there at 9, all before them done: layer 2 and 3 are left
    assert whole == pytest.approx(9 + 0.5 + 1)
    assert ever == 9


def test_without_misses_all_are_the_same() -> None:
    step = Demand(1, 1, [4] * 4, [0] * 4)
    assert bounds([step, step], 4.0, 3.0, 0.5) == pytest.approx([8.0] * 4)


def test_foresight_never_loses() -> None:
    steps = [Demand(1, 1, [4] * 8, [i % 3, 0, 2, 1, 0, 0, i % 2, 1]) for i in range(20)]
    for read in (0.1, 0.7, 2.0, 9.0):
        layerwise, ahead, whole, ever = bounds(steps, 8.0, read, 0.6)
        assert layerwise >= ahead - 1e-9 and ahead >= whole - 1e-9 and whole >= ever - 1e-9
