"""A run on two ranks, struck again and again at random moments, beside the same run left alone.

    outcome = endure(forks, flags, folder, faults=50, seed=0)

Every fault is a real one: a signal to one rank or to all, a kill of one or of all, also in the middle of a save; a rank
or a data worker that stands still; a disk that takes no more; a newest checkpoint that is cut short, flipped or robbed
of a file. In between somebody only runs the same command again, and, as launchers do, ends the ranks that are left some
time after one has gone.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mmpt import exit_codes
from tests.forks import Forks, Run

RANKS = 2
MOST_STEPS_TO_STRIKE = 8
KILL_WAIT_SECONDS = 15.0  # SLURM has 30; a rank waits for ever for one that was killed before they met
LARGEST_FILE_BYTES = 100_000  # less than a rank's part of a checkpoint
IMPATIENT = ("--run.hang_dump_seconds", 1.5, "--run.hang_exit_seconds", 4, "--engine.timeout_seconds", 15)
FORGIVEN = {exit_codes.FINISHED, exit_codes.FAILED, exit_codes.REQUEUE, exit_codes.HUNG}
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Outcome:
    faults: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    """How attempts ended: `75 75`, the statuses of the ranks."""
    passed_over: int = 0
    """Damaged checkpoints that were passed over and told of."""
    attempts: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Fault:
    name: str
    weight: int
    strike: Callable[[Run, Path, random.Random], None]
    """Called in the middle of an attempt."""
    workers: int = 0
    full_disk: bool = False
    """Rank 1 can write no checkpoint in this attempt."""


def signal_one(run: Run, _: Path, draw: random.Random) -> None:
    strike([draw.choice(run.pids)], draw.choice(STOPS))


def signal_all(run: Run, _: Path, draw: random.Random) -> None:
    strike(run.pids, draw.choice(STOPS))


def kill_one(run: Run, _: Path, draw: random.Random) -> None:
    strike([draw.choice(run.pids)], signal.SIGKILL)


def kill_all(run: Run, _: Path, draw: random.Random) -> None:
    strike(run.pids, signal.SIGKILL)


def kill_in_a_save(run: Run, run_dir: Path, draw: random.Random) -> None:
    while run.running() and not list((run_dir / "checkpoints").glob(".tmp-*")):
        time.sleep(0.0005)
    strike([draw.choice(run.pids)] if draw.random() < 0.5 else run.pids, signal.SIGKILL)


def stop_a_rank(run: Run, _: Path, draw: random.Random) -> None:
    struck = draw.choice(run.pids)
    strike([struck], signal.SIGSTOP)
    others = [pid for pid in run.pids if pid != struck]
    while any(alive(pid) for pid in others):  # until they have given up on it
        time.sleep(0.01)
    strike([struck], signal.SIGCONT)


def stop_a_worker(run: Run, _: Path, draw: random.Random) -> None:
    workers: list[int] = []
    while run.running() and not workers:
        workers = [worker for rank in run.pids for server in children(rank) for worker in children(server)]
    if workers:
        struck = draw.choice(workers)
        strike([struck], signal.SIGSTOP)
        run.wait()
        strike([struck], signal.SIGCONT)  # it sees that its rank is gone, and goes


def nothing(run: Run, run_dir: Path, draw: random.Random) -> None:
    pass


def damage_newest(run: Run, run_dir: Path, draw: random.Random) -> None:
    """Kill all, then harm the newest checkpoint, unless it is the only one."""
    strike(run.pids, signal.SIGKILL)
    run.wait()
    published = sorted((run_dir / "checkpoints").glob("step-*"))
    if len(published) < 2:
        return
    struck = draw.choice(sorted(published[-1].iterdir()))
    how = draw.choice(("cut", "flip", "lose"))
    if how == "lose":
        struck.unlink()
    elif how == "cut":
        os.truncate(struck, draw.randrange(struck.stat().st_size))
    else:
        data = bytearray(struck.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        struck.write_bytes(data)


FAULTS = (
    Fault("signal to one rank", 10, signal_one),
    Fault("signal to all", 6, signal_all),
    Fault("kill of one rank", 8, kill_one),
    Fault("kill of all", 5, kill_all),
    Fault("kill in a save", 8, kill_in_a_save),
    Fault("damaged newest checkpoint", 8, damage_newest),
    Fault("full disk", 4, nothing, full_disk=True),
    Fault("stopped rank", 3, stop_a_rank),
    Fault("stopped data worker", 2, stop_a_worker, workers=1),
)
"""With their shares; every kind comes once before any comes by chance."""


def endure(forks: Forks, flags: list[str], folder: Path, faults: int, seed: int) -> Outcome:
    """Run into folder/struck through so many faults, then to the end. AssertionError for an ending that should not be.

    flags: of a run with a checkpoint every few steps, a record at each, and enough steps for the faults.
    """
    draw, outcome, began = random.Random(seed), Outcome(), time.monotonic()
    once = draw.sample(FAULTS, min(faults, len(FAULTS)))
    chosen = once + draw.choices(FAULTS, [fault.weight for fault in FAULTS], k=faults - len(once))
    run_dir = folder / "struck"
    for fault in chosen:
        hang = IMPATIENT if "stopped" in fault.name else ()
        run = forks.start(
            [*flags, "--run.dir", run_dir, "--data.workers", fault.workers, *hang], RANKS,
            largest_file={1: LARGEST_FILE_BYTES} if fault.full_disk else None, keys=folder / "keys",
        )  # fmt: skip
        await_the_moment(run, run_dir, draw)
        if run.running():
            outcome.faults[fault.name] += 1
            fault.strike(run, run_dir, draw)
        account(outcome, run, fault.workers)
    while True:
        run = forks.start([*flags, "--run.dir", run_dir], RANKS, keys=folder / "keys")
        if account(outcome, run) == [exit_codes.FINISHED] * RANKS:
            break
        assert outcome.attempts < faults + 5, run.output()
    outcome.seconds = time.monotonic() - began
    return outcome


def await_the_moment(run: Run, run_dir: Path, draw: random.Random) -> None:
    """A random moment: while it starts, or so many steps and milliseconds after it has."""
    if draw.random() < 0.15:
        time.sleep(draw.uniform(0, 1.5))
        return
    reached, more = records(run_dir), draw.randint(1, MOST_STEPS_TO_STRIKE)
    resumed = False
    while run.running():
        now = records(run_dir)
        resumed = resumed or now < reached or "continuing from" in run.output() or "starting in" in run.output()
        if resumed and now >= reached + more:
            break
        reached = min(reached, now)
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))


def account(outcome: Outcome, run: Run, workers: int = 0) -> list[int]:
    """Wait as a launcher does: when a rank has ended, the others have some time to, and then are killed."""
    while run.running() and all(alive(pid) for pid in run.pids):
        time.sleep(0.01)
    deadline = time.monotonic() + KILL_WAIT_SECONDS
    while run.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    if run.running():
        strike(run.pids, signal.SIGKILL)
    statuses = run.wait()
    outcome.attempts += 1
    outcome.endings[" ".join(map(str, sorted(statuses)))] += 1
    outcome.passed_over += run.output().count("passed over step-")
    killed = {-signal.SIGKILL, *(-number for number in STOPS)}  # by a signal before they could listen
    assert set(statuses) <= FORGIVEN | killed, f"{statuses}\n{run.output()}"
    # A worker that was stopped in the middle of handing a batch over to a rank that is gone has something to say.
    assert workers or "Traceback" not in run.output(), run.output()
    return statuses


def delivered(folder: Path) -> dict[int, str]:
    """The key of the sample at every position, by what the ranks trained on last, in all attempts."""
    found: dict[int, str] = {}
    for rank in range(RANKS):
        for line in (folder / "keys" / f"rank-{rank}.jsonl").read_text().splitlines():
            try:
                positions, keys = json.loads(line)
            except ValueError:
                continue  # it was being written when the rank was killed; the step came again
            for position, key in zip(positions, keys, strict=True):
                assert found.setdefault(position, key) == key, f"position {position} held {key} and {found[position]}"
    return found


def records(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def alive(pid: int) -> bool:
    """Running or stopped; not one that has ended and awaits its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
