"""A loss from pieces of the score matrix, as ranks hold them, against torch on the whole matrix."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmpt.objectives.sigmoid import pairwise_sigmoid


def matrices(pairs: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, pairs, pairs, generator=generator, dtype=torch.float64) * scale
    return a.requires_grad_(), b.requires_grad_()


def pieces(matrix: Tensor, ranks: int) -> tuple[Tensor, ...]:
    return matrix.split(len(matrix) // ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sigmoid(ranks: int) -> None:
    a, _ = matrices(8)
    expected = -sum(logsigmoid(a[i, j] if i == j else -a[i, j]) for i in range(8) for j in range(8)) / 8
    loss = torch.stack([pairwise_sigmoid(x, r * 8 // ranks) for r, x in enumerate(pieces(a, ranks))]).sum() / 8
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, a), torch.autograd.grad(expected, a))  # type: ignore[arg-type]
    assert pairwise_sigmoid(torch.full((1, 2), 500.0), 0).item() == pytest.approx(500.0), "no overflow"
