"""A rank's pulse: where it is, for others to read; and its end, when it has been in one place for too long.

    heartbeat/rank-R.json    {"time", "step", "phase", "since", "host", "pid"}, replaced every few seconds
    stacks/rank-R.txt        what every thread was doing when nothing moved for run.hang_dump_seconds, or at a crash

A thread of its own does both, so a rank that waits for ever in a collective or for its data still tells, and after
run.hang_exit_seconds ends with exit_codes.HUNG. All ranks wait then, wherever the fault is: each writes its stacks.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mmpt import dist, exit_codes
from mmpt.engine.events import Events

HEARTBEAT_SECONDS = 5.0
LAST_WORDS_SECONDS = 5.0
PATIENT_PHASES = ("start", "evaluate", "save")
"""Phases that may take long in themselves: building and compiling, a whole evaluation, a slow disk."""


class Limits(NamedTuple):
    """Seconds without progress until stacks are written, and until the rank ends."""

    dump_seconds: float
    exit_seconds: float
    patient_seconds: float
    """Until the rank ends in one of PATIENT_PHASES; stacks are written after half of it."""

    def of(self, phase: str) -> tuple[float, float]:
        if phase in PATIENT_PHASES:
            longer = max(self.patient_seconds, self.exit_seconds)
            return longer / 2, longer
        return self.dump_seconds, self.exit_seconds


def watch_the_start(seconds: float) -> threading.Timer:
    """Ends this rank with exit_codes.HUNG unless the timer is cancelled within so many seconds.

    For the time before there is a run directory that a pulse could be seen in: torch's store waits without end for a
    rank 0 that took the call and stands still.
    """
    timer = threading.Timer(seconds, _give_up, (seconds,))
    timer.daemon = True
    timer.start()
    return timer


def _give_up(seconds: float) -> None:
    print(
        f"train.py: error: rank {dist.launched_rank()} on {dist.node_name()} did not get through its start (joining "
        f"the others, checking the nodes) in {seconds:.0f} s; this is where it stood:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os._exit(exit_codes.HUNG)


class Pulse:
    """Runs from construction to `close`. The training thread calls `beat`."""

    def __init__(self, run_dir: Path, rank: int, limits: Limits, events: Events):
        self._limits, self._events, self._rank = limits, events, rank
        self._heartbeat = run_dir / "heartbeat" / f"rank-{rank}.json"
        self._heartbeat.parent.mkdir(exist_ok=True)
        (run_dir / "stacks").mkdir(exist_ok=True)
        self._stacks = open(run_dir / "stacks" / f"rank-{rank}.txt", "a")  # noqa: SIM115  (the crash handler keeps it)
        faulthandler.enable(self._stacks)
        self._place = ("start", 0, time.monotonic())
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._show, self._watch)]
        self._write_heartbeat()
        for thread in self._threads:
            thread.start()

    def beat(self, phase: str, step: int) -> None:
        """The training thread is here now, and it was not a moment ago."""
        self._place = (phase, step, time.monotonic())

    def stalled(self) -> bool:
        """Whether nothing has moved for so long that stacks are due."""
        phase, _, since = self._place
        return time.monotonic() - since > self._limits.of(phase)[0]

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(LAST_WORDS_SECONDS)
        faulthandler.disable()
        self._stacks.close()

    def _show(self) -> None:
        every, over = min(HEARTBEAT_SECONDS, self._limits.dump_seconds / 2), False
        while not over:
            over = self._closing.wait(every)
            self._write_heartbeat()  # the last one too: it says where the rank ended

    def _write_heartbeat(self) -> None:
        phase, step, since = self._place
        now = time.time()
        facts = {"time": now, "step": step, "phase": phase, "since": now - time.monotonic() + since,
                 "host": dist.node_name(), "pid": os.getpid()}  # fmt: skip
        temporary = self._heartbeat.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, self._heartbeat)
        except OSError:  # a full disk ends the run elsewhere, with a line; here it only makes the file old
            pass

    def _watch(self) -> None:
        """Leaves the disk to other threads: it may be what hangs."""
        dumped, speaking = 0.0, list[threading.Thread]()
        while not self._closing.wait(min(1.0, self._limits.dump_seconds / 4)):
            phase, step, since = self._place
            stood_seconds = time.monotonic() - since
            dump_seconds, exit_seconds = self._limits.of(phase)
            place = (phase, step, stood_seconds)
            if stood_seconds > dump_seconds and dumped != since:
                dumped, speaking = since, [threading.Thread(target=self._dump, args=place, daemon=True)]
                speaking[0].start()
            if stood_seconds > exit_seconds:
                speaking.append(threading.Thread(target=self._last_words, args=place, daemon=True))
                speaking[-1].start()
                for thread in speaking:
                    thread.join(LAST_WORDS_SECONDS)
                os._exit(exit_codes.HUNG)

    def _dump(self, phase: str, step: int, stood_seconds: float) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._stacks.write(f"\n{now} rank {self._rank}: {stood_seconds:.0f} s in phase {phase} after step {step}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()

    def _last_words(self, phase: str, step: int, stood_seconds: float) -> None:
        self._events.add("hang", step, {"phase": phase, "seconds": round(stood_seconds, 1)})
        if self._rank == 0 or phase == "data":  # where one waits for its data, the others wait for it
            print(
                f"train.py: error: rank {self._rank} on {dist.node_name()} did not move for {stood_seconds:.0f} s "
                f"in phase {phase} after step {step}; what it did is in {self._stacks.name}",
                file=sys.stderr,
                flush=True,
            )
