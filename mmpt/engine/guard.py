"""What lets a run end in a known way and go on from there: signals, the clock, a pulse, events, saves in flight."""

import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from mmpt import dist, exit_codes
from mmpt.engine.code_version import code_version
from mmpt.engine.events import Events
from mmpt.engine.preflight import preflight, raise_for
from mmpt.engine.progress import Progress
from mmpt.engine.pulse import Limits, Pulse, watch_the_start
from mmpt.engine.rollback import roll_back
from mmpt.engine.saver import Saved, Saver
from mmpt.engine.spikes import SpikeConfig
from mmpt.engine.stopping import Ballot, Stopping
from mmpt.engine.writers import Writers
from mmpt.failure import Forsaken, Hung

FAILED_SAVES_IN_A_ROW = 2
AFTER_THE_WATCH_SECONDS = 60.0  # a collective's own timeout is the second line: it tells less


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    async_checkpoints: bool = True
    """Write checkpoints in the background; training waits only for the copy to host memory. The files are the same."""
    grace_seconds: float = 30.0
    """Between a signal to stop (SIGTERM, SIGUSR1, SIGUSR2) and the kill that follows it: what a save must fit in."""
    stop_before_seconds: float = 30.0
    """Save and stop this long before the end of the job, where it is known (SLURM_JOB_END_TIME or MMPT_DEADLINE, unix
    time), on top of the time that two steps and a save take."""
    hang_dump_seconds: float = 120.0
    """No progress for this long, in a step or waiting for data, and every rank writes its stacks."""
    hang_exit_seconds: float = 300.0
    """No progress for this long, and the rank ends with status 76. Until the first step is done, in evaluations and
    saves it is engine.timeout_seconds, if that is longer."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self):
        if not 0 < self.hang_dump_seconds <= self.hang_exit_seconds:
            raise ValueError(
                f"hang_dump_seconds ({self.hang_dump_seconds}) should be above 0 and at most hang_exit_seconds "
                f"({self.hang_exit_seconds})"
            )
        if min(self.grace_seconds, self.stop_before_seconds) < 0:
            raise ValueError(
                f"grace_seconds ({self.grace_seconds}) and stop_before_seconds ({self.stop_before_seconds}) must be 0 "
                "or more"
            )


class Guard:
    """Takes the signal handlers at once; the rest begins with `open`. A context that ends what it began.

    timeout_seconds: of a collective until the first step is done.
    """

    def __init__(self, config: GuardConfig, timeout_seconds: float):
        self._config = config
        self._limits = Limits(config.hang_dump_seconds, config.hang_exit_seconds, timeout_seconds)
        self._stopping = Stopping(config.grace_seconds, config.stop_before_seconds)
        self._pulse: Pulse | None = None
        self._step, self._steps_here, self._failed_saves = 0, 0, 0
        self._begun = False
        self._step_seconds = deque[float]([], 20)

    def check(self, run_dir: Path, device: torch.device) -> None:
        """UnfitNode where a node cannot train, OSError where the run directory cannot be written. Collective."""
        self._run_dir, self.events = run_dir, Events(run_dir, dist.rank() == 0)
        problems, nodes = preflight(run_dir, device), set(dist.gather_objects(dist.node_name()))
        unfit = {problem.node: problem.reason for problem in problems}
        self.events.add("preflight", 0, {"ok": not unfit, "nodes": len(nodes), "unfit": unfit})
        raise_for(problems, nodes)

    def open(self) -> None:
        """Begin to write heartbeats, and to watch."""
        self._start.cancel()
        self._pulse = Pulse(self._run_dir, dist.rank(), self._limits, self.events)

    def __enter__(self) -> Self:
        _, exit_seconds = self._limits.of("start")
        self._start = watch_the_start(exit_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.close()
        self._start.cancel()
        if self._pulse is None:
            return
        hung = self._pulse.stalled()
        self._pulse.close()
        if isinstance(error, Exception):
            self.events.add("crash", self._step, {"error": str(error)})
        if isinstance(error, RuntimeError) and dist.lost_a_rank(error):
            if hung:  # another rank's watch was faster than ours
                raise Hung(str(error)) from error
            if self._stopping.told:
                raise Forsaken(str(error)) from error

    def beat(self, phase: str, step: int) -> None:
        """Training is in this phase now, after so many steps."""
        assert self._pulse is not None
        self._step = step
        self._pulse.beat(phase if self._steps_here else "start", step)

    def ballot(self, saver: Saver) -> Ballot:
        """What this rank has to say at the beginning of a step."""
        saving, failed = saver.votes()
        saves = 1 + (saver.last is not None and saving)
        needed_seconds = 2 * max(self._step_seconds, default=0.0) + saves * saver.usual_seconds
        return Ballot(*self._stopping.vote(needed_seconds, time.time()), saving, failed)

    def begin(self, progress: Progress, notes: list[str], writers: Writers) -> None:
        """Say how the run begins."""
        again = self.events.attempt > 1
        if self._begun:  # a rollback is an event of its own
            writers.text("restarts", f"rolled back; goes on from step {progress.step}", progress.step)
        else:
            facts = {"world_size": dist.world_size(), "code": code_version() if dist.rank() == 0 else ""}
            self.events.add("resume" if again else "start", progress.step, facts)
        if again and not self._begun:
            text = f"attempt {self.events.attempt} goes on from step {progress.step}; before it: {self.events.last_end}"
            writers.text("restarts", text, progress.step)
        self._begun = True
        for note in notes:
            writers.say(note)

    def told_before_start(self, saver: Saver, device: torch.device) -> bool:
        """Whether any rank was told to stop before there was a step to end. Collective."""
        return dist.sum_over_ranks(torch.tensor(self.ballot(saver), device=device))[0].item() > 0

    def step_done(self, seconds: float) -> None:
        """A step took so long. After the first, a collective may not take as long as before."""
        self._step_seconds.append(seconds)
        self._steps_here += 1
        if self._steps_here == 1:
            dist.set_timeout(self._config.hang_exit_seconds + AFTER_THE_WATCH_SECONDS)

    def hear(self, ballot: Ballot, saver: Saver, writers: Writers) -> None:
        """Publish the checkpoint in flight, if all ranks have written it. OSError if a second in a row failed."""
        try:
            self._note(saver.hear(ballot.saving, ballot.failed))
        except OSError as error:
            self._failed_save(error, writers)

    def save(self, saver: Saver, progress: Progress, writers: Writers, last: bool) -> None:
        """A checkpoint of this moment; on disk when this returns if it is the last one. Collective.

        OSError if the last one failed, or a second in a row.
        """
        self.beat("save", progress.step)
        try:
            self._note(saver.finish())
        except OSError as error:
            self._failed_save(error, writers)
        try:
            saver.start(progress.step, asdict(progress))
            if last or not self._config.async_checkpoints:
                self._note(saver.finish())
        except OSError as error:
            if last:
                raise
            self._failed_save(error, writers)

    def leave(self, saver: Saver, progress: Progress, writers: Writers, late: bool) -> int:
        """Save unless it is too late, and say why the run stops. Returns the exit status. Collective."""
        told = dist.gather_objects((self._stopping.reason, dist.node_name()))
        reasons = [f"rank {r} ({host}): {text}" for r, (text, host) in enumerate(told) if text] or ["another rank"]
        self.events.add("signal", progress.step, {"reasons": reasons[:8], "ranks": len(reasons)})
        if self._steps_here and not late:
            self.save(saver, progress, writers, last=True)
        self.events.add("stop", progress.step, {"saved": not late})
        lost = "; no time to save: the steps since the last checkpoint are lost" if late else ""
        writers.say(f"stopped at step {progress.step} ({reasons[0]}){lost}; the same command continues")
        return exit_codes.REQUEUE

    def roll_back(
        self, reason: str, steps: int, saver: Saver, progress: Progress, writers: Writers, global_batch: int
    ) -> None:
        """Go back to before the last `steps` steps and leave their data out. NotFinite if that is not allowed."""
        self._step = progress.step
        try:
            self._note(saver.finish())
        except OSError as error:
            writers.say(str(error))
        checkpoint, first, last = roll_back(saver.folder, progress, self._config.spikes, reason, steps, global_batch)
        facts = {"reason": reason, "to": int(checkpoint.name.removeprefix("step-")), "left_out": [first, last]}
        self.events.add("rollback", progress.step, facts)
        writers.say(
            f"step {progress.step}: {reason}; rolled back to {checkpoint}, leaving out positions {first} to {last - 1}"
        )

    def finish(self, progress: Progress, writers: Writers, total_steps: int) -> int:
        """Say that the run ends as it should. Returns the exit status."""
        whole = progress.step == total_steps
        self.events.add("finish" if whole else "stop", progress.step, {"saved": True})
        writers.say(f"{'finished' if whole else 'stopped'} at step {progress.step} in {self._run_dir}")
        return exit_codes.FINISHED

    def _note(self, saved: Saved | None) -> None:
        if saved:
            self._failed_saves = 0
            self.events.add("save", saved.step, {"seconds": round(saved.seconds, 3), "bytes": saved.bytes})

    def _failed_save(self, error: OSError, writers: Writers) -> None:
        self._failed_saves += 1
        if self._failed_saves >= FAILED_SAVES_IN_A_ROW:
            raise error
        writers.say(f"{error}; training goes on, the next one is due as always")
        self.events.add("save_failed", self._step, {"error": str(error)})
