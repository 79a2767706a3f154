import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpt.batch import (
    Batch,
    MaskedRegions,
    MaskedWords,
    Partners,
    Pictures,
    Regions,
    concatenate,
    pack,
    pack_equal,
    unpack,
)

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
    batch = Batch(Pictures(images, kept), pack(text), torch.arange(6), tuple("abcdef"))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 2] and "".join(k for p in parts for k in p.keys) == "abcdef"
    assert torch.cat([part.pictures.pixels for part in parts]).equal(images)
    assert torch.cat([part.pictures.kept_patches for part in parts]).equal(kept)
    assert concatenate([part.text for part in parts]).x.equal(pack(text).x)
    with pytest.raises(ValueError, match="6 pairs into 4"):
        batch.split(4)


def full_batch() -> Batch:
    """Everything that a batch may hold."""
    ids, boxes = pack([torch.arange(n) for n in (3, 1, 4, 2)]), pack([torch.rand(n, 7) for n in (2, 3, 1, 4)])
    regions = Regions(boxes.with_x(torch.rand(10, 5)), boxes.x, torch.rand(10, 3))
    patches = pack([torch.rand(n, 12) for n in (4, 6, 2, 2)])
    whole = Pictures(patches=patches, places=patches.position(), grids=torch.tensor([[2, 2], [2, 3], [1, 2], [2, 1]]))
    words = torch.tensor([0, 1, 1, 1, 0, 0, 0, 1, 0, 1]).bool()
    return Batch(
        Pictures(regions=regions), ids, torch.arange(4), tuple("abcd"), torch.rand(4, 2, 3, 2, 2), torch.rand(4, 2, 8),
        MaskedWords(ids.x + 100, words, 5), MaskedRegions(~words, 5),
        Partners(whole, torch.tensor([True, False, False, True])), torch.rand(4, 2, dtype=torch.float64), "itm",
    )  # fmt: skip


def test_parts_hold_what_belongs_to_their_pairs() -> None:
    batch = full_batch()
    first, second = batch.split(2)
    assert first.task == "itm" and (len(first), len(second.pictures), len(second.partners.pictures)) == (2, 2, 2)  # type: ignore[union-attr, arg-type]
    assert second.masked_words.ids.tolist() == [100, 101, 102, 103, 100, 101]  # type: ignore[union-attr]
    assert (first.masked_words.count, second.masked_words.count) == (3, 2)  # type: ignore[union-attr]
    assert (first.masked_regions.count, second.masked_regions.count) == (2, 3)  # type: ignore[union-attr]
    for part, rows in ((first, slice(0, 5)), (second, slice(5, 10))):
        regions = part.pictures.regions
        assert regions is not None and regions.boxes.equal(batch.pictures.regions.boxes[rows])  # type: ignore[union-attr]
        assert len(regions.features.x) == len(regions.classes) == len(part.masked_regions.chosen) == 5  # type: ignore[union-attr]
    whole = second.partners.pictures  # type: ignore[union-attr]
    assert whole.grids.tolist() == [[1, 2], [2, 1]] and whole.places.tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]
    assert second.draws.equal(batch.draws[2:]) and second.view_parameters.equal(batch.view_parameters[2:])  # type: ignore[index, union-attr]


def test_what_moves() -> None:
    """To a device that holds nothing: all but what the host reads."""
    moved = full_batch().to("meta")
    assert moved.positions.device.type == moved.view_parameters.device.type == "cpu"  # type: ignore[union-attr]
    assert moved.partners.pictures.grids.device.type == "cpu"  # type: ignore[union-attr]
    for tensor in moved.moving():
        assert tensor.device.type == "meta"
    assert len(moved.moving()) == 15 and moved.masked_words.count == 5 and moved.text.longest == 4  # type: ignore[union-attr]
