"""The sigmoid loss in blocks, against plain loops and the whole matrix at once."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from mmpt import dist
from mmpt.ops.contrast.loss import ContrastConfig
from mmpt.ops.contrast.sigmoid import sigmoid_contrast
from mmpt.ops.similarity import similarity
from tests.ranks import run

PAIRS, WIDTH = 12, 7
IN_BLOCKS = [ContrastConfig(score_bytes=size) for size in (1, 5 * 8 * PAIRS, 1 << 30)]
"""One image at a time, five, all."""
RINGS = [ContrastConfig("ring", score_bytes=size) for size in (1, 1 << 30)]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Images, texts, scale and bias."""
    g = torch.Generator().manual_seed(0)
    v, t = normalize(torch.randn(2, PAIRS, WIDTH, generator=g, dtype=torch.float64), dim=-1)
    made = (v, t, torch.tensor([9.0]), torch.tensor([-4.0]))
    return [x.to(dtype).requires_grad_() for x in made]


def plain(dtype: torch.dtype) -> list[Tensor]:
    """The loss from the whole matrix, and its gradients."""
    v, t, scale, bias = given = inputs(dtype)
    sign = 2 * torch.eye(PAIRS, dtype=dtype) - 1
    loss = -logsigmoid(sign * (scale * similarity(v, t) + bias)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, given)]


def by_loops() -> list[Tensor]:
    v, t, scale, bias = given = inputs(torch.float64)
    terms = [
        -logsigmoid((1 if i == j else -1) * (scale * (v[i] @ t[j]) + bias)) for i in range(PAIRS) for j in range(PAIRS)
    ]
    loss = torch.stack(terms).sum()
    return [loss.detach(), *torch.autograd.grad(loss, given)]


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("config", IN_BLOCKS, ids=str)
def test_blocks_are_the_whole_matrix(config: ContrastConfig) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        given = inputs(dtype)
        found = sigmoid_contrast(*given, config)
        result = [found.loss.detach(), *torch.autograd.grad(found.loss, given, retain_graph=True)]
        agree(result, plain(dtype), tolerance)
        agree([x.double() for x in result], by_loops(), 3e-6 if dtype == torch.float32 else 1e-12)
        agree([*torch.autograd.grad(found.loss, given)], plain(dtype)[1:], tolerance)  # nothing was used up
    v, t = inputs(torch.float64)[:2]
    assert float(found.correct_i2t) == float((similarity(v, t).argmax(1) == torch.arange(PAIRS)).sum())
    assert float(found.correct_t2i) == float((similarity(v, t).argmax(0) == torch.arange(PAIRS)).sum())


def test_sure_answers_do_not_overflow() -> None:
    v = torch.eye(2)
    found = sigmoid_contrast(v, v, torch.tensor([1000.0]), torch.tensor([500.0]), ContrastConfig())
    assert found.loss.item() == pytest.approx(1000.0)  # two mismatches at 500, two pairs at 1500


def of_ranks(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """For each configuration the loss and all gradients as one process would have them."""
    out, share = {}, PAIRS // world_size
    own = slice(rank * share, (rank + 1) * share)
    for config in (*IN_BLOCKS, *RINGS):
        v, t, scale, bias = inputs(torch.float64)
        given = [v[own].detach().requires_grad_(), t[own].detach().requires_grad_(), scale, bias]
        found = sigmoid_contrast(*given, config)
        own_grads = torch.autograd.grad(found.loss, given)
        rows = [dist.gather(x.contiguous()) for x in own_grads[:2]]
        sums = [dist.sum_over_ranks(x) for x in (found.loss.detach(), *own_grads[2:])]
        correct = dist.sum_over_ranks(torch.stack([found.correct_i2t, found.correct_t2i]))
        out[str(config)] = [sums[0], *rows, *sums[1:], correct]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_process(world_size: int) -> None:
    v, t = inputs(torch.float64)[:2]
    cosines, own = similarity(v, t), torch.arange(PAIRS)
    correct = torch.stack([(cosines.argmax(1) == own).sum(), (cosines.argmax(0) == own).sum()]).double()
    for found in run(of_ranks, world_size):
        for result in found.values():
            agree(result, [*plain(torch.float64), correct], 1e-12)
