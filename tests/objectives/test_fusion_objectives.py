"""Transport against a linear program and the published iteration; matching, hard negatives and region losses."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from mmpt.objectives.distillation import soft_cross_entropy
from mmpt.objectives.matching import hard_negatives, matching_loss, matching_score
from mmpt.objectives.regions import class_divergence, class_regression, feature_regression, region_classes
from mmpt.objectives.transport import costs, transport_distance, transport_plan


def sets(seed: int, n: int = 5, m: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, 4, generator=generator), torch.randn(1, m, 4, generator=generator)


def everything(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def cheapest(cost: np.ndarray) -> float:
    """The optimal transport between two uniform distributions, as a linear program."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=marginals).fun


@pytest.mark.parametrize("seed", range(5))
def test_transport_is_within_a_thousandth_of_the_optimum(seed: int) -> None:
    x, y = sets(seed)
    found = transport_distance(x, y, everything(x), everything(y))
    optimum = cheapest(costs(x, y)[0].double().numpy())
    assert found.item() == pytest.approx(optimum, abs=1e-2) and found.item() >= optimum - 2e-3
    longer = transport_distance(x, y, everything(x), everything(y), iterations=3000)
    assert longer.item() == pytest.approx(optimum, abs=1e-3)


def published_plan(cost: Tensor, iterations: int) -> Tensor:
    """Xie et al. 2018, algorithm 1, for one pair of sets without pads, in plain matrix products."""
    n, m = cost.shape
    kernel, plan, sigma = (
        torch.exp(-cost / 0.5).T,
        torch.ones(m, n, dtype=cost.dtype),
        torch.full((n, 1), 1 / n).to(cost),
    )
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (m * (q @ sigma))
        sigma = 1 / (n * (q.T @ delta))
        plan = delta * q * sigma.T
    return plan.T


def test_transport_is_the_published_iteration_and_pads_do_not_matter() -> None:
    shapes = [(5, 7), (2, 3), (4, 1), (1, 6)]
    pairs = [sets(i, n, m) for i, (n, m) in enumerate(shapes)]
    x, y = torch.randn(4, 5, 4), torch.randn(4, 7, 4)  # what pads hold is anything
    x_real, y_real = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 7, dtype=torch.bool)
    for i, (a, b) in enumerate(pairs):
        x[i, : a.shape[1]], y[i, : b.shape[1]] = a[0], b[0]
        x_real[i, : a.shape[1]], y_real[i, : b.shape[1]] = True, True
    plans = transport_plan(costs(x, y), x_real, y_real)
    for i, (a, b) in enumerate(pairs):
        n, m = shapes[i]
        torch.testing.assert_close(plans[i, :n, :m], published_plan(costs(a, b)[0], 50), rtol=1e-4, atol=1e-6)
        assert plans[i].sum().item() == pytest.approx(1, abs=1e-3) and plans[i, n:].sum() == plans[i, :, m:].sum() == 0


def test_transport_of_nothing_is_nothing_and_costs_have_the_gradient() -> None:
    x, y = sets(0)
    none = torch.zeros(1, 5, dtype=torch.bool)
    assert transport_distance(x, y, none, everything(y)).tolist() == [0.0]
    x.requires_grad_()
    transport_distance(x, y, everything(x), everything(y)).sum().backward()
    plan = transport_plan(costs(x, y).detach(), everything(x), everything(y))
    (by_costs,) = torch.autograd.grad((plan * costs(x, y)).sum(), x)
    torch.testing.assert_close(x.grad, by_costs)


def test_hard_negatives_follow_the_softmax_without_positives() -> None:
    similarity = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).repeat(20_000, 1)
    own = torch.zeros(20_000, 4, dtype=torch.bool)
    own[:, 0] = True
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts = torch.bincount(hard_negatives(similarity, own, draws), minlength=4) / 20_000
    expected = torch.cat([torch.zeros(1), similarity[0, 1:].softmax(0)])
    torch.testing.assert_close(counts, expected, rtol=0, atol=1e-4)


def test_hard_negatives_at_the_lowest_temperature_and_edges() -> None:
    """Where the published order, softmax first and the positive to zero afterwards, leaves a row of zeros."""
    similarity = torch.tensor([[1000.0, -1000.0, -900.0], [0.0, 0.0, 0.0]])
    own = torch.tensor([[True, False, False], [False, False, True]])
    for draw in (1e-9, 0.5, 1 - 2**-53):
        found = hard_negatives(similarity, own, torch.full((2,), draw, dtype=torch.float64)).tolist()
        assert found[0] == 2 and found[1] in (0, 1)
    with pytest.raises(ValueError, match="two pairs or more"):
        hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))


def test_matching_and_soft_targets() -> None:
    logits, matches = torch.randn(6, 2), torch.tensor([True, False, True, True, False, False])
    assert matching_loss(logits, matches).item() == pytest.approx(6 * cross_entropy(logits, matches.long()).item())
    torch.testing.assert_close(matching_score(logits), logits.softmax(1)[:, 1].logit())
    targets = torch.randn(6, 4).softmax(1)
    wide = torch.randn(6, 4)
    torch.testing.assert_close(soft_cross_entropy(wide, targets), cross_entropy(wide, targets, reduction="none"))


def test_region_losses() -> None:
    guesses, features = torch.randn(5, 8), torch.randn(5, 8)
    assert feature_regression(guesses, features).item() == pytest.approx(5 * mse_loss(guesses, features).item())
    logits, found = torch.randn(5, 6), torch.randn(5, 6).softmax(1)
    found[0] = torch.tensor([0.9, 0.02, 0.05, 0.01, 0.01, 0.01])  # mostly background, which may not be the answer
    assert region_classes(found).tolist() == [2, *(int(row[1:].argmax()) + 1 for row in found[1:])]
    expected = cross_entropy(logits, region_classes(found), reduction="sum")
    torch.testing.assert_close(class_regression(logits, found), expected)
    by_torch = kl_div(logits.log_softmax(1), found, reduction="sum") / 6
    torch.testing.assert_close(class_divergence(logits, found), by_torch)
