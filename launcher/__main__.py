"""`mmpt-launch`: start a run anywhere, and see to it.

    mmpt-launch CLUSTER [--nodes N --gpus-per-node G --time 24:00:00 ...] -- --recipe filip.vit_l14 ...
    mmpt-launch status [RUNS]            a live table of all runs under a folder
    mmpt-launch list [RUNS]              the same facts, one run per line, for scripts
    mmpt-launch logs RUN [-f]            what rank 0 printed
    mmpt-launch cancel RUN ...           save and stop
    mmpt-launch requeue RUN ...          save and start again, or start again what is over

CLUSTER is a file of cluster_configs/ (local, slurm-a100, ...) or the path of one.
"""

import sys
from collections.abc import Sequence

from launcher import arguments, jobs, watch
from launcher.queue_client import QueueError

VERBS = {
    "status": watch.status,
    "list": watch.list_runs,
    "logs": jobs.logs,
    "cancel": jobs.cancel,
    "requeue": jobs.requeue,
}


def main(given: Sequence[str] | None = None) -> int:
    """Exit status: of the run for those that this terminal waits for; 2 for a wrong command line, 1 for a failure."""
    words = list(sys.argv[1:] if given is None else given)
    try:
        if not words or words[0] in ("-h", "--help"):
            print((__doc__ or "").strip())
            return 0 if words else 2
        if words[0] in VERBS:
            return VERBS[words[0]](words[1:])
        return jobs.launch(arguments.parse_launch(words))
    except ValueError as error:
        print(f"mmpt-launch: error: {error}", file=sys.stderr)
        return 2
    except (QueueError, OSError) as error:
        print(f"mmpt-launch: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
