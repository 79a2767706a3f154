"""Norms by part are those of a plain process that holds the whole batch and the whole model."""

from typing import Literal

import pytest
import torch

from mmpt import dist
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.norms import PARTS
from mmpt.engine.optim import OptimConfig, parameter_groups
from mmpt.engine.step import train_step
from tests.engine.toy import batches, toy
from tests.ranks import run

PAIRS, STEPS, WATCHED = 16, 3, (0, 2)
OPTIMS = {
    "adamw": OptimConfig(lr=0.02, eps=1e-4, weight_decay=0.1, clip_norm=0.3),
    "lamb": OptimConfig(name="lamb", lr=0.02, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.1, clip_norm=0.3),
}

STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
SKIPPED: tuple[Literal[0, 1, 2, 3], ...] = (0, 2)
COMBINATIONS: list[tuple[str, Literal[0, 1, 2, 3], int]] = [
    *((name, stage, 2) for name in OPTIMS for stage in STAGES),
    ("adamw", 2, 1),
]


def part_of(name: str) -> str:
    return next((part for part in PARTS if name.startswith(part + ".")), "rest")


def norms_of(vectors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {part: float(torch.cat([v.flatten() for n, v in vectors.items() if part_of(n) == part]).double().norm())
            for part in PARTS}  # fmt: skip


def reference() -> list[dict[str, float]]:
    """Of AdamW at the watched steps, by a loop that shares nothing with the engine but the groups."""
    model, optim, out = toy(), OPTIMS["adamw"], []
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(parameter_groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps)
    for step, batch in enumerate(batches(PAIRS, STEPS)):
        model.zero_grad()
        terms = model.objective(*model.encode(batch))
        torch.stack([t.weight * t.sum / t.count for t in terms.values() if t.weight]).sum().backward()
        gradients = norms_of({n: p.grad for n, p in trained.items() if p.grad is not None})
        before = {n: p.detach().clone() for n, p in trained.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        adamw.step()
        updates = norms_of({n: p.detach() - before[n] for n, p in trained.items()})
        weights = norms_of(before)
        if step in WATCHED:
            out.append({f"grad_norm/{p}": gradients[p] for p in PARTS} | {f"update_norm/{p}": updates[p] for p in PARTS}
                       | {f"update_ratio/{p}": updates[p] / weights[p] for p in PARTS})  # fmt: skip
    return out


def records(rank: int, world_size: int) -> dict[tuple[str, int, int], list[dict[str, float]]]:
    out = {}
    for name, stage, parts in COMBINATIONS:
        config = EngineConfig(zero_stage=stage, precision="fp32", keep_whole_elements=40)
        engine = build(toy(), config, OPTIMS[name], PAIRS // world_size, torch.device("cpu"))
        found = []
        for step, batch in enumerate(batches(PAIRS, STEPS, rank, world_size)):
            engine.norms.watching = step in WATCHED
            result = train_step(engine, batch.split(parts), OPTIMS[name].lr)[0]
            found.append(engine.norms.record(result.grad_norm))
        assert [bool(record) for record in found] == [True, False, True], "nothing is measured at other steps"
        assert not engine.norms._before
        out[name, stage, parts] = [record for record in found if record]
    for stage in SKIPPED:
        engine = build(toy(), EngineConfig(stage, precision="fp32"), OPTIMS["adamw"], PAIRS, torch.device("cpu"))
        with torch.no_grad():
            engine.method.get_parameter("temperature.log").fill_(float("nan"))
        engine.norms.watching = True
        result = train_step(engine, batches(PAIRS, 1, rank, world_size), 0.01)[0]
        assert not result.applied and engine.norms.record(result.grad_norm) == {}, "a skipped step has no norms"
    assert dist.gather_objects(out) == [out] * world_size, "the same on every rank"
    return out


@pytest.mark.slow
def test_two_ranks_at_every_stage_have_the_norms_of_one_plain_process() -> None:
    found, wanted = run(records, 2)[0], reference()
    for (name, stage, parts), both in found.items():
        for record, plain in zip(both, wanted if name == "adamw" else found["lamb", 0, 2], strict=True):
            assert record.keys() == plain.keys()
            assert record == pytest.approx(plain, rel=5e-5), f"{name}, ZeRO {stage}, {parts} micro-batches"
