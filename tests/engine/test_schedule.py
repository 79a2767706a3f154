import itertools
import math

import pytest

from mmpt.engine.schedule import lr_factor


def test_warmup_reaches_the_peak_in_warmup_steps() -> None:
    factors = [lr_factor(step, 4, 100, "cosine", 0.0) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_falls_from_the_peak_to_the_final_fraction(decay) -> None:
    factors = [lr_factor(step, 10, 110, decay, 0.1) for step in range(10, 111)]
    assert factors[0] == 1.0 and math.isclose(factors[-1], 0.1)
    assert all(a > b for a, b in itertools.pairwise(factors))
    assert math.isclose(factors[50], 0.55)  # both shapes pass through the middle


def test_constant_and_beyond_the_end() -> None:
    assert lr_factor(57, 10, 100, "constant", 0.3) == 1.0
    assert lr_factor(500, 10, 100, "cosine", 0.3) == pytest.approx(0.3)
    assert lr_factor(0, 0, 1, "cosine", 0.0) == 1.0
