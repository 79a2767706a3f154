"""The momentum copy of part of a method: t <- m t + (1 - m) s, in fp32, once after every applied optimizer step.

He et al. 2020, "Momentum Contrast", eq. 2; ALBEF (Li et al. 2021, section 3.2). The published codes update first thing
in a step, which is the same: after the last one. A bf16 copy at m = 0.995 would never move, and one inside the engine
would be bf16; so the copy is whole on every rank, outside the engine, and follows the fp32 masters wherever ZeRO keeps
them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmpt import dist
from mmpt.engine.partition import Segment, segments
from mmpt.methods.method import Method

BUCKET_ELEMENTS = 1 << 26


@torch.no_grad()
def advance(method: Method, engine: Any, momentum: float) -> None:
    """Let the copy follow one step; momentum 0 makes it equal to the student. Collective where the masters are sharded.

    Every element of a master belongs to one rank, which computes the new value; the others add zeros, so that the copy
    is the same to the bit at every stage and world size. Locked parameters never change and are left alone.
    """
    own = _by_parameter(method, segments(engine))
    if engine.zero_optimization_stage() == 0:
        for parameter, pieces in own:
            for piece in pieces:
                parameter.view(-1).lerp_(piece.of(piece.flat).to(parameter.dtype), 1 - momentum)
        return
    for bucket in _buckets(own):
        moved = torch.zeros(sum(parameter.numel() for parameter, _ in bucket), device=bucket[0][0].device)
        first = 0
        for parameter, pieces in bucket:
            for piece in pieces:
                old = parameter.view(-1)[piece.start : piece.start + piece.length]
                new = old.lerp(piece.of(piece.flat), 1 - momentum)
                moved[first + piece.start : first + piece.start + piece.length] = new
            first += parameter.numel()
        parts = dist.sum_over_ranks(moved).split([parameter.numel() for parameter, _ in bucket])
        for (parameter, _), values in zip(bucket, parts, strict=True):
            parameter.copy_(values.view(parameter.shape))


def _by_parameter(method: Method, owned: list[Segment]) -> list[tuple[Tensor, list[Segment]]]:
    """Each trained parameter of the copy, in an order that all ranks share, with the pieces of its student we hold."""
    teacher, prefix = method.teacher, method.student + "."
    assert teacher is not None
    pieces: dict[str, list[Segment]] = {}
    for piece in owned:
        pieces.setdefault(piece.name, []).append(piece)
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    return [
        (parameter, pieces.get(prefix + name, []))
        for name, parameter in teacher.named_parameters()
        if prefix + name in trained
    ]


def _buckets(pairs: list[tuple[Tensor, list[Segment]]]) -> Iterator[list[tuple[Tensor, list[Segment]]]]:
    bucket: list[tuple[Tensor, list[Segment]]] = []
    for pair in pairs:
        bucket.append(pair)
        if sum(parameter.numel() for parameter, _ in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
