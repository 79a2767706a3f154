from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from mmpt.data.mixture import Mixture, batch_positions
from mmpt.data.order import Order, locate, positions_of

WORLD_SIZES = (1, 2, 3, 4, 5, 6, 8, 12)
PINNED = [
    (0, 1, 0), (0, 5, 1), (0, 5, 2), (0, 5, 0), (0, 2, 0), (0, 2, 1), (0, 5, 3), (1, 2, 3),
    (0, 3, 0), (0, 2, 3), (0, 2, 2), (0, 4, 0), (0, 3, 1), (0, 3, 2), (0, 3, 3), (1, 4, 0),
    (0, 6, 0), (0, 6, 2), (0, 0, 0), (0, 6, 1), (0, 0, 3), (0, 0, 2), (0, 0, 1), (1, 5, 0),
]  # fmt: skip


def make_order(
    counts: list[int], chunk_samples: int = 3, seed: int = 0, lanes: int = 1, window_samples: int = 7
) -> Order:
    lengths = [min(chunk_samples, n - first) for n in counts for first in range(0, n, chunk_samples)]
    return Order(np.array(lengths, dtype=np.int64), seed, lanes, window_samples)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=9))
    assume(sum(counts))
    return make_order(
        counts, draw(st.sampled_from([1, 3, 8, 64])), draw(st.integers(0, 2**40)),
        draw(st.sampled_from([1, 2, 3, 4, 6, 12])), draw(st.integers(1, 50)),
    )  # fmt: skip


def identities(order: Order, positions: np.ndarray) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in locate(order, positions)), strict=True))


def global_batches(order: Order, global_batch: int, world_size: int, steps: int, start: int = 0) -> list[np.ndarray]:
    """Positions of each step, all ranks' one after another."""
    alone = Mixture((order,), (1,), (0,))
    return [
        np.concatenate([
            batch_positions(alone, start + step * global_batch, global_batch, rank, world_size)
            for rank in range(world_size)
        ])
        for step in range(steps)
    ]  # fmt: skip


