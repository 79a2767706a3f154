"""Checkpoints while training goes on: copied to host memory at a step boundary, written behind its back.

    idle --(start: copy, then write in a thread)--> writing --(all have written)--> publishing --(rank 0 has)--> idle

A stage ends when every rank has heard, by the ballot of a step (see stopping.py), that all are done with it; then all
move on at the same boundary. At most one checkpoint is in flight; `finish` waits for it. The training thread is held up
by the copy alone; how long is in `stall_seconds`. Saving at once is `start` and `finish`: the files are the same.
"""

import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mmpt import dist
from mmpt.engine.build import Engine
from mmpt.engine.checkpoint import Capture, capture
from mmpt.engine.checkpoint_files import prune, publish, temporary_of, write_part
from mmpt.engine.snapshot import Snapshot

POLL_SECONDS = 0.02


class Saved(NamedTuple):
    """A checkpoint that was published. On other ranks than 0, bytes are 0."""

    step: int
    seconds: float
    """From the copy to the moment when all ranks knew that it was published."""
    bytes: int


class Saver:
    """Construction is collective. folder: where checkpoints are. keep_last, keep_every_steps: see `prune`."""

    def __init__(self, folder: Path, engine: Engine, keep_last: int, keep_every_steps: int):
        self.folder, self._engine = folder, engine
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._token: str = dist.broadcast_object(secrets.token_hex(2))
        self._memory, self._pool = Snapshot(), ThreadPoolExecutor(1, "checkpoint")
        self._stage: Literal["idle", "writing", "publishing"] = "idle"
        self._began, self._took_seconds, self._step = 0.0, 0.0, 0
        self._fields: dict[str, Any] = {}
        self._work: Future[int] = Future()
        self.stall_seconds = 0.0
        """How long the training thread has been held up so far."""
        self._recorded_stall = 0.0
        self.usual_seconds = 0.0
        """What a save takes when it is waited for: the last one, without the waiting between its stages."""
        self.last: Saved | None = None

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Copy the engine's state of this moment, with `state`, and begin to write it. Called on all ranks.

        OSError if one that was still in flight could not be saved.
        """
        self.finish()
        began = time.perf_counter()
        captured = capture(self._engine, step, state, self._memory)
        self._stage, self._began, self._step, self._fields = "writing", began, step, captured.fields
        self._took_seconds = time.perf_counter() - began
        self._work = self._pool.submit(self._write, captured)
        self.stall_seconds += time.perf_counter() - began

    def votes(self) -> tuple[bool, bool]:
        """(this rank is not done with the stage, it failed in it), for the ballot."""
        if self._stage == "idle":
            return False, False
        if not self._work.done():
            return True, False
        return False, self._work.exception() is not None

    def hear(self, saving: float, failed: float) -> Saved | None:
        """Move on if all ranks can: given how many ranks are not done and how many failed. Returns what is published.

        OSError, on every rank alike, if any rank could not write; the unfinished directory is removed.
        """
        if self._stage == "idle" or saving:
            return None
        began = time.perf_counter()
        try:
            if failed:
                self._give_up()
            if self._stage == "writing":
                self._stage = "publishing"
                self._work = self._pool.submit(self._publish)
                return None
            self._stage, self.usual_seconds = "idle", self._took_seconds
            self.last = Saved(self._step, time.perf_counter() - self._began, self._work.result())
            return self.last
        finally:
            self.stall_seconds += time.perf_counter() - began

    def finish(self) -> Saved | None:
        """Wait until nothing is in flight. Called on all ranks. OSError as for `hear`."""
        began, before, saved = time.perf_counter(), self.stall_seconds, None
        try:
            while self._stage != "idle":
                wait([self._work], timeout=POLL_SECONDS)
                own = torch.tensor(self.votes(), dtype=torch.float32, device=self._engine.device)
                saving, failed = dist.sum_over_ranks(own).tolist()
                saved = self.hear(saving, failed)
        finally:
            self.stall_seconds = before + time.perf_counter() - began
        return saved

    def record(self) -> dict[str, float]:
        """For the metrics: how long training was held up since the last call; what the last one took and weighed."""
        stalled, self._recorded_stall = self.stall_seconds - self._recorded_stall, self.stall_seconds
        return {
            "checkpoint_stall_seconds": stalled,
            "checkpoint_save_seconds": self.last.seconds if self.last else 0.0,
            "checkpoint_bytes": float(self.last.bytes if self.last else 0),
        }

    def close(self) -> None:
        """Leave what is in flight to itself: it will never be a checkpoint."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, captured: Capture) -> int:
        began = time.perf_counter()
        temporary = temporary_of(self.folder, self._step, self._token)
        write_part(
            temporary, dist.rank(), self._memory.data(), captured.contents, captured.moments, captured.optimizer_step
        )
        self._took_seconds += time.perf_counter() - began
        return 0

    def _publish(self) -> int:
        if dist.rank() > 0:
            return 0
        began = time.perf_counter()
        path, total_bytes = publish(self.folder, self._step, self._token, self._fields, dist.world_size())
        self._took_seconds += time.perf_counter() - began
        prune(self.folder, self._keep_last, self._keep_every_steps, protect=path)
        return total_bytes

    def _give_up(self) -> None:
        """Every rank knows that some could not; now every rank learns why. Collective."""
        self._stage = "idle"
        error = self._work.exception()
        reasons = [text for text in dist.gather_objects(str(error) if error else "") if text]
        if dist.rank() == 0:
            shutil.rmtree(temporary_of(self.folder, self._step, self._token), ignore_errors=True)
        raise OSError(f"checkpoint of step {self._step} was not saved: {'; '.join(reasons)}")


def save(folder: Path, engine: Engine, step: int, state: dict[str, Any]) -> Path:
    """Publish a checkpoint of this moment and wait for it; returns its directory. Collective. OSError if it failed."""
    saver = Saver(folder, engine, keep_last=1 << 30, keep_every_steps=0)
    try:
        saver.start(step, state)
        saver.finish()
    finally:
        saver.close()
    return folder / f"step-{step:08d}"
