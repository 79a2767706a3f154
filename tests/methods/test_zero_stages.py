"""Two AdamW steps of every method at every ZeRO stage, undivided and with cached features, texts gathered and in a
ring, with activation checkpointing or without, follow one process with the global batch and a plain torch optimizer:
loss and gradients of the first step, and the losses after it."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmpt import dist
from mmpt.engine.build import Engine, EngineConfig, build
from mmpt.engine.optim import OptimConfig, parameter_groups
from mmpt.engine.partition import segments
from mmpt.engine.step import train_step
from mmpt.methods.method import Method, loss_of
from tests.methods.tiny import CONFIGS, batch
from tests.ranks import run

PAIRS, STEPS = 8, 2
METHODS = ("clip", "clip ring", "filip", "filip ring", "siglip")
OPTIM = OptimConfig(lr=3e-3, warmup_steps=0)
TOLERANCE = 2e-6
"""Of the first loss, and of gradients beside the largest of all; steps of Adam's size widen what follows."""


class Course(NamedTuple):
    losses: list[float]
    """Before each step and after the last."""
    gradients: dict[str, Tensor]
    """Of the first step, flattened; NaN where another rank holds them."""


def fresh(name: str, checkpoint_activations: bool = False) -> Method:
    """With towers of one block, because stage 3 sends every parameter on its way alone."""
    config: Any = CONFIGS[name]
    towers = config if name == "siglip" else config.towers
    image, text = (
        replace(tower, trunk=replace(tower.trunk, depth=1, checkpoint_activations=checkpoint_activations))
        for tower in (towers.image, towers.text)
    )
    towers = replace(towers, image=image, text=text)
    torch.manual_seed(0)
    return (towers if name == "siglip" else replace(config, towers=towers)).build()


def reference(name: str) -> Course:
    method = fresh(name)
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in parameter_groups(method, OPTIM)]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    losses, gradients = [], {}
    for step in range(STEPS + 1):
        pairs = batch(name, PAIRS, 0, PAIRS, seed=step)
        loss = loss_of(method("terms", pairs), method.counts(pairs), 1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if not step:
            gradients = {key: p.grad.flatten().clone() for key, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
    return Course(losses, gradients)


def held_gradients(engine: Engine) -> dict[str, Tensor]:
    """Of the only step that was taken, what this rank holds: Adam's first moment is 1 - b1 times the gradient."""
    found: dict[str, Tensor] = {}
    for segment in segments(engine.deepspeed):
        moment = segment.of(engine.optimizer.state[segment.flat]["exp_avg"]) / (1 - OPTIM.betas[0])
        whole = found.setdefault(segment.name, torch.full((torch.Size(segment.shape).numel(),), float("nan")))
        whole[segment.start : segment.start + segment.length] = moment
    return found


def course_at(name: str, stage: int, parts: int, saving: bool) -> Course:
    share = PAIRS // dist.world_size()
    engine = build(
        fresh(name, saving),
        EngineConfig(zero_stage=stage, precision="fp32", keep_whole_elements=0),
        OPTIM,
        share,
        torch.device("cpu"),  # type: ignore[arg-type]
    )
    assert stage < 3 or not any(p.numel() for p in engine.method.parameters()), "a parameter stayed whole"
    losses, gradients = [], {}
    for step in range(STEPS + 1):
        pairs = batch(name, PAIRS, dist.rank() * share, share, seed=step)
        if step < STEPS:
            result, terms = train_step(engine, pairs.split(parts), OPTIM.lr)
            assert result.applied
            gradients = gradients or held_gradients(engine)
        else:
            with torch.no_grad():
                terms = engine("terms", pairs)
        (term,) = (term for term in terms.values() if term.weight)
        losses.append(float(dist.sum_over_ranks(term.sum)) / PAIRS)
    return Course(losses, gradients)


def check_course(found: Course, wanted: Course, where: str) -> int:
    """Returns how many numbers of the gradients were compared."""
    assert found.losses[0] == pytest.approx(wanted.losses[0], rel=TOLERANCE), where
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5), where
    largest, compared = max(float(gradient.abs().max()) for gradient in wanted.gradients.values()), 0
    for key, gradient in found.gradients.items():
        held = ~gradient.isnan()
        error = (gradient - wanted.gradients[key])[held].abs().max() if held.any() else torch.zeros(())
        assert error <= TOLERANCE * largest, f"{where}, {key}: {float(error) / largest:.1e}"
        compared += int(held.sum())
    return compared


def check(rank: int, world_size: int, expected: dict[str, Course]) -> None:
    """Features are cached, as in accumulation; two ranks do it in one piece too. What is saved again in the backward,
    and how texts travel, have nothing to do with one another: the former only where they are gathered."""
    for name, wanted in expected.items():
        gathered = "ring" not in name
        for stage in range(4):
            for parts in (1, 2) if world_size == 2 and gathered else (2,):
                saves = stage == 3 and parts == 2 and world_size < 4 and gathered
                for saving in (False, True) if saves else (False,):
                    where = f"{name}, ZeRO {stage}, {parts} micro-batches, checkpointing {saving}"
                    compared = check_course(course_at(name, stage, parts, saving), wanted, where)
                    numbers = sum(gradient.numel() for gradient in wanted.gradients.values())
                    total = float(dist.sum_over_ranks(torch.tensor(float(compared))))
                    assert total == numbers * (world_size if stage == 0 else 1), f"{where}: {total} of {numbers}"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_follows_one_process(world_size: int) -> None:
    expected = {name: reference(name) for name in METHODS}
    assert all(course.losses[-1] != course.losses[0] for course in expected.values())
    run(check, world_size, expected, timeout_seconds=400)


def test_the_reference_needs_every_pair() -> None:
    """The steps are large enough to show a wrong gradient: half of the batch as negatives ends elsewhere."""
    whole, losses = reference("clip").losses, []
    method = fresh("clip")
    optimizer = torch.optim.AdamW(method.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    for step in range(STEPS + 1):
        halves = [batch("clip", PAIRS, first, PAIRS // 2, seed=step) for first in (0, PAIRS // 2)]
        with torch.no_grad():
            pairs = batch("clip", PAIRS, 0, PAIRS, seed=step)
            losses.append(loss_of(method("terms", pairs), method.counts(pairs), 1).item())
        optimizer.zero_grad()
        sum(loss_of(method("terms", half), {"contrastive": PAIRS}, 1) for half in halves).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert abs(losses[-1] / whole[-1] - 1) > 1e-3
