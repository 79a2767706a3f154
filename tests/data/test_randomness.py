import itertools

import pytest

from mmpt.data.randomness import generator

PINNED = [0.682777526435, 0.816221620603, 0.932541256471]
PINNED_EXTREME = 0.001943844216


def test_values_are_pinned():
    """A release that changes them changes every augmentation of every run that resumes."""
    draws = [round(value, 12) for value in generator(17, "crop", 3, 1_000_003).random(3).tolist()]
    assert draws == PINNED
    assert generator(-1, "", 0, 2**62).random() == pytest.approx(PINNED_EXTREME, abs=1e-12)


def test_each_argument_matters():
    keys = list(itertools.product((0, 1, -1, 2**40), ("crop", "flip", "cropp", ""), (0, 1, 7), (0, 1, 255, 256)))
    first = {generator(*key).random() for key in keys}
    assert len(first) == len(keys)


def test_streams_of_neighbours_are_uncorrelated_and_uniform():
    draws = [generator(0, "crop", 0, position).random() for position in range(20_000)]
    mean = sum(draws) / len(draws)
    product = sum(a * b for a, b in itertools.pairwise(draws)) / (len(draws) - 1)
    assert abs(mean - 0.5) < 0.01  # 5 sigma: 0.0102
    assert abs(product - mean * mean) < 0.003


def test_numbers_beyond_64_bits_are_refused():
    with pytest.raises(ValueError, match="64 bits"):
        generator(2**63, "crop", 0, 0)
