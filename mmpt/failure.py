"""How a program of several ranks fails: one line, from the rank that met the error first."""

import sys
import time
import traceback
from pathlib import Path

from mmpt import dist

WAIT_FOR_OTHERS_SECONDS = 2.0


def report(program: str, error: Exception, run_dir: Path | None = None) -> None:
    """Print "program: error: ..." once among all ranks; the traceback goes to error-rank-R.txt in the run directory.

    The other ranks fail by it, in the same way or because we leave them; they ask whether anybody spoke, and stay
    silent. Every rank waits a moment before it ends, because the launcher ends them all when one does.
    """
    if run_dir is not None and run_dir.is_dir():
        write_trace(run_dir / f"error-rank-{dist.rank()}.txt", error)
    alone = dist.world_size() == 1
    if dist.first_to_fail():
        lost = "another rank ended without a word (was it killed, perhaps for memory?): " * dist.lost_a_rank(error)
        print(f"{program}: error: {lost}{error}", file=sys.stderr, flush=True)
    held = dist.leave_failed()
    if not alone:
        time.sleep(WAIT_FOR_OTHERS_SECONDS)
    del held


def write_trace(path: Path, error: Exception) -> None:
    """The traceback, if it can be written: where the disk is full, the line on the console is what remains."""
    try:
        path.write_text("".join(traceback.format_exception(error)))
    except OSError as full:
        print(f"{path} could not be written: {full}", file=sys.stderr)
