"""How a run's ranks ended: which was first, where, and with what status."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

SAVED, HUNG, BAD_NODE, NOT_FINITE, WRONG_COMMAND = 75, 76, 77, 78, 2
"""Exit statuses of train.py beyond 0 (finished or stopped as asked) and 1 (failed)."""


@dataclass(frozen=True)
class Ending:
    """Of the rank that ended the others."""

    status: int
    """Its exit status; 128 + the signal for one that was killed."""
    rank: str = ""
    """Its number, or several such as 2-3; empty when unknown."""
    host: str = ""
    node_failed: bool = False
    """The node itself was lost."""
    words: str = ""
    """What train.py said of it."""

    def told(self) -> str:
        """`rank 3 on gpu017 was killed by signal 9 (Killed)`."""
        if self.node_failed:
            return f"node {self.host} was lost"
        who = f"rank{'s' * (not self.rank.isdigit())} {self.rank}" if self.rank else "a rank"
        where = f" on {self.host}" if self.host else ""
        meaning = {
            1: "failed",
            WRONG_COMMAND: "found the command line or the configuration wrong",
            SAVED: "saved and made way",
            HUNG: "hung; its stacks are in the run directory",
            BAD_NODE: "found the node unfit",
            NOT_FINITE: "gave up on a loss that is not finite any more",
        }
        if self.killed_by:
            return f"{who}{where} was killed by signal {self.killed_by} ({signal.strsignal(self.killed_by)})"
        what = f"{who}{where} {meaning.get(self.status, f'ended with status {self.status}')}"
        return f"{what}: {self.words}" if self.words and self.status != SAVED else what

    @property
    def killed_by(self) -> int:
        return self.status - 128 if 128 < self.status < 128 + signal.NSIG else 0


def ending_of(messages: str, status: int) -> Ending:
    """From what srun said about its tasks and from its own exit status, which is the largest of theirs.

    srun speaks of each in the order in which they ended; --kill-on-bad-exit ends the rest after the first.
    """
    if status == 0:
        return Ending(0)
    lost = re.search(r"Node failure on (\S+)", messages)
    if lost:
        return Ending(status, host=lost[1], node_failed=True)
    for line in messages.splitlines():
        match = re.fullmatch(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)", line.strip())
        if match and (first := _status_of(match[3])):
            return Ending(first, match[2], match[1])
    return Ending(status)


def _status_of(text: str) -> int:
    """`Exited with exit code 75` -> 75, `Segmentation fault (core dumped)` -> 139; 0 for anything else."""
    match = re.fullmatch(r"Exited with exit code (\d+)", text)
    if match:
        return int(match[1])
    words = text.removesuffix(" (core dumped)")
    if words == "Out Of Memory":
        return 128 + signal.SIGKILL
    return next((128 + s for s in signal.Signals if signal.strsignal(s) == words), 0)


def first_ending(statuses: Sequence[tuple[int, int]], host: str) -> Ending:
    """From (rank, wait status as Popen gives it) in the order in which local ranks ended."""
    for rank, status in statuses:
        if status:
            return Ending(128 - status if status < 0 else status, str(rank), host)
    return Ending(0)
