"""Where a run starts: from its own newest valid checkpoint, from another run's weights, or from nothing."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmpt import dist
from mmpt.engine.build import Engine
from mmpt.engine.checkpoint import load, load_parameters, save
from mmpt.engine.checkpoint_files import Manifest, damage, newest_valid, prune, read_manifest


@dataclass
class Progress:
    """What a run remembers between steps, besides the engine. All ranks hold the same."""

    step: int = 0
    """Batches taken."""
    applied_steps: int = 0
    """Optimizer updates applied: `step` without the skipped ones. The learning rate follows this."""
    data_state: int = 0
    """The loader's integer: pairs delivered so far, over all ranks."""
    data_fingerprint: str = ""
    """The loader's word for which data, in which order, that integer speaks of."""
    consecutive_skips: int = 0


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def find_checkpoint(path: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest valid checkpoint of a run directory, or the checkpoint itself, with notes. Collective.

    ValueError if there is none.
    """
    if (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        if reason := damage(path, manifest):
            raise ValueError(f"checkpoint {path} cannot be used: {reason}")
        return path, manifest, []
    found = newest_valid(checkpoints_of(path))
    if found is None:
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one")
    return found


def resume(run_dir: Path, engine: Engine, seed: int, init: str | None) -> tuple[Progress, list[str]]:
    """Bring the engine to where the run stands, and say how in notes for the console. Collective.

    A new run publishes its step 0, so that from then on a run directory without a valid checkpoint is an error and
    never a silent fresh start.
    """
    found = newest_valid(checkpoints_of(run_dir))
    if found is not None:
        checkpoint, manifest, passed_over = found
        progress = Progress(**load(checkpoint, manifest, engine, seed))
        notes = [f"passed over {reason}" for reason in passed_over]
        return progress, [*notes, f"continuing from {checkpoint}"]
    if (run_dir / "metrics.jsonl").exists():
        raise ValueError(
            f"{run_dir} has records of training but no checkpoint; move it away to start afresh, or restore "
            f"{checkpoints_of(run_dir)}"
        )
    notes = [f"starting in {run_dir}"]
    if init is not None:
        checkpoint, manifest, passed_over = find_checkpoint(Path(init))
        load_parameters(checkpoint, manifest, engine)
        notes = [*(f"passed over {reason}" for reason in passed_over), *notes, f"weights from {checkpoint}"]
    # Weights were drawn alike on all ranks; dropout and stochastic depth should differ.
    torch.manual_seed(seed * 1_000_003 + dist.rank())
    progress = Progress()
    checkpoint_now(run_dir, engine, progress, keep_last=1, keep_every_steps=0)
    return progress, notes


def checkpoint_now(run_dir: Path, engine: Engine, progress: Progress, keep_last: int, keep_every_steps: int) -> Path:
    """Publish a checkpoint of this moment, then drop those that the retention no longer keeps. Collective."""
    path = save(checkpoints_of(run_dir), engine, progress.step, asdict(progress))
    if dist.rank() == 0:
        prune(checkpoints_of(run_dir), keep_last, keep_every_steps, protect=path)
    return path
