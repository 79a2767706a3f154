"""A step: the same dropout when features are computed again, no waiting for the device, DeepSpeed's settings written
out."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt import dist
from mmpt.batch import concatenate
from mmpt.data.device import Delivery
from mmpt.engine.build import EngineConfig, StepResult, build, check_precision, deepspeed_config
from mmpt.engine.metrics import Metrics
from mmpt.engine.optim import OptimConfig, parameter_groups
from mmpt.engine.step import _cached_backward, _plain_backward, total_counts, train_step
from mmpt.methods.method import loss_of
from tests.engine.toy import batches, toy
from tests.methods.tiny import batch as pairs_for
from tests.methods.tiny import build as method
from tests.ranks import run

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=0.02, eps=1e-4, weight_decay=0.1, clip_norm=0.3)


def check_replay(rank: int, world_size: int) -> None:
    """One graph over both micro-batches, drawn one after the other, moves the parameters where the engine does."""
    (batch,) = batches(16, 1)
    parts, draws = batch.split(2), 7
    plain = toy(dropout=0.5)
    torch.manual_seed(draws)
    image, words, ids = zip(*(plain.encode(part) for part in parts), strict=True)
    terms = plain.objective(torch.cat(image), concatenate(list(words)), concatenate(list(ids)))
    totals = {name: torch.tensor(float(count)) for name, count in plain.counts(batch).items()}
    loss_of(terms, totals, 1).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), OPTIM.clip_norm)
    torch.optim.AdamW(parameter_groups(plain, OPTIM), OPTIM.lr, OPTIM.betas, OPTIM.eps).step()

    engine = build(toy(dropout=0.5), EngineConfig(zero_stage=0, precision="fp32"), OPTIM, 16, CPU)
    torch.manual_seed(draws)
    assert train_step(engine, parts, OPTIM.lr)[0].applied
    assert torch.equal(torch.get_rng_state(), after(draws, parts)), "and what follows draws on, as if nothing was done"
    for name, value in plain.named_parameters():
        torch.testing.assert_close(engine.method.get_parameter(name), value, rtol=2e-6, atol=2e-6, msg=name)


def after(draws: int, parts: list) -> torch.Tensor:
    torch.manual_seed(draws)
    model = toy(dropout=0.5)
    torch.manual_seed(draws)
    for part in parts:
        model.encode(part)
    return torch.get_rng_state()


@pytest.mark.slow
def test_features_computed_again_have_the_same_dropout() -> None:
    run(check_replay, 1)


class _Reads(TorchDispatchMode):
    """How often a number is fetched from a tensor: on an accelerator each waits until the device has come so far."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "_Reads":
        whole = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> list:  # on a CPU it goes past the dispatcher
            self.count += 1
            return whole(tensor)

        torch.Tensor.tolist, self._whole = counted, whole  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._whole  # type: ignore[method-assign]
        super().__exit__(*error)


def reads_of_a_step(rank: int, world_size: int) -> dict[str, int]:
    found = {}
    for name in ("clip", "siglip", "filip"):
        engine = build(method(name), EngineConfig(zero_stage=1, precision="fp32"), OPTIM, 4, CPU)
        whole = pairs_for(name, 8, 4 * rank, 4)
        metrics = Metrics(8, CPU)
        for parts in ([whole], whole.split(2)):
            with _Reads() as reads:
                totals, _ = total_counts(engine, parts)
                terms = (_plain_backward if len(parts) == 1 else _cached_backward)(engine, parts, totals)
                metrics.add(StepResult(True, 1.0), terms, 0.0, 1.0, Delivery(parts, 8, (), []))
            found[f"{name}, {len(parts)}"] = reads.count
    return found


@pytest.mark.slow
def test_nothing_waits_for_the_device_before_the_update() -> None:
    """There DeepSpeed looks whether the gradient is finite. FILIP's ranks tell one another their numbers of tokens."""
    found = run(reads_of_a_step, 2)[0]
    assert {name: count for name, count in found.items() if "filip" not in name} == {
        "clip, 1": 0, "clip, 2": 0, "siglip, 1": 0, "siglip, 2": 0,
    }  # fmt: skip
    assert 0 < found["filip, 1"] < 10 and 0 < found["filip, 2"] < 10, found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_configuration_is_a_pure_function_that_leaves_nothing_to_defaults(stage: Any, precision: Any) -> None:
    config = EngineConfig(zero_stage=stage, precision=precision)
    made = deepspeed_config(config, 0.3, 8, 4, cuda=False)
    assert made == deepspeed_config(config, 0.3, 8, 4, cuda=False)
    assert made["gradient_clipping"] == (0.3 if stage else 0.0), "stage 0 is clipped by ourselves"
    assert made["bf16"] == {"enabled": stage > 0 and precision == "bf16", "check_grad_overflow": True}
    assert made["fp16"]["enabled"] is False and made["zero_optimization"]["stage"] == stage
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (32, 1)


def what_arrived(rank: int, world_size: int) -> list[tuple]:
    """As DeepSpeed and the process group have it."""
    found = []
    for stage in range(4):
        engine = build(toy(), EngineConfig(zero_stage=stage, precision="bf16"), OPTIM, 16, CPU).deepspeed
        found.append((engine.gradient_clipping(), engine.bfloat16_enabled(), engine.zero_optimization_stage()))
    dist.shutdown()
    dist.init(timeout_seconds=77.0)
    options = torch.distributed.distributed_c10d._get_default_group()._get_backend(CPU).options
    return [*found, (options._timeout.total_seconds(),)]


@pytest.mark.slow
def test_the_configuration_arrives() -> None:
    found = run(what_arrived, 1)[0]
    assert found == [(0.0, False, 0), (0.3, True, 1), (0.3, True, 2), (0.3, True, 3), (77.0,)]


def test_a_precision_that_is_not_to_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16 is not supported on this CPU"):
        check_precision(EngineConfig(precision="fp16", zero_stage=1), CPU)
    with pytest.raises(ValueError, match="fp16 needs a loss scaler"):
        check_precision(EngineConfig(precision="fp16", zero_stage=0), torch.device("cuda"))
