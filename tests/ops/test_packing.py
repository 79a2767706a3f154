"""Joined, chosen and padded sequences against lists of tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.batch import pack, pack_equal, unpack
from mmpt.ops.packing import join, padded, take


def sequences(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, generator=generator) for n in lengths]


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.data())
def test_join(lengths: list[int], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)))
    first, second = sequences(lengths), sequences(others, 1)
    joined = join(pack(first), pack(second))
    expected = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    assert all(a.equal(b) for a, b in zip(unpack(joined.tokens), expected, strict=True))
    assert joined.tokens.longest >= max(len(x) for x in expected)
    assert joined.tokens.x[joined.first_rows].equal(torch.cat(first))
    assert joined.tokens.x[joined.second_rows].equal(torch.cat(second))


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.lists(st.integers(0, 100), max_size=7))
def test_take(lengths: list[int], index: list[int]) -> None:
    parts, index = sequences(lengths), [i % len(lengths) for i in index]
    taken = take(pack(parts), torch.tensor(index, dtype=torch.int64))
    assert len(taken.offsets) == len(index) + 1
    assert all(a.equal(parts[i]) for a, i in zip(unpack(taken), index, strict=True))
    if index:
        assert taken.longest == max(lengths[i] for i in index)


def test_gradients_come_back_to_what_was_taken() -> None:
    x = torch.arange(4.0).requires_grad_()
    tokens = pack_equal(x.view(2, 2, 1))
    (take(tokens, torch.tensor([1, 1, 0])).x.sum() + join(tokens, tokens).tokens.x.sum()).backward()
    assert x.grad is not None and x.grad.tolist() == [3.0, 3.0, 4.0, 4.0]


def test_padded() -> None:
    parts = sequences([2, 4, 1])
    x, real = padded(pack(parts))
    assert x.shape == (3, 4, 3) and real.sum(1).tolist() == [2, 4, 1]
    assert all(x[i, : len(part)].equal(part) and not x[i, len(part) :].any() for i, part in enumerate(parts))


def test_what_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="join 2 sequences with 3"):
        join(pack(sequences([1, 2])), pack(sequences([1, 2, 3])))
