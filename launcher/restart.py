"""Whether a run starts again: one pure function, the same for SLURM and for this machine."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.ending import BAD_NODE, NOT_FINITE, SAVED, WRONG_COMMAND, Ending
from launcher.record import Attempt

TOLD_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A rank that dies of one of these had not yet begun to listen to them."""


@dataclass(frozen=True)
class Situation:
    """What is known when an attempt has ended."""

    ending: Ending
    stop_asked: bool
    """`mmpt-launch cancel` was called."""
    outside: str
    """What SLURM did to the job: "" nothing; cancelled; requeued; time limit."""
    restarts: int
    """Of this job so far."""
    step: int
    """The highest step that the run ever reached."""
    earlier: Sequence[Attempt]
    """Oldest first."""
    max_restarts: int
    max_fruitless_restarts: int


@dataclass(frozen=True)
class Decision:
    action: str
    """finished, stopped (as asked), failed, restart or leave (SLURM restarts it by itself)."""
    reason: str
    """One line for people."""
    blame: str = ""
    """A node that this ending speaks against."""
    exclude: bool = False
    """The node is to be avoided at once, not only when it fails again."""


def decide(now: Situation) -> Decision:
    """What to do after an attempt.

    Finished runs, wrong command lines and losses that are lost for good never start again. Those that were told to
    make way do, as long as the job may restart. Crashes and hangs do while they reach new steps: so many in a row
    without one, and the run is given up.
    """
    ending, told = now.ending, now.ending.told()
    if ending.status == 0:
        return Decision("finished", "")
    if now.stop_asked:
        return Decision("stopped", "stopped as asked (mmpt-launch cancel, or Ctrl-C)")
    if now.outside == "cancelled":
        return Decision("stopped", "cancelled with scancel, or by the cluster")
    if ending.status in (WRONG_COMMAND, NOT_FINITE):
        return Decision("failed", told)
    blame = ending.host if ending.node_failed or ending.status == BAD_NODE or _crashed(ending) else ""
    exclude = ending.node_failed or ending.status == BAD_NODE
    if now.outside == "requeued":
        return Decision("leave", f"SLURM restarts it by itself; {told}", blame, exclude)
    if now.restarts >= now.max_restarts:
        return Decision(
            "failed", f"{told}; the job was restarted {now.restarts} times, and max_restarts allows no more"
        )
    if made_way(ending.status):
        why = "the time limit came before the ranks had saved" if now.outside == "time limit" else told
        return Decision("restart", why)
    if ending.status == 1 and now.step == 0 and not ending.node_failed:
        return Decision("failed", f"{told} before the run's first step; the log says why")
    in_a_row = 1 + fruitless(now.earlier)
    if now.step > highest(now.earlier) or in_a_row <= now.max_fruitless_restarts:
        return Decision("restart", told, blame, exclude)
    return Decision("failed", f"{told}; {in_a_row} attempts in a row have not got past step {now.step}", blame, exclude)


def made_way(status: int) -> bool:
    """The ranks saved as they were told to, or were told before they could listen."""
    return status == SAVED or status - 128 in TOLD_TO_STOP


def _crashed(ending: Ending) -> bool:
    return ending.killed_by != 0 and not made_way(ending.status)


def fruitless(earlier: Sequence[Attempt]) -> int:
    """Attempts at the end of the list, in a row, that crashed without a step that was not reached before.

    A run that was given up and that somebody started again begins anew.
    """
    count = 0
    for i in reversed(range(len(earlier))):
        if earlier[i].action in ("failed", "stopped", "finished"):
            break
        if made_way(earlier[i].status):
            continue
        if earlier[i].step > highest(earlier[:i]):
            break
        count += 1
    return count


def highest(earlier: Sequence[Attempt]) -> int:
    return max((attempt.step for attempt in earlier), default=0)
