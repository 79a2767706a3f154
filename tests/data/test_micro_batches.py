"""Micro-batches by tokens: as even as brute force makes them, none over the budget, alike many on all ranks."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt import dist
from mmpt.batch import Batch, Partners, Pictures, Regions, pack
from mmpt.data.device import DeviceLoader
from mmpt.data.loader import Loader
from mmpt.data.micro_batches import TokenBudget, even_ends, micro_batches_for, split_by_tokens, tokens_per_pair
from mmpt.inputs import InputSpec
from tests.data.batches import assert_same, joined
from tests.ranks import run

CPU = torch.device("cpu")
token_counts = st.lists(st.integers(1, 30), min_size=1, max_size=9)


def batch_of(texts: list[int], regions: list[int] | None = None, first: int = 0) -> Batch:
    """Pairs with so many tokens of text and so many regions, or pixels."""
    pictures = Pictures(pixels=torch.zeros(len(texts), 3, 2, 2, dtype=torch.uint8))
    if regions is not None:
        features = pack([torch.arange(n * 4.0).view(n, 4) for n in regions])
        boxes = torch.arange(sum(regions) * 7.0).view(-1, 7)
        pictures = Pictures(regions=Regions(features, boxes, torch.zeros(sum(regions), 0)))
    positions = torch.arange(first, first + len(texts))
    return Batch(pictures, pack([torch.arange(n) for n in texts]), positions, tuple(map(str, positions.tolist())))


def cuts(count: int, parts: int) -> Iterator[list[slice]]:
    """Every way to cut so many pairs into so many parts."""
    for inner in combinations(range(1, count), parts - 1):
        edges = [0, *inner, count]
        yield [slice(a, b) for a, b in zip(edges, edges[1:])]  # noqa: RUF007  pairs with edges, as the others here


def largest(tokens: list[int], slices: list[slice]) -> int:
    """Of the parts with more than one pair: a single pair cannot be cut."""
    return max((sum(tokens[s]) for s in slices if len(tokens[s]) > 1), default=0)


@given(tokens=token_counts, data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_cut_is_more_even(tokens: list[int], data: st.DataObject):
    parts = data.draw(st.integers(1, len(tokens)))
    ends = even_ends(np.array(tokens), parts)
    slices = [slice(a, b) for a, b in zip([0, *ends], ends)]
    assert len(slices) == parts and ends[-1] == len(tokens) and all(s.stop > s.start for s in slices)
    assert largest(tokens, slices) == min(largest(tokens, other) for other in cuts(len(tokens), parts))


@given(texts=token_counts, budget=st.integers(1, 80), more=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_the_fewest_parts_that_fit(texts: list[int], budget: int, more: int):
    """So that a rank that must make more of them, because another has to, stays within the budget too."""
    batch = batch_of(texts)
    fewest = micro_batches_for(batch, TokenBudget(budget))
    possible = [parts for parts in range(1, len(texts) + 1)
                if min(largest(texts, other) for other in cuts(len(texts), parts)) <= budget]  # fmt: skip
    assert fewest == possible[0]
    parts = split_by_tokens(batch, min(fewest + more, len(texts)))
    assert all(len(part) == 1 or int(tokens_per_pair(part).sum()) <= budget for part in parts)
    assert_same(joined(parts), batch)


def test_every_form_of_picture_counts():
    texts = [3, 1, 4]
    assert tokens_per_pair(batch_of(texts, [5, 2, 9])).tolist() == [8, 3, 13]
    assert tokens_per_pair(batch_of(texts)).tolist() == [3, 1, 4]
    assert tokens_per_pair(batch_of(texts), square_tokens=49).tolist() == [52, 50, 53]
    kept = replace(batch_of(texts), pictures=Pictures(torch.zeros(3, 3, 8, 8), torch.zeros(3, 7, dtype=torch.int64)))
    assert tokens_per_pair(kept, square_tokens=49).tolist() == [10, 8, 11]
    patches = pack([torch.rand(n, 12) for n in (4, 6, 2)])
    whole = Pictures(patches=patches, places=patches.position(), grids=torch.tensor([[2, 2], [2, 3], [1, 2]]))
    assert tokens_per_pair(replace(kept, pictures=whole)).tolist() == [7, 7, 6]
    matched = replace(batch_of(texts, [5, 2, 9]), partners=Partners(whole, torch.ones(3, dtype=torch.bool)))
    assert tokens_per_pair(matched).tolist() == [8, 7, 13], "of the two pictures the longer one"


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="3 pairs into 4 micro-batches"):
        split_by_tokens(batch_of([1, 2, 3]), 4)
    with pytest.raises(ValueError, match="a budget of 0 tokens"):
        TokenBudget(0)


def loader_of(rank: int) -> Loader:
    """Batches of 12 pairs whose lengths differ from rank to rank and from batch to batch."""

    def batches() -> Iterator:
        step = 0
        while True:
            random = np.random.default_rng([rank, step])
            yield batch_of(random.integers(1, 9 + 8 * rank, 12).tolist(), random.integers(1, 20, 12).tolist()), []
            step += 1

    return Loader(batches(), None, "", 24, 0, 0.0)


def deliver(rank: int, world_size: int) -> None:
    budget, numbers = TokenBudget(90), set()
    for overlap in (False, True):
        deliveries = DeviceLoader(loader_of(rank), CPU, budget, overlap)
        plain = loader_of(rank)
        for step in range(1, 9):
            delivery, whole = next(deliveries), next(plain)
            needed = dist.gather_objects(micro_batches_for(whole, budget))
            numbers.add(tuple(needed))
            assert len(delivery.micro_batches) == max(needed) and delivery.state == 24 * step
            assert all(int(tokens_per_pair(part).sum()) <= 90 for part in delivery.micro_batches)
            assert_same(joined(delivery.micro_batches), whole)
            dist.barrier()  # the step's own collectives, while the thread reads on
        deliveries.close()
    assert any(a != b for a, b in numbers) and len({max(pair) for pair in numbers}) > 1


@pytest.mark.slow
def test_all_ranks_cut_alike_often():
    run(deliver, 2)


def test_one_process_needs_no_agreement(inputs: InputSpec):
    deliveries = DeviceLoader(loader_of(0), CPU, TokenBudget(50), overlap=True)
    for _ in range(3):
        delivery = next(deliveries)
        assert len(delivery.micro_batches) == micro_batches_for(joined(delivery.micro_batches), TokenBudget(50)) > 1
    deliveries.close()
