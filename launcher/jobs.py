"""What one does with runs: start them, read their logs, stop them, start them again."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import dry_run, queue_client
from launcher.arguments import Invocation, Parser, add_cluster_flags, cluster_changes
from launcher.launch import Request, plan, start
from launcher.living import alive, running, supervisor
from launcher.progress import recipe_numbers
from launcher.record import LAUNCH, STOP, Launch, read_attempts, read_launch
from launcher.snapshot import Snapshot

POLL_SECONDS = 0.2
LINES = 40


def launch(invocation: Invocation) -> int:
    """Start it; a local run is followed to its end unless --detach, and its status returned."""
    made = plan(invocation.request)
    if invocation.dry_run:
        print(dry_run.shown(made, os.environ), end="")
        return 0
    started = start(made)
    tell(started)
    if made.exclude:
        print(f"without the nodes {', '.join(made.exclude)} (yours, and those of {made.bad_nodes})")
    if made.cluster.executor == "local" and not invocation.detach:
        return follow_local(started)
    print(f"see: mmpt-launch status {made.folder}; mmpt-launch logs -f {started[0].run_dir}")
    return 0


def tell(started: Sequence[Launch]) -> None:
    for run in started:
        print(f"{run.run_dir}: {'job' if run.executor == 'slurm' else 'process'} {run.job}", flush=True)


def follow_local(started: Sequence[Launch]) -> int:
    """Print what rank 0 prints until the supervisor is gone. Ctrl-C: save and stop; a second one leaves it alone."""
    interrupted, controller, log, seen = 0, int(started[0].job), log_of(started[0], 0), 0
    while True:
        try:
            over = not running(controller) and not any(map(supervisor, started))  # asked before the last read
            seen = show_from(log, seen)
            if over:
                break
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted += 1
            if interrupted > 1:
                print(f"\nleft to itself: mmpt-launch logs -f {started[0].run_dir}")
                return 130
            print("\nsaving and stopping; Ctrl-C again leaves it to itself", flush=True)
            for run in started:
                stop_local(run)
    return next((status for run in started if (status := outcome(run))), 0)


def show_from(path: Path, seen: int) -> int:
    """Print what a file holds beyond its first bytes; how many it holds now."""
    if not path.exists():
        return seen
    with open(path, "rb") as file:
        file.seek(seen)
        data = file.read()
    print(data.decode(errors="replace"), end="", flush=True)
    return seen + len(data)


def outcome(run: Launch) -> int:
    """Exit status of a local run that is over; 1 for one whose supervisor did not live to say."""
    ours = [attempt for attempt in read_attempts(Path(run.run_dir)) if attempt.job == run.job]
    if not ours or ours[-1].action == "restart":
        return 1
    return 0 if ours[-1].action == "finished" else ours[-1].status


def stop_local(run: Launch) -> bool:
    """Have the ranks save and leave; False if there are none."""
    Path(run.run_dir, STOP).touch()
    pid = supervisor(run)
    if pid:
        os.kill(pid, signal.SIGTERM)
    return bool(pid)


def logs(words: Sequence[str]) -> int:
    parser = Parser("mmpt-launch logs", description="Print the end of a rank's log, newest job.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, through restarts")
    parser.add_argument("--rank", type=int, default=0, help="whose [0]")
    parser.add_argument("-n", "--lines", type=int, default=LINES, help=f"how many lines from the end [{LINES}]")
    parsed = parser.parse_args(list(words))
    run = read_launch(the_run(parsed.run))
    path = log_of(run, parsed.rank)
    if not path.exists() and not parsed.follow:
        raise ValueError(f"{path} does not exist yet: {alive(run) or 'the run has not begun'}")
    while not path.exists():
        time.sleep(POLL_SECONDS)
    data = path.read_bytes()
    print("".join(data.decode(errors="replace").splitlines(keepends=True)[-parsed.lines :]), end="", flush=True)
    seen = len(data)
    try:
        while parsed.follow:
            time.sleep(POLL_SECONDS)
            seen = show_from(path, seen)
    except KeyboardInterrupt:
        print()
    return 0


def log_of(run: Launch, rank: int) -> Path:
    folder = Path(run.run_dir, "logs") if rank and run.executor == "local" else Path(run.logs)
    return folder / f"{run.job}_{rank}_log.out"


def cancel(words: Sequence[str]) -> int:
    parser = Parser("mmpt-launch cancel", description="Have runs save and stop; they stay stopped.")
    parser.add_argument("which", nargs="+", metavar="RUN", help="run directories, or those of sweeps")
    parser.add_argument("--now", action="store_true", help="without saving (the last checkpoint remains)")
    parsed = parser.parse_args(list(words))
    for run in [read_launch(path) for path in the_runs(parsed.which)]:
        where = alive(run)
        if not where:
            print(f"{run.run_dir}: is over already")
            continue
        Path(run.run_dir, STOP).touch()
        if run.executor != "slurm":
            told = stop_local(run)
            print(f"{run.run_dir}: {'told to save and stop' if told else f'{where}; cancel it there'}")
        elif parsed.now or not where.startswith("running"):
            queue_client.cancel(run.job)
            print(f"{run.run_dir}: cancelled job {run.job}")
        else:
            queue_client.signal_ranks(run.job, "USR2")
            print(f"{run.run_dir}: told to save and stop, job {run.job}")
    return 0


def requeue(words: Sequence[str]) -> int:
    parser = Parser(
        "mmpt-launch requeue",
        description="Have runs save and start again; what is over starts again from its checkpoint with its own code.",
    )
    parser.add_argument("which", nargs="+", metavar="RUN", help="run directories, or those of sweeps")
    parser.add_argument("--new-code", action="store_true", help="with the code that is here now (only what is over)")
    add_cluster_flags(parser)
    parsed = parser.parse_args(list(words))
    changes = cluster_changes(parsed)
    for run in [read_launch(path) for path in the_runs(parsed.which)]:
        where = alive(run)
        if not where and not changes and finished(run):
            print(f"{run.run_dir}: is finished")
        elif not where:
            tell(again(run, changes, parsed.new_code))
        elif changes or parsed.new_code:
            raise ValueError(f"{run.run_dir} is {where}; cancel it before it starts again in another way")
        else:
            print(f"{run.run_dir}: {restart_living(run, where)}")
    return 0


def finished(run: Launch) -> bool:
    total, _ = recipe_numbers(Path(run.run_dir))
    attempts = read_attempts(Path(run.run_dir))
    return bool(attempts) and attempts[-1].action == "finished" and attempts[-1].step == total


def again(run: Launch, changes: dict[str, str], new_code: bool) -> list[Launch]:
    """Start a run that is over as it was started before, but for the changes."""
    os.chdir(run.directory)
    request = Request(run.cluster, run.changes | changes, run.arguments, exclude=run.exclude)
    code = None if new_code else Snapshot(Path(run.code), run.git_sha)
    if code and not code.train.is_file():
        raise ValueError(f"{code.train} is gone; --new-code starts the run with the code that is here now")
    return start(plan(request), code)


def restart_living(run: Launch, where: str) -> str:
    if run.executor != "slurm":
        pid = supervisor(run)
        if not pid:
            return f"{where}; requeue it there"
        os.kill(pid, signal.SIGUSR2)
        return "told to save and start again"
    if where.startswith("running"):
        queue_client.signal_ranks(run.job, "USR2")
        return f"told to save and start again, job {run.job}"
    queue_client.start_soon(run.job)
    return f"waits already, from now on for its nodes alone, job {run.job}"


def the_runs(texts: Sequence[str]) -> list[Path]:
    """Run directories, the ones of a sweep where its folder is named."""
    found: list[Path] = []
    for text in texts:
        folder = _place(text)
        inside = sorted(path.parent for path in folder.glob(f"*/{LAUNCH}"))
        if not (folder / LAUNCH).exists() and not inside:
            raise ValueError(f"{text} is neither a run that the launcher started nor a folder of such runs")
        found += [folder] if (folder / LAUNCH).exists() else inside
    return found


def the_run(text: str) -> Path:
    runs = the_runs([text])
    if len(runs) > 1:
        raise ValueError(f"{text} holds {len(runs)} runs; name one, such as {runs[0]}")
    return runs[0]


def _place(text: str) -> Path:
    """The path, or the name of a run in ./runs."""
    path = Path(text)
    return Path("runs") / text if not path.exists() and (Path("runs") / text).exists() else path
