"""When to stop: signals and the clock. And how the ranks agree on it, at the end of a step.

A signal's handler only remembers. What a rank knows travels as a `Ballot` in the one small sum over ranks that every
step begins with; its result is read at the end of the step, when the device has been waited for anyway. So all ranks
hear the same at the same step, though one alone was signalled, and no step waits for it.
"""

import os
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
DEADLINE_VARIABLES = ("MMPT_DEADLINE", "SLURM_JOB_END_TIME")


class Ballot(NamedTuple):
    """One rank's say, 0 or 1 each; and, summed, how many ranks say so."""

    stop: float = 0.0
    """It was told to stop, or its time is nearly over."""
    late: float = 0.0
    """It has no time left to save first."""
    saving: float = 0.0
    """Its part of the checkpoint in flight is not done."""
    failed: float = 0.0
    """Its part of the checkpoint in flight could not be done."""


class Stopping:
    """Whether this rank should stop. Takes the handlers of SIGNALS until `close`; only in the main thread."""

    def __init__(self, grace_seconds: float, stop_before_seconds: float):
        self._grace_seconds, self._stop_before_seconds = grace_seconds, stop_before_seconds
        self._deadline = job_end(os.environ, time.time())
        self._told: tuple[str, float] | None = None
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, _frame: object) -> None:
        if self._told is None:
            self._told = signal.Signals(number).name, time.time()

    def vote(self, needed_seconds: float, now: float) -> tuple[bool, bool]:
        """(stop, no time to save first), where saving and leaving would be over needed_seconds after `now`."""
        if self._told is not None:
            end = min(self._told[1] + self._grace_seconds, self._deadline)
            return True, now + needed_seconds > end
        near = now + needed_seconds + self._stop_before_seconds >= self._deadline
        return near, near and now + needed_seconds > self._deadline

    @property
    def told(self) -> bool:
        """Whether a signal has come."""
        return self._told is not None

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; nothing if it does not know of any reason."""
        if self._told is not None:
            return self._told[0]
        soon = time.time() + 2 * self._stop_before_seconds > self._deadline
        return "the end of the job is near" if soon else ""

    def close(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def job_end(environment: Mapping[str, str], now: float) -> float:
    """Unix time at which the job will be ended, infinite where nobody said. ValueError for one that makes no sense."""
    for name in DEADLINE_VARIABLES:
        text = environment.get(name, "")
        if not text:
            continue
        try:
            end = float(text)
        except ValueError:
            raise ValueError(f"{name} should be a unix time in seconds, got {text!r}") from None
        if end <= now:
            raise ValueError(f"{name}={text} lies {now - end:.0f} seconds in the past: this job has no time left")
        return end
    return float("inf")
