"""A method becomes a DeepSpeed engine. Its configuration is a pure function of ours; there is no second JSON."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor
from torch.profiler import record_function

from mmpt import dist
from mmpt.config import at_least
from mmpt.engine.lamb import Lamb
from mmpt.engine.norms import PartNorms
from mmpt.engine.optim import OptimConfig, build_optimizer, freeze, parameter_groups
from mmpt.engine.partition import clear_gradient_shards, segments, spoil_gradients
from mmpt.engine.teacher import advance
from mmpt.engine.zero_waits import time_zero
from mmpt.methods.method import Method


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 replicates everything, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision; master weights and optimizer moments are fp32 in each."""
    max_micro_batch: int = 1024
    """Most pairs per device in one forward; a larger share of the batch is accumulated, keeping all its negatives."""
    max_micro_batch_tokens: int = 0
    """Most tokens, of texts and pictures together, per device in one forward; above 0 it takes the place of
    max_micro_batch, for pairs that differ much in length (UNITER counts so)."""
    bucket_elements: int = 50_000_000
    """Elements per communication bucket of gradients and parameters."""
    keep_whole_elements: int = 100_000
    """At ZeRO 3, parameters with fewer elements than this stay whole on every rank, which saves small gathers."""
    overlap_communication: bool = True
    """Reduce gradients while the backward is still running (CUDA only)."""
    timeout_seconds: float = 600.0
    """A collective that takes longer than this ends the run."""
    max_consecutive_skips: int = 20
    """Stop after this many optimizer steps in a row were skipped because a gradient was not finite."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_micro_batch", "bucket_elements", "max_consecutive_skips")
        at_least(0, self, "max_micro_batch_tokens", "keep_whole_elements")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")


def deepspeed_config(config: EngineConfig, clip_norm: float, micro_batch: int, world_size: int, cuda: bool) -> dict:
    """DeepSpeed's dictionary. Every default that changes results or failure behaviour is written out, because several
    changed during 2026 (clipping 0 to 1, bf16 overflow checks, timeouts 30 to 10 minutes).

    One engine step is one boundary: accumulation is ours (mmpt/engine/step.py), since a contrastive loss cannot be
    accumulated by adding up micro-batches.
    """
    # Stage 0 has no sharded optimizer: there DeepSpeed is left in fp32 and we clip and check ourselves (Engine.step).
    sharded = config.zero_stage > 0
    half = config.precision if sharded else "fp32"
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch * world_size,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
        "gradient_clipping": clip_norm if sharded else 0.0,
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": half,
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": config.overlap_communication and cuda,
            "reduce_bucket_size": config.bucket_elements,
            "allgather_bucket_size": config.bucket_elements,
            "round_robin_gradients": False,
        },
        "bf16": {"enabled": half == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": half == "fp16", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000},
    }
    if config.zero_stage == 3:
        out["zero_optimization"] |= {
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_prefetch_bucket_size": config.bucket_elements,
            "stage3_param_persistence_threshold": config.keep_whole_elements,
            "sub_group_size": 1_000_000_000,
        }
    return out


@dataclass(frozen=True)
class StepResult:
    applied: bool
    """False where the gradient was not finite on some rank; then nothing changed on any rank."""
    grad_norm: float
    """Global gradient norm before clipping."""
    ballot: tuple[float, ...] = ()
    """What the ranks had to say when the step began, summed over ranks; see engine/stopping.py."""


class Engine:
    """DeepSpeed's engine with what differs between its stages evened out. Parameters are whole only inside a call."""

    def __init__(self, deepspeed_engine: Any, config: EngineConfig, clip_norm: float):
        self.deepspeed, self.config, self.clip_norm = deepspeed_engine, config, clip_norm
        self.segments = segments(deepspeed_engine)
        self.norms = PartNorms(self.optimizer, self.segments, self.over_pieces, self.device)

    @property
    def method(self) -> Method:
        """For names, shapes, modes and methods without parameters; compute through the call."""
        return self.deepspeed.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The client optimizer, whose groups are those of engine/optim.py."""
        return self.deepspeed.optimizer.optimizer if self.config.zero_stage else self.deepspeed.optimizer

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    def over_pieces(self, vector: Tensor) -> Tensor:
        """The sum over the ranks that hold different pieces of the same parameters."""
        return dist.sum_over_ranks(vector) if self.config.zero_stage else vector

    @property
    def loss_scale(self) -> float:
        """What `backward` multiplies a loss by: 1 but in fp16."""
        return float(self.deepspeed.optimizer.cur_scale) if self._fp16() else 1.0

    def _fp16(self) -> bool:
        return self.config.precision == "fp16" and self.config.zero_stage > 0

    def __call__(self, name: str, *args: Any) -> Any:
        """Run the method's function of that name, with its parameters gathered where they are sharded."""
        with self._autocast():
            return self.deepspeed(name, *args)

    def _autocast(self) -> contextlib.AbstractContextManager:
        # Stage 0 keeps fp32 parameters and casts on the fly; the other stages hold a half-precision copy.
        if self.config.zero_stage == 0 and self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this loss's gradients. `last` marks the one after which ranks exchange them."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        with record_function("mmpt: backward"):
            self.deepspeed.backward(loss)

    def step(self, lr: float, dropped: bool = False) -> StepResult:
        """One optimizer step at this learning rate, clipped, unless a gradient is not finite anywhere.

        dropped: let it go the way of a gradient that is not finite, but for fp16's loss scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if dropped:
            spoil_gradients(self.deepspeed)
        if self.config.zero_stage == 0:
            return self._step_unsharded()
        scaler = vars(self.deepspeed.optimizer.loss_scaler)
        scale = scaler.copy()
        self.deepspeed.step()
        if dropped:
            scaler.update(scale)
        clear_gradient_shards(self.deepspeed)
        norm = self.deepspeed.get_global_grad_norm()
        applied = self.deepspeed.was_step_applied()
        return StepResult(applied, float(norm) if norm is not None and applied else float("inf"))

    def settle(self, applied: bool) -> None:
        """What follows an optimizer step: the momentum copy and the method's memory move on, if it was applied."""
        if not applied:
            self.method.after_skip()
            return
        if self.method.teacher is not None:
            advance(self.method, self.deepspeed, self.method.momentum)
        self.method.after_step()

    def _step_unsharded(self) -> StepResult:
        parameters = [p for p in self.method.parameters() if p.requires_grad]
        for parameter in parameters:  # what a step does not reach has gradient zero, as at the other stages
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        finite = bool(torch.isfinite(norm))  # gradients are already averaged: every rank sees the same
        if finite:
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return StepResult(finite, float(norm))


