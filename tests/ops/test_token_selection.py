"""FILIP's token selection against sorting by hand."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmpt.batch import Tokens, pack, unpack
from mmpt.ops import token_selection as under_test
from mmpt.ops.token_selection import drop_ends, keep_top_tokens, token_maxima
from tests.ops.late_interaction.test_op import LENGTHS, tokens


def by_hand(own: Tokens, other: Tensor, ratio: float) -> list[Tensor]:
    kept = []
    for rows in unpack(own):
        value = [max(float(row @ one) for one in other) for row in rows]
        count = math.ceil(ratio * len(rows))
        best = sorted(sorted(range(len(rows)), key=lambda i: (-value[i], i))[:count])
        kept.append(rows[best])
    return kept


@settings(max_examples=60, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(0, 99), st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]), st.sampled_from([8, 1 << 20]))
def test_keeps_the_highest_in_order(images: list[int], texts: list[int], seed: int, ratio: float, tile: int) -> None:
    image, text = tokens(images, seed), tokens(texts, seed + 100)
    before, under_test.TILE_BYTES = under_test.TILE_BYTES, tile
    try:
        found = keep_top_tokens(image, text, ratio, "local")
    finally:
        under_test.TILE_BYTES = before
    for kept, own, other in zip(found, (image, text), (text.x, image.x), strict=True):
        expected = pack(by_hand(own, other, ratio))
        assert torch.equal(kept.x, expected.x) and torch.equal(kept.offsets, expected.offsets)
        assert kept.longest == expected.longest


def test_kept_tokens_have_gradients_and_the_choice_has_none() -> None:
    image, text = tokens([4], 0), tokens([3], 1)
    x = image.x.requires_grad_()
    kept, _ = keep_top_tokens(image.with_x(x), text, 0.5, "local")
    (gradient,) = torch.autograd.grad(kept.x.sum(), x)
    assert gradient.unique().tolist() == [0.0, 1.0] and gradient.sum() == 2 * x.shape[1]


def test_maxima_are_fp32_under_autocast() -> None:
    image, text = tokens([6, 3], 0, torch.float32, 64), tokens([5], 1, torch.float32, 64)
    plain = token_maxima(image.x, text.x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = token_maxima(image.x, text.x)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("lengths", [[5, 3, 7], [2, 1, 4], [2, 2]])
def test_drop_ends(lengths: list[int]) -> None:
    whole = pack([torch.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths)])
    dropped = drop_ends(whole)
    expected = [row[1:-1] if len(row) > 2 else row for row in unpack(whole)]
    assert all(torch.equal(a, b) for a, b in zip(unpack(dropped), expected, strict=True))
    assert dropped.longest == max(b - a for a, b in pairwise(dropped.offsets.tolist()))
