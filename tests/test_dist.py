"""Collectives with gradients: backward sums over ranks, also for strided gradients and packed sequences."""

import pytest
import torch

from mmpt import dist
from mmpt.batch import concatenate, pack, unpack
from tests.ranks import run


def check_gather(rank: int, world_size: int) -> None:
    x = torch.arange(6.0).view(3, 2).add(10 * rank).requires_grad_()
    weight = torch.arange(world_size * 6.0).view(2, world_size * 3).T  # a strided gradient arrives from here
    (dist.gather(x) * weight * (rank + 1)).sum().backward()
    total = sum(r + 1 for r in range(world_size))
    assert torch.equal(x.grad, total * weight[rank * 3 : rank * 3 + 3])


def check_gather_tokens(rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [
        [torch.randn(int(n), 4, generator=generator) for n in torch.randint(1, 9, (3,), generator=generator)]
        for _ in range(world_size)
    ]
    own = pack(parts[rank])
    x = own.x.clone().requires_grad_()
    everything = dist.gather_tokens(own.with_x(x))
    wanted = concatenate([pack(part) for part in parts])
    assert torch.equal(everything.x, wanted.x) and torch.equal(everything.offsets, wanted.offsets)
    assert everything.longest == wanted.longest and len(unpack(everything)) == 3 * world_size
    weight = torch.randn(wanted.x.shape, generator=generator)
    (everything.x * weight).sum().backward()
    start = int(wanted.offsets[3 * rank])
    torch.testing.assert_close(x.grad, world_size * weight[start : start + len(x)])


def check_logsumexp(rank: int, world_size: int) -> None:
    whole = torch.linspace(-300, 300, world_size * 5, dtype=torch.double).view(world_size, 5).requires_grad_()
    wanted = whole.logsumexp(0)
    (wanted * torch.arange(5.0, dtype=torch.double)).sum().backward()
    own = whole.detach()[rank].clone().requires_grad_()
    out = dist.logsumexp_over_ranks(own)
    torch.testing.assert_close(out, wanted.detach())
    (out * torch.arange(5.0, dtype=torch.double) / world_size).sum().backward()  # each rank holds 1 / W of the loss
    torch.testing.assert_close(own.grad, whole.grad[rank])


def check_pass_on(rank: int, world_size: int) -> None:
    """Two tensors under way at once, one of them strided, do not mix; after W hops each is at home."""
    x, y = torch.full((2, 3), float(rank)), torch.full((3, 2), 100.0 + rank).T
    for hop in range(1, world_size + 1):
        first, second = dist.pass_on(x), dist.pass_on(y, tag=1)
        y, x = second.wait(), first.wait()
        assert (x == (rank - hop) % world_size).all() and (y == 100 + (rank - hop) % world_size).all()


def check_small_things(rank: int, world_size: int) -> None:
    assert dist.gather_objects({"rank": rank}) == [{"rank": r} for r in range(world_size)]
    assert dist.broadcast_object(f"from {rank}") == "from 0"
    assert not dist.all_true(rank != world_size - 1) and dist.all_true(True)
    x = torch.tensor([float(rank)])
    assert dist.max_over_ranks(x).item() == world_size - 1 and x.item() == rank
    said = dist.gather_objects(dist.first_to_fail())
    assert sum(said) == 1


def check_all(rank: int, world_size: int) -> None:
    for check in (check_gather, check_gather_tokens, check_logsumexp, check_pass_on, check_small_things):
        check(rank, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives(world_size: int) -> None:
    run(check_all, world_size)


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, requires_grad=True)
    assert dist.gather(x) is x and dist.logsumexp_over_ranks(x) is x and dist.world_size() == 1
    assert dist.all_true(True) and dist.gather_objects(1) == [1]


def test_tasks_of_srun_that_know_no_rank_do_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed --launcher slurm` starts them so; each would take itself for rank 0 of one."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match=r"srun started 16 tasks .* launcher\.ranks"):
        dist.init()
    assert dist.launched_rank() == 3, "so that one of them speaks"
