"""Norms of gradient, update and weights by part of the model, at the steps that are recorded.

    grad_norm/P     |g_P|, before clipping          update_norm/P   |w_P(t+1) - w_P(t)|
    update_ratio/P  update_norm/P / |w_P(t)|        P: image, text (the towers), rest (projections, temperature, fusion)

At every ZeRO stage the optimizer is handed fp32 tensors with their gradients, and steps them one group at a time: hooks
around its step see both, and engine/partition.py says which run belongs to which parameter. A step that is not watched
costs nothing; one that is holds a copy of this rank's fp32 weights during the optimizer's step, when the activations
are gone, and ends in one all-reduce of nine numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmpt.engine.optim import tower_of
from mmpt.engine.partition import Segment

PARTS = ("image", "text", "rest")
GRADIENT, UPDATE, WEIGHT = range(3)


class PartNorms:
    """segments: what this rank's optimizer holds. over_ranks: sums a vector over the ranks that hold other pieces."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, segments: list[Segment], over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
    ):  # fmt: skip
        self.watching = False
        """Whether the next step is measured."""
        self._over_ranks, self._device = over_ranks, device
        self._segments: dict[int, list[tuple[int, Segment]]] = {}
        for segment in segments:
            part = PARTS.index(tower_of(segment.name) or "rest")
            self._segments.setdefault(id(segment.flat), []).append((part, segment))
        self._squares: Tensor | None = None
        self._before: dict[int, Tensor] = {}
        optimizer.register_step_pre_hook(self._look_before)
        optimizer.register_step_post_hook(self._look_after)

    @torch.no_grad()
    def _look_before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self.watching:
            return
        if self._squares is None:
            self._squares = torch.zeros(3, len(PARTS), device=self._device)
        for flat in _held(optimizer):
            assert flat.grad is not None
            self._add(GRADIENT, flat, flat.grad)
            self._add(WEIGHT, flat, flat)
            self._before[id(flat)] = flat.detach().clone()

    @torch.no_grad()
    def _look_after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in _held(optimizer) if self.watching else ():
            self._add(UPDATE, flat, self._before.pop(id(flat)).sub_(flat))

    def _add(self, kind: int, flat: Tensor, values: Tensor) -> None:
        assert self._squares is not None
        for part, segment in self._segments.get(id(flat), []):
            run = values.reshape(-1)[segment.flat_start : segment.flat_start + segment.length]
            self._squares[kind, part] += torch.linalg.vector_norm(run, dtype=torch.float32).square()

    def record(self, grad_norm: float) -> dict[str, float]:
        """What was measured since the last call, the same on every rank; nothing if the step was skipped. Collective.

        grad_norm: of the whole model before clipping; the optimizer sees gradients after it.
        """
        if self._squares is None:
            return {}
        squares, self._squares = self._over_ranks(self._squares), None
        norms = squares.double().sqrt().cpu()
        clipped = float(norms[GRADIENT].square().sum().sqrt())
        norms[GRADIENT] *= grad_norm / clipped if clipped else 0.0
        out: dict[str, float] = {}
        for part, (gradient, update, weight) in zip(PARTS, norms.T.tolist(), strict=True):
            if weight:
                out |= {
                    f"grad_norm/{part}": gradient,
                    f"update_norm/{part}": update,
                    f"update_ratio/{part}": update / weight,
                }
        return out


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What is being stepped at the moment: ZeRO hands over one group at a time."""
    return [flat for group in optimizer.param_groups for flat in group["params"] if flat.grad is not None]
