"""Where a run starts: from its own newest valid checkpoint, from another run's weights, or from nothing."""

import contextlib
from dataclasses import asdict
from pathlib import Path

import torch

from mmpt import dist
from mmpt.engine.build import Engine
from mmpt.engine.checkpoint import load, load_parameters
from mmpt.engine.checkpoint_files import (
    Manifest,
    damage,
    newest_valid,
    read_manifest,
    remove_leftovers,
    told_origins,
)
from mmpt.engine.progress import Progress
from mmpt.engine.saver import Saver


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def holds_imported_weights(run_dir: Path) -> bool:
    """Whether `mmpt import` made this directory, which is to be started from and not to be trained in."""
    for checkpoint in sorted(checkpoints_of(run_dir).glob("step-*"))[:1]:
        with contextlib.suppress(ValueError):  # damage is dealt with where checkpoints are read
            return bool(read_manifest(checkpoint).origins)
    return False


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


def resume(run_dir: Path, saver: Saver, engine: Engine, seed: int, init: str | None) -> tuple[Progress, list[str]]:
    """Bring the engine to where the run stands, and say how in notes for the console. Collective.

    A new run publishes its step 0, so that from then on a run directory without a valid checkpoint is an error and
    never a silent fresh start.
    """
    if dist.rank() == 0:
        remove_leftovers(checkpoints_of(run_dir))
    found = newest_valid(checkpoints_of(run_dir))
    if found is not None:
        checkpoint, manifest, passed_over = found
        progress = Progress(**load(checkpoint, manifest, engine, seed))
        notes = [f"passed over {reason}" for reason in passed_over]
        if manifest.world_size not in (0, dist.world_size()):  # 0: no rank, an import
            notes.append(f"{manifest.world_size} ranks saved it, {dist.world_size()} go on: same samples, new dropout")
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
        notes += told_origins(manifest)
    # Weights were drawn alike on all ranks; dropout and stochastic depth should differ.
    torch.manual_seed(seed * 1_000_003 + dist.rank())
    progress = Progress()
    saver.start(progress.step, asdict(progress))
    saver.finish()
    return progress, notes
