"""The two losses from pieces of the score matrix, as ranks hold them, against torch on the whole matrix."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from mmpt.objectives.contrastive import correct_matches, one_sided_info_nce
from mmpt.objectives.sigmoid import pairwise_sigmoid


def matrices(pairs: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, pairs, pairs, generator=generator, dtype=torch.float64) * scale
    return a.requires_grad_(), b.requires_grad_()


def pieces(matrix: Tensor, ranks: int) -> tuple[Tensor, ...]:
    return matrix.split(len(matrix) // ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("scale", [3.0, 800.0], ids=["", "large logits"])
def test_info_nce(ranks: int, scale: float) -> None:
    a, b = matrices(8, scale)
    own = torch.arange(8)
    expected = (cross_entropy(a, own) + cross_entropy(b.T, own)) / 2
    columns = torch.stack([part.logsumexp(0) for part in pieces(b, ranks)]).logsumexp(0)
    local = [
        one_sided_info_nce(x, y, r * 8 // ranks, lambda _: columns)
        for r, (x, y) in enumerate(zip(pieces(a, ranks), pieces(b, ranks), strict=True))
    ]
    loss = torch.stack(local).sum() / 8
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sigmoid(ranks: int) -> None:
    a, _ = matrices(8)
    expected = -sum(logsigmoid(a[i, j] if i == j else -a[i, j]) for i in range(8) for j in range(8)) / 8
    loss = torch.stack([pairwise_sigmoid(x, r * 8 // ranks) for r, x in enumerate(pieces(a, ranks))]).sum() / 8
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, a), torch.autograd.grad(expected, a))  # type: ignore[arg-type]
    assert pairwise_sigmoid(torch.full((1, 2), 500.0), 0).item() == pytest.approx(500.0), "no overflow"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_correct_matches(ranks: int) -> None:
    a, b = matrices(8)
    own, best, sharing = torch.arange(8), b.detach().amax(0), torch.ones(8)
    counts = [
        correct_matches(x, y, r * 8 // ranks, lambda _: best, lambda _: sharing)
        for r, (x, y) in enumerate(zip(pieces(a, ranks), pieces(b, ranks), strict=True))
    ]
    assert sum(float(i2t) for i2t, _ in counts) == float((a.argmax(1) == own).sum())
    assert sum(float(t2i) for _, t2i in counts) == float((b.argmax(0) == own).sum())


def test_equal_scores_are_worth_chance() -> None:
    same = torch.zeros(4, 4)
    found = correct_matches(same, same, 0, lambda x: x, lambda x: x)
    assert [float(x) for x in found] == [1.0, 1.0], "one of four, as if drawn"
    twins = torch.eye(4)
    twins[0, 1] = twins[1, 0] = 1.0
    assert [float(x) for x in correct_matches(twins, twins, 0, lambda x: x, lambda x: x)] == [3.0, 3.0]