def build(method: Method, config: EngineConfig, optim: OptimConfig, micro_batch: int, device: torch.device) -> Engine:
    """Freeze, group, wrap. Every rank must pass a method with the same parameters (same seed)."""
    check_precision(config, device)
    freeze(method, optim.lock)
    method.to(device)
    if method.teacher is not None:
        method.teacher.to(device)
    groups = parameter_groups(method, optim)
    optimizer = build_optimizer(groups, optim, config.zero_stage, device)
    prepare_deepspeed()
    wrapped, *_ = deepspeed.initialize(
        model=method,
        optimizer=optimizer,
        config=deepspeed_config(config, optim.clip_norm, micro_batch, dist.world_size(), device.type == "cuda"),
        dist_init_required=False,
    )
    time_zero(device)
    engine = Engine(wrapped, config, optim.clip_norm)
    if isinstance(engine.optimizer, Lamb):
        names = sorted(name for name, parameter in method.named_parameters() if parameter.requires_grad)
        engine.optimizer.attach(engine.segments, names, engine.over_pieces)
    return engine


def check_precision(config: EngineConfig, device: torch.device) -> None:
    """ValueError where the device or stage cannot do what the recipe asks for."""
    if config.precision == "fp16" and config.zero_stage == 0:
        raise ValueError("engine.precision=fp16 needs a loss scaler, which comes with ZeRO stages 1 to 3, not stage 0")
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("engine.precision=fp16 is not supported on this CPU; use fp32 or bf16")


def prepare_deepspeed() -> None:
    """Keep its start-up quiet and quick.

    It logs a page of INFO lines per rank, calls collectives by names that torch renamed, and on a CPU compiles an
    all-reduce for inference that training never calls: half a minute on a fresh machine, on all ranks at once.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def evaluating(engine: Engine) -> Iterator[Engine]:
    """No gradients and no dropout inside; training mode again afterwards."""
    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            yield engine
    finally:
        engine.deepspeed.train()
