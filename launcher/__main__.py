"""Start a run on this node: `python -m launcher local -- --recipe filip.tiny`."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from launcher.cluster import load_cluster
from launcher.command import node_command, shown

USAGE = "python -m launcher CLUSTER [--accelerators N] [--dry-run] -- --recipe NAME [--field value ...]"


def main(arguments: Sequence[str]) -> int:
    """The exit status of the run; 2 for a wrong command line."""
    own, theirs = list(arguments), []
    if "--" in own:
        cut = own.index("--")
        own, theirs = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser("launcher", usage=USAGE)
    parser.add_argument("cluster", help="a file of cluster_configs/, without .yaml")
    parser.add_argument("--accelerators", type=int, help="ranks to start [all of the node's]")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    parsed = parser.parse_args(own)
    try:
        cluster = load_cluster(parsed.cluster)
    except ValueError as error:
        print(f"launcher: error: {error}", file=sys.stderr)
        return 2
    command = node_command(cluster, theirs, parsed.accelerators)
    if parsed.dry_run:
        print(shown(command, cluster.environment))
        return 0
    return subprocess.run(command, env=os.environ | cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
