"""Train one recipe, from tar shards to checkpoints and metrics:

    deepspeed --num_accelerators 2 mmpt/train.py --recipe filip.vit_b32 --data.shards shards/ --run.dir runs/filip

Values come from the recipe's function, then from flags; the whole is saved as recipe.yaml in the run directory before
anything is built. The same command continues a run that stopped, wherever it stopped.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from mmpt import dist, exit_codes, failure
from mmpt.data import quarantine
from mmpt.data.device import DeviceLoader
from mmpt.data.loader import build_loader
from mmpt.engine.build import Engine, build, check_precision, evaluating
from mmpt.engine.guard import Guard
from mmpt.engine.metrics import Metrics
from mmpt.engine.optim import learning_rate
from mmpt.engine.profile import Profile
from mmpt.engine.progress import Progress
from mmpt.engine.resume import checkpoints_of, resume
from mmpt.engine.saver import Saver
from mmpt.engine.spikes import Spikes
from mmpt.engine.step import train_step
from mmpt.engine.stopping import Ballot
from mmpt.engine.writers import Writers
from mmpt.evals.boards import boards
from mmpt.evals.suite import evaluate
from mmpt.flops import Utilisation
from mmpt.recipe import Recipe, open_run_dir, parse_arguments

# All ranks meet an error of the command line; the launcher ends them all when one ends, and rank 0 should have spoken.
WAIT_FOR_RANK_0_SECONDS = 60.0
SHOWN = ("loss", "logit_scale", "grad_norm", "learning_rate", "samples_per_second", "data_wait_share")


def main(arguments: Sequence[str]) -> int:
    """The exit status, one of mmpt/exit_codes.py. An error is one line, said once."""
    try:
        recipe = parse_arguments(arguments)
    except ValueError as error:
        if dist.launched_rank() > 0:
            time.sleep(WAIT_FOR_RANK_0_SECONDS)
        else:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        return exit_codes.WRONG_USE
    try:
        with Guard(recipe.run, recipe.engine.timeout_seconds) as guard:
            status = train(recipe, guard)
    except (ValueError, OSError, RuntimeError) as error:
        return failure.report("train.py", error, Path(recipe.run.dir))
    if status == exit_codes.FINISHED:
        dist.shutdown()  # whoever was told to stop leaves at once
    return status


def train(recipe: Recipe, guard: Guard) -> int:
    """The story of a run."""
    device = dist.init(recipe.engine.timeout_seconds)
    run_dir, run, world_size = Path(recipe.run.dir), recipe.run, dist.world_size()
    parts = recipe.micro_batches(world_size)
    check_precision(recipe.engine, device)
    guard.check(run_dir, device)
    open_run_dir(recipe)
    guard.open()

    torch.manual_seed(run.seed)
    method = recipe.method.build()
    micro_batch = run.global_batch // world_size // parts
    engine = build(method, recipe.engine, recipe.optim, micro_batch, device)
    status = None
    with closing(Saver(checkpoints_of(run_dir), engine, run.keep_last, run.keep_every_steps)) as saver:
        while status is None:  # after a rollback
            status = train_from_checkpoint(recipe, engine, saver, guard)
    return status


def train_from_checkpoint(recipe: Recipe, engine: Engine, saver: Saver, guard: Guard) -> int | None:
    """From where the run stands to its end; returns the exit status. None after a rollback: now it stands earlier."""
    run, run_dir, rank, world_size = recipe.run, Path(recipe.run.dir), dist.rank(), dist.world_size()
    progress, notes = resume(run_dir, saver, engine, run.seed, run.init)
    loader = build_loader(
        recipe.data, recipe.method.inputs(), run.seed, run.global_batch, rank, world_size, progress.data_state,
        progress.left_out,
    )  # fmt: skip
    deliveries = DeviceLoader(loader, engine.device, recipe.cut(world_size), overlap=engine.device.type == "cuda")
    writers = Writers(run_dir, progress.step, recipe.total_steps(), guard.events, run.prometheus_port)
    with closing(deliveries), closing(writers):
        progress.begin(loader.fingerprint, loader.state, run_dir)
        if not loader.exactly_once:
            notes.append("data.stream: exactly-once is off, samples are drawn with replacement and anew on every start")
        guard.begin(progress, notes, writers)
        writers.text("recipe", (run_dir / "recipe.yaml").read_text(), progress.step)
        return loop(recipe, engine, deliveries, progress, writers, saver, guard)


def loop(
    recipe: Recipe, engine: Engine, deliveries: DeviceLoader, progress: Progress, writers: Writers, saver: Saver,
    guard: Guard,
) -> int | None:  # fmt: skip
    """Step after step, with records, evaluations and checkpoints when they are due. Returns as the function above."""
    run, run_dir, total_steps = recipe.run, Path(recipe.run.dir), recipe.total_steps()
    last_step = min(total_steps, run.stop_at_step or total_steps)
    metrics, spikes = Metrics(run.global_batch, engine.device), Spikes(run.spikes, progress.recent_losses)
    utilisation, recorded_step = Utilisation(recipe, engine.device), progress.step
    if guard.told_before_start(saver, engine.device):
        return guard.leave(saver, progress, writers, late=False)
    profile = Profile(run_dir, run.profile_steps, engine.method, engine.device)
    while progress.step < last_step:
        profile.before(progress.step + 1)
        began = time.perf_counter()
        guard.beat("data", progress.step)
        delivery = next(deliveries)
        waited = time.perf_counter() - began
        guard.beat("step", progress.step)
        lr = learning_rate(recipe.optim, progress.applied_steps, total_steps)
        record_due = due(progress.step + 1, run.log_every_steps) or progress.step + 1 == last_step
        engine.norms.watching = record_due
        with utilisation.counting(delivery.micro_batches, engine.method.couples_pairs):
            result, terms = train_step(engine, delivery.micro_batches, lr, guard.ballot(saver), spikes.veto)
        heard = Ballot(*result.ballot)
        progress.advance(result.applied, delivery.state, run.global_batch)
        quarantine.append(run_dir, dist.rank(), delivery.quarantined)
        guard.hear(heard, saver, writers)
        guard.step_done(time.perf_counter() - began)
        metrics.add(result, terms, waited, time.perf_counter() - began, delivery)
        writers.advance(progress.step)
        last = progress.step == last_step

        if record_due:
            record = metrics.record() | saver.record() | epochs(delivery.epochs)
            record |= {"learning_rate": lr, "samples": progress.step * run.global_batch}
            record |= spikes.at_record(record["loss"])
            record |= engine.norms.record(result.grad_norm)
            record |= utilisation.record(record["mean_text_tokens"], record["samples_per_second_per_device"])
            writers.record(progress.step, record, SHOWN, metrics.straggler)
            recorded_step, unrecorded_steps = progress.step, progress.step - recorded_step
            if spikes.spike:
                return guard.roll_back(spikes.spike, unrecorded_steps, saver, progress, writers, run.global_batch)
        if stuck := progress.stuck(recipe.engine.max_consecutive_skips):
            return guard.roll_back(stuck, progress.consecutive_skips, saver, progress, writers, run.global_batch)
        if heard.stop and not last:
            return guard.leave(saver, progress, writers, late=heard.late > 0)
        if progress.step == total_steps or due(progress.step, recipe.evals.every_steps):
            guard.beat("evaluate", progress.step)
            with evaluating(engine):
                what = (recipe.evals, recipe.data, recipe.method.inputs(), engine, engine.method, engine.device)
                scores, pictures = evaluate(*what), boards(*what)
            if scores:
                writers.record(progress.step, scores, tuple(scores))
            writers.images(pictures, progress.step)
        if last or progress.step % run.checkpoint_every_steps == 0:
            guard.save(saver, progress, writers, last)
            if dist.rank() == 0:
                quarantine.merge(run_dir)
    profile.close(progress.step + 1)
    return guard.finish(progress, writers, total_steps)


def epochs(passes: tuple[float, ...]) -> dict[str, float]:
    """Passes over the data, and over each source where there are several."""
    return {"epoch" if len(passes) == 1 else f"epoch/source_{i}": n for i, n in enumerate(passes)}


def due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # library threads still alive at interpreter exit abort a finished rank now and then
