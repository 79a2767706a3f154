"""An update that is dropped has never been; a checkpoint that is gone back to is where one is; the data goes on behind.

The last is shown by real training: a run that rolls back ends, to the bit, as one that never met the data.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmpt.engine.step as step_module
from mmpt import cli, dist, exit_codes, train
from mmpt.engine import resume
from mmpt.engine.checkpoint import load
from mmpt.engine.checkpoint_files import newest_valid
from mmpt.engine.guard import Guard
from mmpt.engine.progress import Progress
from mmpt.engine.saver import save
from mmpt.engine.step import train_step
from mmpt.methods.method import Term
from mmpt.recipe import Recipe, parse_arguments
from tests.engine.test_checkpoint import ADAMW, LAMB, PAIRS, engine_at, everything
from tests.engine.toy import batches
from tests.ranks import run
from tests.test_survival import events
from tests.test_train import arguments, losses, weights


def check_dropped(rank: int, world_size: int, folder: str) -> None:
    """At every stage and precision: steps 0, 1 (dropped), 2 are steps 0, 2. Then back to step 0: steps 0, 2 again."""
    zeroth, first, second = batches(PAIRS, 3, rank, world_size)
    for stage, optim, precision in [(s, o, p) for s in range(4) for o, p in ((ADAMW, "fp32"), (LAMB, "bf16"))]:
        where = f"ZeRO {stage}, {optim.name}, {precision}"
        engine, told = engine_at(stage, optim, 0, precision), list[float]()
        vetoes = {drop: lambda loss, told=told, drop=drop: told.append(loss) or drop for drop in (False, True)}
        place = Path(folder) / where.replace(" ", "-")
        save(place, engine, 0, {})
        results = [
            train_step(engine, batch.split(2), 0.02, (), vetoes[drop])[0]
            for batch, drop in ((zeroth, False), (first, True), (second, False))
        ]
        assert [result.applied for result in results] == [True, False, True], where
        assert all(seen == told for seen in dist.gather_objects(told)), "every rank judges the same numbers"
        found = everything(engine)
        wanted_engine = engine_at(stage, optim, 0, precision)
        for batch in (zeroth, second):
            train_step(wanted_engine, batch.split(2), 0.02)
        wanted = everything(wanted_engine)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found), where

        checkpoint, manifest, _ = newest_valid(place)
        load(checkpoint, manifest, engine, seed=0)
        for batch in (zeroth, second):
            train_step(engine, batch.split(2), 0.02)
        again = everything(engine)
        assert all(torch.equal(again[name], wanted[name]) for name in again), f"{where}: back to before the first step"


@pytest.mark.slow
def test_a_dropped_update_leaves_no_trace(tmp_path: Path) -> None:
    run(check_dropped, 2, str(tmp_path), timeout_seconds=300)


def poisoned(stretch: range) -> None:
    """From now on the loss of a batch with samples at these positions is far too high."""
    original = step_module._cached_backward

    def backward(engine: Any, micro_batches: list, totals: dict) -> dict[str, Term]:
        terms = original(engine, micro_batches, totals)
        if any(int(position) in stretch for batch in micro_batches for position in batch.positions):
            term = terms["contrastive"]
            terms["contrastive"] = Term(term.sum + 1000, term.count, term.weight)
        return terms

    step_module._cached_backward = backward


def train_here(recipe: Recipe) -> int | str:
    try:
        with Guard(recipe.run, recipe.engine.timeout_seconds) as guard:
            return train.train(recipe, guard)
    except RuntimeError as error:
        return str(error)


def check_spikes(rank: int, world_size: int, flags: list[str], folder: str) -> list[int | str]:
    """Runs of 20 steps of 16 samples; steps 15 and 16 hold the poison, the checkpoint before is that of step 12. A
    rollback leaves step 15 out, which brings the data of step 16 forward; another leaves that out too."""
    recipe = parse_arguments(flags)

    def run_of(name: str, **spikes: Any) -> Recipe:
        settings = replace(recipe.run.spikes, window=10, **spikes)
        return replace(recipe, run=replace(recipe.run, dir=f"{folder}/{name}", spikes=settings))

    without = Progress(left_out=[[14 * 16, 16 * 16]])
    resume.Progress, kept = lambda **state: Progress(**state) if state else without, resume.Progress
    statuses = [train_here(run_of("never-met"))]
    resume.Progress = kept
    poisoned(range(14 * 16 + 3, 15 * 16 + 2))
    statuses.append(train_here(run_of("rolled-back", policy="rollback")))
    statuses.append(train_here(run_of("skipped", policy="skip")))
    statuses.append(train_here(run_of("spent", policy="rollback", max_rollbacks=1)))
    statuses.append(train_here(run_of("watched")))
    return statuses


@pytest.mark.slow
def test_a_run_that_rolls_back_ends_as_one_that_never_met_the_data(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = arguments(scenes, tmp_path / "unused", run__samples=16 * 20, run__checkpoint_every_steps=4,
                      method__towers__text__trunk__dropout=0,
                      method__towers__image__trunk__drop_path=0)  # fmt: skip
    statuses = run(check_spikes, 2, flags, str(tmp_path))[0]
    assert statuses[:3] == [exit_codes.FINISHED] * 3 and statuses[4] == exit_codes.FINISHED, statuses
    assert "1 rollbacks have not helped" in statuses[3]

    back, never = tmp_path / "rolled-back", tmp_path / "never-met"
    assert [(event["step"], event["to"], event["left_out"]) for event in events(back, "rollback")] == [
        (15, 12, [14 * 16, 15 * 16]), (15, 12, [15 * 16, 16 * 16]),
    ]  # fmt: skip
    assert weights(back) == weights(never)
    assert losses(back) == losses(never)
    assert len(events(back, "start", "resume")) == 1, "a rollback is no restart"
    assert [event["step"] for event in events(tmp_path / "spent", "crash")] == [15]
    assert max(dict(record)["loss_deviation"] for record in losses(tmp_path / "watched")) > 100

    def audited(run_dir: Path, *flags: str) -> list[list[str]]:
        assert cli.main(["audit", str(run_dir), *flags]) == 0
        printed = capsys.readouterr()
        assert ("not trained on" in printed.err) == (run_dir.name in ("rolled-back", "never-met", "skipped"))
        return [line.split("\t") for line in printed.out.splitlines()][1:]

    for run_dir, gone in ((back, range(14 * 16, 16 * 16)), (tmp_path / "skipped", range(14 * 16, 16 * 16))):
        trained, untrained = audited(run_dir), audited(run_dir, "--left-out")
        assert [int(row[1]) for row in untrained] == list(gone)
        assert not {int(row[1]) for row in trained} & set(gone)
        steps = [int(row[0]) for row in trained]
        assert steps == sorted(steps) and len(steps) == (20 * 16 if run_dir == back else 18 * 16)
        (tmp_path / "wanted").write_text(untrained[0][4])
        ((_, times, _, _),) = audited(run_dir, "--takedown", str(tmp_path / "wanted"))
        assert int(times) == sum(row[4] == untrained[0][4] for row in trained)
    assert {row[0] for row in audited(back, "--left-out")} == {"-"}
    assert {row[0] for row in audited(tmp_path / "skipped", "--left-out")} == {"15", "16"}
