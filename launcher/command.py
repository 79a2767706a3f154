"""What would run, as pure functions: an argument list and the variables it adds to the environment."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cluster import Cluster

TRAIN = Path(__file__).parents[1] / "mmpt" / "train.py"


def node_command(cluster: Cluster, arguments: Sequence[str], accelerators: int | None = None) -> list[str]:
    """`deepspeed` on this node with one rank per accelerator; `arguments` go to train.py as they are."""
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    ranks = accelerators or cluster.accelerators
    return [deepspeed, "--num_accelerators", str(ranks), str(TRAIN), *arguments]


def shown(command: Sequence[str], environment: dict[str, str]) -> str:
    """The command as one could type it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in sorted(environment.items())), shlex.join(command)])
