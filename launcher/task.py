"""What submitit starts in each task of a job: who am I among the ranks, then become train.py.

By exec: the training process itself has the task's process id, so SLURM's signals reach it and nothing stands between.
submitit's own signal handlers, which would requeue a job behind the ranks' back, end with the process image.
"""

import os
import sys
from dataclasses import dataclass

from launcher.ranks import free_port, rank_environment


@dataclass(frozen=True)
class SlurmTask:
    train: str
    """train.py of the run's code."""
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        become(self.train, self.arguments, rank_environment(os.environ))


@dataclass(frozen=True)
class DebugTask:
    """One rank, in this process and terminal."""

    train: str
    arguments: tuple[str, ...]
    environment: dict[str, str]

    def __call__(self) -> None:
        alone = {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        become(self.train, self.arguments, self.environment | alone)


def become(train: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    command = [sys.executable, "-u", train, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, os.environ | environment)