@given(order=orders(), per_lane=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_each_epoch_holds_each_sample_once(order: Order, per_lane: int):
    """Over batches, whatever N is to the batch: larger, smaller, prime to it."""
    global_batch, epochs = per_lane * order.lanes, 3
    steps = -(-epochs * order.samples // global_batch)
    delivered = identities(order, np.concatenate(global_batches(order, global_batch, 1, steps)))
    assert len(set(delivered)) == len(delivered)
    everything = {(c, i) for c, length in enumerate(order.chunk_lengths.tolist()) for i in range(length)}
    for epoch in range(epochs):
        assert {(c, i) for e, c, i in delivered if e == epoch} == everything


@given(order=orders(), per_lane=st.integers(1, 5), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_world_size_changes_nothing(order: Order, per_lane: int, data: st.DataObject):
    global_batch = per_lane * order.lanes
    world_size = data.draw(st.sampled_from([w for w in WORLD_SIZES if global_batch % w == 0]))
    for alone, together in zip(
        global_batches(order, global_batch, 1, 6), global_batches(order, global_batch, world_size, 6), strict=True
    ):
        assert np.array_equal(alone, together)


@given(order=orders(), per_lane=st.integers(1, 5), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_chain_of_resumes_equals_the_uninterrupted_run(order: Order, per_lane: int, data: st.DataObject):
    global_batch, steps = per_lane * order.lanes, 12
    whole = np.concatenate(global_batches(order, global_batch, 1, steps))
    cuts = sorted(data.draw(st.sets(st.integers(1, steps - 1), min_size=3, max_size=5)))
    pieces = []
    for first, last in pairwise([0, *cuts, steps]):
        world_size = data.draw(st.sampled_from([w for w in WORLD_SIZES if global_batch % w == 0]))
        pieces += global_batches(order, global_batch, world_size, last - first, start=first * global_batch)
    assert np.array_equal(np.concatenate(pieces), whole)


@given(order=orders(), before=st.integers(1, 4), after=st.integers(1, 4), steps=st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_the_global_batch_may_change_within_a_run(order: Order, before: int, after: int, steps: int):
    small, large = before * order.lanes, after * order.lanes
    start = steps * small
    more = -(-3 * order.samples // large)
    positions = np.concatenate(
        [np.empty(0, np.int64), *global_batches(order, small, 1, steps), *global_batches(order, large, 1, more, start)]
    )
    assert np.array_equal(np.sort(positions), np.arange(len(positions)))


@given(order=orders(), data=st.data())
@settings(max_examples=50, deadline=None)
def test_places_do_not_depend_on_what_is_asked_with_them(order: Order, data: st.DataObject):
    positions = np.array(data.draw(st.lists(st.integers(0, 10 * order.samples), min_size=1, max_size=30)))
    together = identities(order, positions)
    assert together == [identities(order, positions[i : i + 1])[0] for i in range(len(positions))]


def test_a_batch_larger_than_the_data_set_spans_epochs():
    order = make_order([2, 0, 1], chunk_samples=2, lanes=4)
    (batch,) = global_batches(order, 8, 1, 1)
    epochs, chunks, indices = locate(order, batch)
    assert sorted(epochs.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(len({*zip(chunks[epochs == e], indices[epochs == e], strict=True)}) == (3, 3, 2)[e] for e in range(3))


def test_the_order_is_pinned():
    """A release that changes it silently shows samples twice to every run that resumes."""
    order = make_order([5, 0, 9, 7], chunk_samples=4, seed=2024, lanes=3, window_samples=4)
    (batch,) = global_batches(order, 24, 1, 1)
    assert identities(order, batch) == PINNED


def test_epochs_and_seeds_give_unrelated_orders():
    counts = [100] * 20
    seen = []
    for seed in range(3):
        order = make_order(counts, 10, seed, lanes=8, window_samples=40)
        _, chunks, indices = locate(order, np.arange(3 * order.samples))
        stored = (chunks * 10 + indices).reshape(3, -1)
        seen += list(stored)
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert (a == b).sum() < 12  # 1 is expected; epoch e + 1 of seed s must not be epoch e of seed s + 1
    for a in seen:
        assert abs(np.corrcoef(a, np.arange(len(a)))[0, 1]) < 0.3  # 4 sigma for 200 chunks in random order


@pytest.mark.parametrize(("chunk_samples", "seed"), [(1, 0), (1, 1), (10, 2)])
def test_samples_move_by_any_distance_alike(chunk_samples: int, seed: int):
    """The way from a sample's place in the shards to that in the epoch, around the data set: uniform, by the test of
    Kolmogorov and Smirnov. Of each chunk one sample, as the others move with it."""
    order = make_order([2500] * 16 * chunk_samples, chunk_samples, seed, lanes=8, window_samples=40)
    for epoch in range(2):
        positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
        _, chunks, indices = locate(order, positions)
        first = indices == 0
        moved = (positions[first] - chunks[first] * chunk_samples) % order.samples
        assert kstest(moved / order.samples, "uniform").pvalue > 1e-3


def test_neighbours_in_a_shard_meet_about_as_often_as_in_a_full_shuffle():
    """Chunks of one sample: a batch's samples are then nearly independent draws."""
    samples, global_batch, shard_samples = 4000, 100, 50
    order = make_order([shard_samples] * (samples // shard_samples), 1, 5, lanes=50, window_samples=4)
    distinct = []
    for positions in global_batches(order, global_batch, 1, 200):
        distinct.append(len(np.unique(locate(order, positions).chunks // shard_samples)))
    shards = samples // shard_samples
    assert np.mean(distinct) == pytest.approx(shards * (1 - (1 - 1 / shards) ** global_batch), rel=0.03)


@given(order=orders(), epoch=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_positions_of_is_the_inverse(order: Order, epoch: int):
    positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    epochs, chunks, indices = locate(order, positions)
    assert (epochs == epoch).all()
    assert np.array_equal(positions_of(order, epoch, chunks, indices), positions)


@pytest.mark.parametrize(("world_size", "most"), [(1, 1.0), (8, 1.05), (32, 1.2), (64, 2.1)])
def test_ranks_share_few_chunks(world_size: int, most: float):
    """Chunks that all ranks together read in an epoch, over those there are: 1 + W / L is what one may expect."""
    lanes, global_batch = 32, 256
    order = make_order([2000] * 60, 50, seed=1, lanes=lanes, window_samples=200)
    alone = Mixture((order,), (1,), (0,))
    read: list[set[int]] = [set() for _ in range(world_size)]
    for step in range(order.samples // global_batch):
        positions = batch_positions(alone, step * global_batch, global_batch, 0, 1)  # rank r has the r-th part of them
        for rank, chunks in enumerate(locate(order, positions).chunks.reshape(world_size, -1).tolist()):
            read[rank].update(chunks)
    ratio = sum(map(len, read)) / len(order.chunk_lengths)
    assert ratio <= most and most <= 1 + world_size / lanes + 0.2


def test_chunks_that_a_filter_emptied_hold_no_sample():
    order = Order(np.array([0, 3, 0, 0, 2, 0], dtype=np.int32), 7, 2, 3)
    _, chunks, indices = locate(order, np.arange(5))
    assert sorted(zip(chunks.tolist(), indices.tolist(), strict=True)) == [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1)]


def test_more_chunks_than_are_summed_at_a_time():
    """The order of 600,000 chunks is computed in blocks; it must not show."""
    lengths = np.random.default_rng(0).integers(1, 4, 600_000).astype(np.int32)
    order = Order(lengths, 11, 64, 8)
    _, chunks, indices = locate(order, np.arange(order.samples))
    first = np.cumsum(lengths) - lengths
    assert np.array_equal(np.sort(first[chunks] + indices), np.arange(order.samples))
