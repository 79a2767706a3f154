"""How a program of several ranks fails: one line, from the rank that met the error first, and an exit status."""

import sys
import time
import traceback
from pathlib import Path

from mmpt import dist, exit_codes

WAIT_FOR_OTHERS_SECONDS = 5.0


class Hung(RuntimeError):
    """Nothing moved for too long."""


class UnfitNode(RuntimeError):
    """A node failed the checks before the start. here: this rank is on it."""

    def __init__(self, text: str, here: bool):
        super().__init__(text)
        self.here = here


class NotFinite(RuntimeError):
    """Training has diverged, and what was allowed against it is used up."""


class Forsaken(RuntimeError):
    """Another rank is gone, and this one was told to stop: by a launcher that knows, and has it said, why."""


def status_of(error: Exception) -> int:
    """The exit status that this error ends the program with."""
    for kind, status in (
        (Hung, exit_codes.HUNG), (UnfitNode, exit_codes.UNFIT_NODE), (NotFinite, exit_codes.NOT_FINITE),
    ):  # fmt: skip
        if isinstance(error, kind):
            return status
    return exit_codes.FAILED


def report(program: str, error: Exception, run_dir: Path | None = None) -> int:
    """Print "program: error: ..." once among all ranks; the traceback goes to error-rank-R.txt in the run directory.
    Returns the exit status.

    The other ranks fail by it, in the same way or because we leave them; they ask whether anybody spoke, and stay
    silent. Every rank waits for the others before it ends, because the launcher ends them all when one does.
    """
    if isinstance(error, UnfitNode):
        return _report_unfit(program, error)
    if run_dir is not None and run_dir.is_dir():
        write_trace(run_dir / f"error-rank-{dist.rank()}.txt", error)
    if dist.first_to_fail() and not isinstance(error, Forsaken):
        lost = "another rank ended without a word (was it killed, perhaps for memory?): " * dist.lost_a_rank(error)
        print(f"{program}: error: {lost}{error}", file=sys.stderr, flush=True)
    dist.leave_failed(WAIT_FOR_OTHERS_SECONDS)
    return status_of(error)


def _report_unfit(program: str, error: UnfitNode) -> int:
    """All ranks know. Whoever started us blames the node whose rank ends first: the others wait."""
    if dist.rank() == 0:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    if not error.here:
        time.sleep(WAIT_FOR_OTHERS_SECONDS)
    return status_of(error)


def write_trace(path: Path, error: Exception) -> None:
    """The traceback, if it can be written: where the disk is full, the line on the console is what remains."""
    try:
        path.write_text("".join(traceback.format_exception(error)))
    except OSError as full:
        print(f"{path} could not be written: {full}", file=sys.stderr)
