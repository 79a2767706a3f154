"""Running statistics follow optimizer steps: accumulation, its cached first pass, checkpointing and skipped steps."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpt.engine.optim import freeze
from mmpt.models.batch_norm import BatchNorm, batch_norms, discard, settle, use_batch_norm
from mmpt.ops.batch_norm import batch_norm

CHANNELS = 4


def ready(dtype: torch.dtype = torch.float64) -> BatchNorm:
    torch.manual_seed(0)
    norm = BatchNorm(CHANNELS)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
        norm.running_mean.normal_(), norm.running_variance.uniform_(0.5, 2)
    use_batch_norm(norm, batch_norm)
    return norm.to(dtype)


def theirs(norm: BatchNorm) -> nn.BatchNorm2d:
    torchs = nn.BatchNorm2d(CHANNELS).to(norm.weight.dtype)
    torchs.load_state_dict({
        "weight": norm.weight, "bias": norm.bias, "running_mean": norm.running_mean,
        "running_var": norm.running_variance, "num_batches_tracked": torch.tensor(0),
    })  # fmt: skip
    return torchs


def images(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, CHANNELS, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 2


def same(norm: BatchNorm, torchs: nn.BatchNorm2d) -> None:
    assert torchs.running_mean is not None and torchs.running_var is not None
    torch.testing.assert_close(norm.running_mean, torchs.running_mean)
    torch.testing.assert_close(norm.running_variance, torchs.running_var)


def test_steps_without_accumulation_are_torchs_and_so_is_evaluation() -> None:
    norm = ready()
    torchs = theirs(norm)
    for step in range(3):
        torch.testing.assert_close(norm(images(step)), torchs(images(step)))
        before = norm.running_mean.clone()
        settle(norm)
        assert not torch.equal(norm.running_mean, before)
        same(norm, torchs)
    torch.testing.assert_close(norm.eval()(images(9)), torchs.eval()(images(9)))
    settle(norm)
    same(norm, torchs)


def test_statistics_move_in_a_step_and_not_in_a_forward() -> None:
    norm = ready()
    mean, variance = norm.running_mean.clone(), norm.running_variance.clone()
    parts = [images(1), images(2), images(3)]
    for part in parts:
        norm(part)
    assert torch.equal(norm.running_mean, mean)
    settle(norm)
    found = [torch.stack([part.mean([0, 2, 3]), part.var([0, 2, 3])]) for part in parts]
    step_mean, step_variance = torch.stack(found).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * step_mean)
    torch.testing.assert_close(norm.running_variance, 0.9 * variance + 0.1 * step_variance)


def test_a_first_pass_without_gradients_is_normalised_and_does_not_count() -> None:
    once, twice = ready(), ready()
    with torch.no_grad():
        first = twice(images(1))
    torch.testing.assert_close(first, once(images(1)), rtol=0, atol=0)
    twice(images(1))
    for norm in (once, twice):
        settle(norm)
    assert torch.equal(once.running_mean, twice.running_mean) and torch.equal(
        once.running_variance, twice.running_variance
    )


def test_recomputed_activations_do_not_count() -> None:
    """The norm runs three times in a step, once of them checkpointed: a second count would shift the mean."""
    results = []
    for saving in (False, True):
        norm, parts = ready(), [images(i).requires_grad_() for i in range(3)]
        middle = checkpoint(norm, parts[1], use_reentrant=False) if saving else norm(parts[1])
        total = sum(out.pow(3).sum() for out in (norm(parts[0]), middle, norm(parts[2])))
        grads = torch.autograd.grad(total, [*parts, norm.weight])  # type: ignore[arg-type]
        settle(norm)
        results.append([norm.running_mean, norm.running_variance, *grads])
    for plain, saved in zip(*results, strict=True):
        assert torch.equal(plain, saved)


def test_a_skipped_step_leaves_no_trace() -> None:
    norm = ready()
    before = copy.deepcopy(norm.state_dict())
    norm(images(1) * float("nan"))
    discard(norm)
    settle(norm)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_locked_norm_stands_still() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Sequential(ready()), nn.Sequential(ready())

    towers = Towers()
    (norm,), (other,) = (batch_norms(tower) for tower in (towers.image, towers.text))
    before = norm.running_mean.clone()
    freeze(towers, "image")
    torch.testing.assert_close(towers.image(images(1)), theirs(norm).eval()(images(1)))
    torch.testing.assert_close(towers.text(images(1)), theirs(other)(images(1)))
    settle(towers)
    assert torch.equal(norm.running_mean, before) and not torch.equal(other.running_mean, before)


def test_a_teacher_has_the_statistics_of_its_batch() -> None:
    """It follows the student's parameters; nothing follows its running statistics, and nothing reads them."""
    teacher = copy.deepcopy(ready()).requires_grad_(False)
    before = teacher.running_mean.clone()
    with torch.no_grad():
        torch.testing.assert_close(teacher(images(1)), theirs(teacher)(images(1)))
    settle(teacher)
    assert torch.equal(teacher.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_running_statistics(dtype: torch.dtype) -> None:
    norm = ready(torch.float32)
    exact = norm.running_variance.clone()
    tower = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), norm).to(dtype)
    assert norm.weight.dtype == dtype and norm.running_mean.dtype == torch.float32
    assert torch.equal(norm.running_variance, exact)
    assert tower.eval()(images(1).to(dtype)).dtype == dtype
    assert norm.double().running_mean.dtype == torch.float64
    with torch.device("meta"):
        empty = BatchNorm(CHANNELS)
    assert empty.to(dtype).running_mean.dtype == torch.float32 and empty.running_mean.is_meta


def test_training_wants_a_method() -> None:
    tower = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), BatchNorm(CHANNELS), BatchNorm(CHANNELS))
    assert len(batch_norms(tower)) == 2
    with pytest.raises(ValueError, match=r"use_batch_norm\(self, batch_norm\)"):
        tower(torch.zeros(2, 3, 1, 1))
    tower.eval()(torch.zeros(2, 3, 1, 1))
    use_batch_norm(tower, batch_norm)
    tower.train()(torch.zeros(2, 3, 1, 1))
