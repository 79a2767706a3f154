"""NT-Xent against the published formula by plain loops, and over ranks with the projector's batch norm in front."""

import math

import pytest
import torch
from torch import Tensor, nn

from mmpt import dist
from mmpt.models.batch_norm import settle, use_batch_norm
from mmpt.models.dual_tower import unit
from mmpt.models.projector import Projector, ProjectorConfig
from mmpt.objectives.two_views import two_views
from mmpt.ops.batch_norm import batch_norm

IMAGES, WIDTH = 8, 6


def views() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, IMAGES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a.requires_grad_(), b.requires_grad_()


def by_hand(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, eq. 1 and algorithm 1: z_2k-1 and z_2k are the views of image k."""
    z = [row for pair in zip(a, b, strict=True) for row in pair]

    def s(i: int, j: int) -> Tensor:
        return (z[i] @ z[j] / (z[i].norm() * z[j].norm())) / temperature

    def loss(i: int, j: int) -> Tensor:
        return -(s(i, j).exp() / sum(s(i, k).exp() for k in range(len(z)) if k != i)).log()

    return torch.stack([loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(len(a))]).sum() / len(z)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_pieces_are_the_published_loss(ranks: int, temperature: float) -> None:
    a, b = views()
    expected, share = by_hand(a, b, temperature), IMAGES // ranks
    x, y = unit(a), unit(b)
    pieces = [two_views(x[i : i + share], y[i : i + share], x, y, i, temperature) for i in range(0, IMAGES, share)]
    loss = torch.stack([piece.loss for piece in pieces]).sum() / IMAGES
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)))
    nearest = torch.cat([y @ x.T, (x @ x.T).fill_diagonal_(-2)]).argmax(0)
    assert sum(int(piece.correct) for piece in pieces) == int((nearest == torch.arange(IMAGES)).sum())


def test_a_batch_of_one_image_has_nothing_to_tell_apart() -> None:
    a, b = (unit(x[:1]) for x in views())
    assert two_views(a, b, a, b, 0).loss.item() == 0.0


def test_half_precision_products_are_in_fp32() -> None:
    a, b = (unit(x.detach().bfloat16()) for x in views())
    with torch.autocast("cpu", torch.bfloat16):
        loss = two_views(a, b, a, b, 0).loss
    torch.testing.assert_close(loss.double() / IMAGES, by_hand(a.double(), b.double(), 0.1), rtol=5e-3, atol=0)


def in_torch(ours: Projector) -> nn.Sequential:
    """The projector in torch's own modules, with the same linears."""
    norms = [nn.BatchNorm1d(len(norm.weight)) for norm in (ours.norm_1, ours.norm_2)]
    linears = ours.linear_1, ours.linear_2, ours.linear_3
    return nn.Sequential(linears[0], norms[0], nn.ReLU(), linears[1], norms[1], nn.ReLU(), linears[2]).double()


def projected(rank: int, world_size: int) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients averaged over ranks as the engine does, and running statistics after the step."""
    torch.manual_seed(0)
    projector = Projector(WIDTH, ProjectorConfig(hidden_width=10, width=5)).double()
    use_batch_norm(projector, batch_norm)
    share = IMAGES // world_size
    a, b = (unit(projector(x[rank * share : (rank + 1) * share])) for x in views())
    found = two_views(a, b, dist.gather(a), dist.gather(b), rank * share)
    (world_size * found.loss / IMAGES).backward()
    settle(projector)
    gradients = {name: dist.sum_over_ranks(p.grad) / world_size for name, p in projector.named_parameters()}  # type: ignore[arg-type]
    return float(dist.sum_over_ranks(found.loss)) / IMAGES, gradients, dict(projector.named_buffers())


def check(rank: int, world_size: int, expected: tuple[float, dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Ranks are one process: runs in tests/methods/test_towers.py, in ranks that are there anyway."""
    loss, gradients, buffers = projected(rank, world_size)
    assert loss == pytest.approx(expected[0], rel=1e-9)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(buffers, expected[2], rtol=1e-8, atol=1e-10)


def test_one_process_is_torchs_modules_and_the_published_loss() -> None:
    loss, gradients, buffers = projected(0, 1)
    torch.manual_seed(0)
    theirs = in_torch(Projector(WIDTH, ProjectorConfig(hidden_width=10, width=5)))
    expected = by_hand(*(theirs(x) for x in views()), 0.1)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for i, name in ((0, "linear_1"), (1, "norm_1"), (3, "linear_2"), (4, "norm_2"), (6, "linear_3")):
        for kind in ("weight", "bias"):
            torch.testing.assert_close(
                gradients[f"{name}.{kind}"], theirs[i].get_parameter(kind).grad, rtol=1e-8, atol=1e-10
            )
    # torch updates twice with a tenth each, once for each view; ours once, with their mean
    for i, name in ((1, "norm_1"), (4, "norm_2")):
        norm = nn.BatchNorm1d(10, momentum=None).double()  # a plain mean over forwards
        with torch.no_grad():
            for x in views():
                norm(theirs[:i](x))
        torch.testing.assert_close(buffers[f"{name}.running_mean"], 0.1 * norm.running_mean)
        torch.testing.assert_close(buffers[f"{name}.running_variance"], 0.9 + 0.1 * norm.running_var)


def test_the_published_head() -> None:
    """4096-4096-256 on ViT-B, as in SLIP's released code; torch's initial weights."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Projector(768, ProjectorConfig()).parameters())
    assert count == (768 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 256 + 4 * 4096
    torch.manual_seed(0)
    bound = Projector(64, ProjectorConfig(32, 8)).linear_1.weight.abs().max().item()
    assert bound == pytest.approx(1 / math.sqrt(64), rel=0.01)
