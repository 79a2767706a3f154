"""Back to a checkpoint from before the loss went wrong, and past the data that it went wrong on.

The run then repeats the steps between that checkpoint and the stretch, to the bit, and goes on behind the stretch. It
is written into the checkpoint itself, so that a run that is killed right after has not forgotten it.
"""

from dataclasses import asdict, replace
from pathlib import Path

from mmpt import dist
from mmpt.data.left_out import Stretches, join
from mmpt.engine.checkpoint_files import candidates, newest_valid, remove, write_manifest
from mmpt.engine.progress import Progress
from mmpt.engine.spikes import SpikeConfig
from mmpt.failure import NotFinite


def roll_back(
    checkpoints: Path, progress: Progress, config: SpikeConfig, reason: str, steps: int, global_batch: int
) -> tuple[Path, int, int]:
    """Make an earlier checkpoint the newest, with the data of the last `steps` steps left out. Collective.

    Returns the checkpoint and the stretch of positions. NotFinite if the policy or its budget do not allow it.
    """
    if config.policy != "rollback":
        raise NotFinite(reason)
    if progress.rollbacks >= config.max_rollbacks:
        raise NotFinite(
            f"{reason}; {progress.rollbacks} rollbacks have not helped, run.spikes.max_rollbacks allows no more"
        )
    steps = max(steps, config.left_out_steps)
    found = newest_valid(checkpoints, at_most=progress.step - steps) or newest_valid(checkpoints)
    assert found is not None, "a run publishes its step 0 before it trains"
    checkpoint, manifest, _ = found
    before = Progress(**manifest.state)
    first = max(first_position(progress, steps, global_batch), before.data_state)
    last = progress.data_state
    before.left_out = join(progress.left_out, first, last) if first < last else progress.left_out
    before.rollbacks = progress.rollbacks + 1
    newer = [path for path in candidates(checkpoints) if path.name > checkpoint.name]
    if dist.rank() == 0:
        for path in newer:  # the newest first: whenever this is cut short, what is newest is whole
            remove(path)
        write_manifest(checkpoint, replace(manifest, state=asdict(before)))
    dist.barrier()
    return checkpoint, first, last


def first_position(progress: Progress, steps: int, global_batch: int) -> int:
    """Where the data of the last `steps` steps begins."""
    position = progress.data_state
    for _ in range(min(steps, progress.step)):
        position = _behind(position, progress.left_out) - global_batch
    return position


def _behind(position: int, left_out: Stretches) -> int:
    """Where the batch ended after which delivery went on at this position."""
    return next((first for first, last in left_out if last == position), position)
