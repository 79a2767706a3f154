"""Which piece of which parameter lies where in the flat tensors that ZeRO hands to the optimizer.

Under ZeRO 1-3 the optimizer never sees a parameter: it sees, for each group, one flat fp32 tensor holding this rank's
share of all of them. A `Segment` names one contiguous run of one parameter in such a tensor. LAMB needs them for its
per-parameter norms and checkpoints for being independent of stage and world size. This file alone reads DeepSpeed's
private layout; tests/engine/test_zero.py holds it against parameters that one plain process trained.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpt import dist


@dataclass(frozen=True)
class Segment:
    """flat[flat_start : flat_start + length] is parameter.flatten()[start : start + length]."""

    name: str
    shape: tuple[int, ...]
    """The whole parameter's shape."""
    start: int
    length: int
    flat: Tensor
    """The optimizer's own fp32 tensor: the master weights, and the key of its state."""
    flat_start: int

    def of(self, flat: Tensor) -> Tensor:
        """This segment's run in a tensor laid out like `flat` (the masters, or an optimizer moment). A view."""
        return flat.view(-1)[self.flat_start : self.flat_start + self.length]


def segments(engine: Any) -> list[Segment]:
    """Every segment that this rank's optimizer holds, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [
            Segment(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0)
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        ]
    return _segments_of_flat_groups(engine, names) if stage < 3 else _segments_of_shards(engine, names)


def _segments_of_flat_groups(engine: Any, names: dict[int, str]) -> list[Segment]:
    """ZeRO 1 and 2: a group's parameters are laid end to end and the whole is cut into W equal partitions."""
    zero: Any = engine.optimizer
    found: list[Segment] = []
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        low = dist.rank() * zero.partition_size[group]
        high = low + zero.partition_size[group]
        for parameter, offset in zip(
            zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True
        ):
            first, last = max(low, offset), min(high, offset + parameter.numel())
            if first < last:
                found.append(
                    Segment(
                        names[id(parameter)], tuple(parameter.shape), first - offset, last - first, flat, first - low
                    )
                )
    return found


def _segments_of_shards(engine: Any, names: dict[int, str]) -> list[Segment]:
    """ZeRO 3: every parameter is cut into W equal shards, the last padded; a group's shards are laid end to end."""
    zero: Any = engine.optimizer
    found: list[Segment] = []
    for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        for parameter in zero.fp16_groups[group]:
            _, flat_start, shard_length = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.rank() * shard_length
            length = min(shard_length, parameter.ds_numel - start)
            if length > 0:
                found.append(Segment(names[id(parameter)], tuple(parameter.ds_shape), start, length, flat, flat_start))
    return found


def frozen_segments(engine: Any) -> list[Segment]:
    """The parameters that the optimizer does not hold: whole on every rank below stage 3, sharded at stage 3."""
    found = []
    parameter: Any
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() < 3:
            found.append(Segment(name, tuple(parameter.shape), 0, parameter.numel(), parameter.data, 0))
            continue
        shard = parameter.ds_tensor.data
        start = dist.rank() * shard.numel()
        length = min(shard.numel(), parameter.ds_numel - start)
        if length > 0:
            found.append(Segment(name, tuple(parameter.ds_shape), start, length, shard, 0))
    return found


@torch.no_grad()
def refresh_parameters(engine: Any) -> None:
    """Make the parameters that the model computes with agree with the fp32 masters, after those were written to."""
    zero: Any = engine.optimizer
    if engine.zero_optimization_stage() in (1, 2):
        zero.update_lp_params()
    elif engine.zero_optimization_stage() == 3:
        persistent = zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)


def clear_gradient_shards(engine: Any) -> None:
    """Zero what ZeRO 3 accumulates gradients in; call after every step. Nothing to do at the other stages.

    DeepSpeed overwrites a parameter's buffer in a step's first backward and adds to it afterwards. A parameter that the
    first backward does not reach (here all but the temperature, when features are cached) would otherwise be given the
    previous step's gradient once more.
    """
    if engine.zero_optimization_stage() == 3:
        zero: Any = engine.optimizer
        zero.grad_partitions_flat_buffer.zero_()


def spoil_gradients(engine: Any) -> None:
    """Make the gradient that the next step would apply not finite, which makes it apply nothing, on any rank."""
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    elif engine.zero_optimization_stage() == 3:
        gradients = [engine.optimizer.grad_partitions_flat_buffer]
    else:
        averaged = engine.optimizer.averaged_gradients
        gradients = [gradient for group in averaged.values() for gradient in group if gradient is not None]
    for gradient in gradients:
        gradient.fill_(float("nan"))
