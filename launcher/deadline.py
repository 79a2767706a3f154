"""`python -m launcher.deadline`: when this job's time is over, in Unix seconds; nothing where SLURM does not say.

SLURM 22.05 leaves no such variable in a job's environment. Asked anew at every start of the job.
"""

import math
import os
import sys

from launcher import queue_client
from launcher.queue_client import QueueError


def main() -> None:
    try:
        end = queue_client.show(queue_client.job_of(os.environ)).ends_by_limit
    except QueueError as error:
        print(f"mmpt-launch: the end of the job is unknown: {error}", file=sys.stderr)
        return
    if math.isfinite(end):
        print(int(end))


if __name__ == "__main__":
    main()
