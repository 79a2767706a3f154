import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpt.batch import Batch, concatenate, pack, pack_equal, unpack

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(lengths)
def test_pack_and_unpack_are_inverse(sizes: list[int]) -> None:
    sequences = [torch.randn(n, 3) for n in sizes]
    tokens = pack(sequences)
    assert tokens.longest == max(sizes) and tokens.lengths().tolist() == sizes
    assert all(a.equal(b) for a, b in zip(unpack(tokens), sequences, strict=True))
    assert tokens.sequence_index().tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    assert tokens.position().tolist() == [j for n in sizes for j in range(n)]


@given(lengths, lengths)
def test_concatenate_equals_packing_all(first: list[int], second: list[int]) -> None:
    sequences = [torch.randn(n, 2) for n in first + second]
    whole, joined = pack(sequences), concatenate([pack(sequences[: len(first)]), pack(sequences[len(first) :])])
    assert joined.x.equal(whole.x) and joined.offsets.equal(whole.offsets) and joined.longest == whole.longest
    assert joined.offsets.dtype == torch.int32


def test_pack_equal_is_a_view() -> None:
    x = torch.randn(4, 5, 2)
    tokens = pack_equal(x)
    assert tokens.x.data_ptr() == x.data_ptr() and tokens.offsets.tolist() == [0, 5, 10, 15, 20]


def test_packing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        pack([])


def test_split_keeps_every_pair() -> None:
    text = [torch.arange(n) for n in (3, 1, 4, 2, 5, 1)]
    images, kept = torch.arange(6)[:, None, None, None].expand(6, 3, 2, 2), torch.arange(12).view(6, 2)
    batch = Batch(images, pack(text), torch.arange(6), kept, tuple("abcdef"))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 2] and "".join(k for p in parts for k in p.keys) == "abcdef"
    assert torch.cat([part.images for part in parts]).equal(images)
    assert torch.cat([part.kept_patches for part in parts]).equal(kept)
    assert concatenate([part.text for part in parts]).x.equal(pack(text).x)
    with pytest.raises(ValueError, match="6 pairs into 4"):
        batch.split(4)
