"""A ceiling that the optimizer can come back from, against clamping the parameter after every step."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmpt import dist
from mmpt.ops.bounded import bounded, capped_exp
from tests.ranks import run

CAP = 100.0
STEPS, LEAVES, RETURNS = 3000, 700, 2000  # the optimum is above the cap between the last two


def optimum(step: int) -> float:
    """Scale that minimises the loss at this step: 60, then 300 for 1300 steps, then 40."""
    return 60.0 if step < LEAVES else 300.0 if step < RETURNS else 40.0


def straight_through(log_scale: Tensor, cap: float) -> Tensor:
    return (log_scale + (log_scale.clamp(max=math.log(cap)) - log_scale).detach()).exp()


def uncapped(log_scale: Tensor, cap: float) -> Tensor:
    return log_scale.exp()


def plain_clamp(log_scale: Tensor, cap: float) -> Tensor:
    return log_scale.clamp(max=math.log(cap)).exp()


@functools.cache
def trajectory(
    scale_of: Callable[[Tensor, float], Tensor], optimizer: str, clamp_after_step: bool = False
) -> tuple[list[float], list[float]]:
    """Scale in the forward and parameter, step by step, while an optimiser follows the moving optimum."""
    log_scale = torch.nn.Parameter(torch.tensor([math.log(1 / 0.07)], dtype=torch.float64))
    step_of = {
        "adam": lambda: torch.optim.Adam([log_scale], lr=5e-3, betas=(0.9, 0.98)),
        "sgd": lambda: torch.optim.SGD([log_scale], lr=2e-2),
        "momentum": lambda: torch.optim.SGD([log_scale], lr=2e-3, momentum=0.9),
    }[optimizer]()
    scales, parameters = [], []
    for step in range(STEPS):
        scale = scale_of(log_scale, CAP)
        loss = (scale.log() - math.log(optimum(step))).square().sum() / 2
        step_of.zero_grad()
        loss.backward()
        step_of.step()
        if clamp_after_step:
            with torch.no_grad():
                log_scale.clamp_(max=math.log(CAP))
        scales.append(scale.item())
        parameters.append(log_scale.item())
    return scales, parameters


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])
def test_follows_clamping_after_each_step(optimizer: str) -> None:
    reference, _ = trajectory(uncapped, optimizer, clamp_after_step=True)
    scales, parameters = trajectory(capped_exp, optimizer)
    assert max(scales) <= CAP * (1 + 1e-12) and max(reference) > CAP * 0.999
    assert scales[RETURNS - 1] == pytest.approx(CAP)
    assert max(parameters) - math.log(CAP) < 0.25, "overshoots by what momentum carries, and no more"
    ratio = [abs(ours / theirs - 1) for ours, theirs in zip(scales, reference, strict=True)]
    assert max(ratio) < 0.2
    late = [step for step in range(STEPS) if ratio[step] > 0.02]
    assert all(RETURNS <= step < RETURNS + 350 for step in late), "apart only while the optimum comes back"
    assert scales[-1] == pytest.approx(reference[-1], rel=1e-3) == pytest.approx(40.0, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])
def test_a_plain_clamp_would_freeze(optimizer: str) -> None:
    scales, _ = trajectory(plain_clamp, optimizer)
    assert scales[-1] == pytest.approx(CAP)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])
def test_a_straight_through_clamp_would_drift(optimizer: str) -> None:
    _, ours = trajectory(capped_exp, optimizer)
    scales, parameters = trajectory(straight_through, optimizer)
    assert max(parameters) - math.log(CAP) > 20 * (max(ours) - math.log(CAP))
    stuck = sum(scale > CAP * 0.999 for scale in scales[RETURNS:])
    assert stuck == STEPS - RETURNS, f"came back after {stuck} steps"


def test_gradient_below_at_and_above_the_cap() -> None:
    for start, upstream, passes in (
        (math.log(CAP) - 0.1, -1.0, True),
        (math.log(CAP) - 0.1, 1.0, True),
        (math.log(CAP), -1.0, False),
        (math.log(CAP), 1.0, True),
        (math.log(CAP) + 0.1, -1.0, False),
        (math.log(CAP) + 0.1, 1.0, True),
    ):
        log_scale = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        value = capped_exp(log_scale, CAP)
        assert value.item() == pytest.approx(min(math.exp(start), CAP))
        (value * upstream).sum().backward()
        expected = upstream * value.item() if passes else 0.0
        assert log_scale.grad is not None and log_scale.grad.item() == pytest.approx(expected), start
    below = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: capped_exp(s, CAP), (below,))


def test_a_nan_gradient_stays_visible_and_half_types_give_fp32() -> None:
    log_scale = torch.tensor([math.log(CAP)], requires_grad=True)
    (capped_exp(log_scale, CAP) * float("nan")).sum().backward()
    assert log_scale.grad is not None and log_scale.grad.isnan().all()
    half = torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True)
    assert capped_exp(half, CAP).dtype == torch.float32
    assert torch.autograd.grad(capped_exp(half, CAP).sum(), half)[0].dtype == torch.bfloat16


def test_both_bounds_block_what_goes_out_and_pass_what_comes_back() -> None:
    for x, inside in ((0.1, True), (0.001, False), (0.0005, False), (0.5, False), (0.7, False)):
        parameter = torch.tensor([x], requires_grad=True)
        for gradient in (-1.0, 1.0):
            value = bounded(parameter, 0.001, 0.5)
            assert value.item() == pytest.approx(min(max(x, 0.001), 0.5))
            found = torch.autograd.grad(value * gradient, parameter)[0].item()
            outwards = not inside and (gradient < 0) == (x >= 0.5)
            assert found == (0.0 if outwards else gradient), (x, gradient)


def check_ranks_agree(rank: int, world_size: int) -> list[float]:
    found = []
    for gradients in ([-3.0, 1.0], [3.0, -1.0], [-1.0, -1.0]):
        log_scale = torch.tensor([math.log(CAP)], requires_grad=True)
        (capped_exp(log_scale, CAP) * gradients[rank]).sum().backward()
        assert log_scale.grad is not None
        found.append(log_scale.grad.item())
    assert dist.gather_objects(found) == [found] * world_size
    return found


@pytest.mark.slow
def test_ranks_decide_on_the_mean_gradient() -> None:
    found = run(check_ranks_agree, 2)[0]
    assert found == pytest.approx([0.0, CAP, 0.0]), "mean -1 is blocked, mean +1 passes, on both ranks alike"
