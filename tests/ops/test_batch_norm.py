"""Batch norm over ranks against torch's over the whole batch in one process: values, gradients, statistics, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpt import dist
from mmpt.ops.batch_norm import BatchNormed, _BatchNorm, batch_norm

EPS = 1e-3
SHAPES = {"places": (12, 5, 3, 4), "vectors": (12, 5), "one place": (12, 5, 1, 1)}
SHARES = {1: (12,), 2: (5, 7), 4: (1, 4, 0, 7)}  # samples of each rank; one has none
Result = tuple[Tensor, ...]


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, far from 0, the gradient of y, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64, generator=generator)
    return 3 * x + 1000, grad, weight, bias


def wanted(shape: tuple[int, ...]) -> Result:
    """y, mean, unbiased variance, and the gradients of x, weight and bias."""
    x, grad, weight, bias = data(shape)
    x.requires_grad_()
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], EPS, momentum=1.0).double()
    with torch.no_grad():
        theirs.weight.copy_(weight), theirs.bias.copy_(bias)
    y = theirs(x)
    y.backward(grad)
    grads = [x.grad, theirs.weight.grad, theirs.bias.grad]
    return (y.detach(), theirs.running_mean, theirs.running_var, *grads)  # type: ignore[arg-type,return-value]


def found(function: Any, shape: tuple[int, ...], own: slice, dtype: torch.dtype = torch.float64) -> Result:
    x, grad, weight, bias = data(shape)
    x = x[own].to(dtype).requires_grad_()
    weight, bias = (p.to(dtype).requires_grad_() for p in (weight, bias))
    y, mean, variance = function(x, weight, bias, EPS)
    assert y.dtype == dtype and not mean.requires_grad and not variance.requires_grad
    grads = torch.autograd.grad(y, (x, weight, bias), grad[own].to(dtype))
    return (y.detach(), mean, variance, *grads)


def over_ranks(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> BatchNormed:
    """The way of several ranks, where there is one."""
    return BatchNormed(*_BatchNorm.apply(x, weight, bias, eps))


@pytest.mark.parametrize("function", [batch_norm, over_ranks])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_as_torch(function: Any, shape: tuple[int, ...]) -> None:
    for mine, theirs in zip(found(function, shape, slice(None)), wanted(shape), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_by_finite_differences() -> None:
    x, _, weight, bias = data((4, 5, 2, 1))
    inputs = [(x / 1000).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *p: over_ranks(*p, EPS).y, inputs)


@pytest.mark.parametrize("function", [batch_norm, over_ranks])
def test_half_precision_keeps_statistics_in_fp32(function: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 3, 8, 8, generator=generator) + 8).bfloat16()
    weight, bias = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    y, mean, variance = function(x, weight, bias, EPS)
    assert y.dtype == torch.bfloat16 and mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, x.double().mean([0, 2, 3]).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.double().var([0, 2, 3]).float(), rtol=1e-5, atol=0)
    mixed = function(x, weight.float(), bias.float(), EPS).y  # under autocast parameters stay in fp32
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, y)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two values per channel or more, got \[1, 5\]"):
        batch_norm(torch.zeros(1, 5), torch.ones(5), torch.zeros(5), EPS)


def check(rank: int, world_size: int) -> None:
    """Ranks with unequal shares are one batch: runs in tests/methods/test_towers.py, in ranks that are there anyway."""
    shares = SHARES[world_size]
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    for shape in SHAPES.values():
        y, mean, variance, of_x, of_weight, of_bias = wanted(shape)
        of_weight, of_bias = (sum_of.clone() for sum_of in (of_weight, of_bias))
        mine = list(found(batch_norm, shape, own))
        mine[4:] = [dist.sum_over_ranks(grad) for grad in mine[4:]]
        for a, b in zip(mine, (y[own], mean, variance, of_x[own], of_weight, of_bias), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    # fp32, means a thousand times the deviation: no worse than torch's over the whole batch
    exact = wanted(SHAPES["places"])[0][own]
    single = found(batch_norm, SHAPES["places"], own, torch.float32)[0]
    assert not len(single) or (single - exact).abs().max() < 1e-3
