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

from mmpt import config, dist, failure
from mmpt.data import quarantine
from mmpt.data.device import DeviceLoader
from mmpt.data.loader import build_loader
from mmpt.engine.build import Engine, build, check_precision, evaluating
from mmpt.engine.metrics import Metrics
from mmpt.engine.optim import learning_rate
from mmpt.engine.resume import Progress, checkpoint_now, resume
from mmpt.engine.step import train_step
from mmpt.engine.writers import Writers
from mmpt.evals.suite import evaluate
from mmpt.recipe import Recipe, check_same_run, parse_arguments

# All ranks meet an error of the command line; the launcher ends them all when one ends, and rank 0 should have spoken.
WAIT_FOR_RANK_0_SECONDS = 60.0
SHOWN = ("loss", "logit_scale", "grad_norm", "learning_rate", "samples_per_second", "data_wait_share")


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 trained, 1 the run failed, 2 the command line is wrong. An error is one line, said once."""
    try:
        recipe = parse_arguments(arguments)
    except ValueError as error:
        if dist.launched_rank() > 0:
            time.sleep(WAIT_FOR_RANK_0_SECONDS)
        else:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        train(recipe)
    except (ValueError, OSError, RuntimeError) as error:
        failure.report("train.py", error, Path(recipe.run.dir))
        return 1
    dist.shutdown()
    return 0


def train(recipe: Recipe) -> None:
    """The story of a run."""
    device = dist.init(recipe.engine.timeout_seconds)
    run_dir, run, world_size = Path(recipe.run.dir), recipe.run, dist.world_size()
    parts = recipe.micro_batches(world_size)
    check_precision(recipe.engine, device)
    open_run_dir(run_dir, recipe)

    torch.manual_seed(run.seed)
    method = recipe.method.build()
    micro_batch = run.global_batch // world_size // parts
    engine = build(method, recipe.engine, recipe.optim, micro_batch, device)
    progress, notes = resume(run_dir, engine, run.seed, run.init)
    loader = build_loader(
        recipe.data, recipe.method.inputs(), run.seed, run.global_batch, dist.rank(), world_size, progress.data_state
    )
    deliveries = DeviceLoader(loader, device, parts, overlap=device.type == "cuda")
    writers = Writers(run_dir, progress.step, recipe.total_steps())
    with closing(deliveries), closing(writers):
        same_data(progress, loader.fingerprint, run_dir)
        if not loader.exactly_once:
            notes.append("data.stream: exactly-once is off, samples are drawn with replacement and anew on every start")
        for note in notes:
            writers.say(note)
        writers.text("recipe", (run_dir / "recipe.yaml").read_text(), progress.step)
        loop(recipe, engine, deliveries, progress, writers)


def loop(recipe: Recipe, engine: Engine, deliveries: DeviceLoader, progress: Progress, writers: Writers) -> None:
    """Step after step, with records, evaluations and checkpoints when they are due."""
    run, run_dir, total_steps = recipe.run, Path(recipe.run.dir), recipe.total_steps()
    last_step = min(total_steps, run.stop_at_step or total_steps)
    metrics = Metrics(run.global_batch, engine.device)
    while progress.step < last_step:
        began = time.perf_counter()
        delivery = next(deliveries)
        waited = time.perf_counter() - began
        lr = learning_rate(recipe.optim, progress.applied_steps, total_steps)
        result, terms = train_step(engine, delivery.micro_batches, lr)
        advance(progress, result.applied, delivery.state, recipe.engine.max_consecutive_skips)
        quarantine.append(run_dir, dist.rank(), delivery.quarantined)
        metrics.add(result, terms, waited, time.perf_counter() - began)
        writers.advance(progress.step)
        last = progress.step == last_step

        if last or progress.step % run.log_every_steps == 0:
            record = metrics.record() | {"learning_rate": lr, "samples": progress.data_state}
            record |= epochs(delivery.epochs)
            writers.record(progress.step, record, SHOWN)
        if progress.step == total_steps or due(progress.step, recipe.evals.every_steps):
            with evaluating(engine):
                scores = evaluate(
                    recipe.evals, recipe.data, recipe.method.inputs(), engine, engine.method, engine.device
                )
            if scores:
                writers.record(progress.step, scores, tuple(scores))
        if last or progress.step % run.checkpoint_every_steps == 0:
            checkpoint_now(run_dir, engine, progress, run.keep_last, run.keep_every_steps)
            if dist.rank() == 0:
                quarantine.merge(run_dir)
    writers.say(f"{'finished' if progress.step == total_steps else 'stopped'} at step {progress.step} in {run_dir}")


def open_run_dir(run_dir: Path, recipe: Recipe) -> None:
    """Make the run directory and save the recipe in it; ValueError if it holds a run of another recipe. Collective."""
    problem = ""
    if dist.rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            saved = run_dir / "recipe.yaml"
            if saved.exists() and (run_dir / "metrics.jsonl").exists():
                check_same_run(recipe, config.load_yaml(Recipe, saved))
            config.save_yaml(recipe, saved)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := dist.broadcast_object(problem):
        raise ValueError(problem)


def same_data(progress: Progress, fingerprint: str, run_dir: Path) -> None:
    """Remember what data a run began with; ValueError when it is continued on other data."""
    if progress.data_fingerprint not in ("", fingerprint):
        raise ValueError(f"the shards are not those that {run_dir} began with; choose another --run.dir")
    progress.data_fingerprint = fingerprint


def advance(progress: Progress, applied: bool, data_state: int, max_consecutive_skips: int) -> None:
    """Count the step; ValueError when too many in a row could not be applied. All ranks decide alike."""
    progress.step += 1
    progress.data_state = data_state
    progress.applied_steps += applied
    progress.consecutive_skips = 0 if applied else progress.consecutive_skips + 1
    if progress.consecutive_skips >= max_consecutive_skips:
        raise ValueError(
            f"the gradient was not finite in {progress.consecutive_skips} steps in a row, up to step {progress.step}; "
            "nothing was updated in them. The last checkpoint is whole: continue with a lower optim.lr or another seed"
        )


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
