from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.mixture import Mixture, batch_positions, place_of, smallest_weights, spread
from tests.data.test_order import make_order


def mixture(counts: list[int], weights: tuple[int, ...], lanes: int = 4) -> Mixture:
    orders = tuple(make_order([count], 3, seed=i, lanes=lanes) for i, count in enumerate(counts))
    chunks = [len(order.chunk_lengths) for order in orders]
    return Mixture(orders, smallest_weights(weights), tuple(np.cumsum([0, *chunks[:-1]]).tolist()))


@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=7).map(tuple))
@settings(max_examples=200, deadline=None)
def test_every_prefix_is_exact_to_less_than_one_sample(weights: tuple[int, ...]):
    pattern, period = spread(weights), sum(weights)
    filled = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)  # [P, S]
    wanted = np.arange(1, period + 1)[:, None] * np.array(weights)
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0
    assert int(np.abs(filled * period - wanted).max()) <= bound * period
    assert filled[-1].tolist() == list(weights)


@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4), data=st.data(), lanes=st.sampled_from([1, 3, 8]),
    global_batch=st.sampled_from([1, 5, 12, 30]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_each_source_has_its_own_epochs_exactly_once(
    counts: list[int], data: st.DataObject, lanes: int, global_batch: int
):
    weights = tuple(data.draw(st.integers(1, 5)) for _ in counts)
    mix = mixture(counts, weights, lanes)
    slowest = max(-(-count // weight) for count, weight in zip(counts, weights, strict=True))
    steps = -(-(2 * slowest + 1) * sum(weights) // global_batch)  # two epochs of every source, and a bit
    positions = np.concatenate([
        batch_positions(mix, step * global_batch, global_batch, 0, 1) for step in range(steps)
    ])  # fmt: skip
    assert np.array_equal(np.sort(positions), np.arange(steps * global_batch))
    place = place_of(mix, positions)
    source = np.searchsorted(mix.first_chunks, place.chunks, side="right") - 1
    for s, count in enumerate(counts):
        mine = source == s
        seen = Counter(zip(place.epochs[mine].tolist(), place.chunks[mine].tolist(), place.indices[mine].tolist()))
        assert set(seen.values()) == {1}, "nothing twice within an epoch of its source"
        found = np.bincount(place.epochs[mine])
        assert found[:-1].tolist() == [count] * (len(found) - 1), "each finished epoch is whole"


@given(world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), start=st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_the_world_size_and_where_one_resumes_change_nothing(world_size: int, start: int):
    mix = mixture([17, 40, 5], (3, 1, 2))
    alone = batch_positions(mix, start, 24, 0, 1)
    parts = [batch_positions(mix, start, 24, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), alone)
    assert np.array_equal(np.sort(alone), np.arange(start, start + 24))


def test_a_rank_reads_long_runs():
    """Source by source, lane by lane: of 4 ranks each meets few lanes."""
    mix = mixture([4000, 4000], (1, 1), lanes=8)
    for rank in range(4):
        sources, own = mix.own_positions(batch_positions(mix, 480, 96, rank, 4))
        assert len(set(zip(sources.tolist(), (own % 8).tolist()))) == 4


def test_epochs_of_each_source():
    mix = mixture([10, 100], (3, 1))
    assert mix.epochs(0) == (0, 0)
    assert mix.epochs(400) == (30.0, 1.0)
    sources, _ = mix.own_positions(np.arange(7))
    assert mix.epochs(7) == ((sources == 0).sum() / 10, (sources == 1).sum() / 100)


def test_the_pattern_is_pinned():
    """A release that changes it silently gives other samples to every run that resumes."""
    assert spread((5, 3, 1)).tolist() == [0, 1, 0, 1, 0, 0, 2, 1, 0]


def test_weights_are_reduced_and_bad_ones_named():
    assert smallest_weights((50, 20, 30)) == (5, 2, 3)
    with pytest.raises(ValueError, match=r"1 or more, got \(0, 3\)"):
        smallest_weights((0, 3))
    with pytest.raises(ValueError, match="sum to 100002"):
        smallest_weights((100_001, 1))


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"world size \(5\) must divide the global batch \(12\)"):
        batch_positions(mixture([5], (1,)), 0, 12, 0, 5)
