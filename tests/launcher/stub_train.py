"""A train.py without torch that keeps its contract with the launcher: exit statuses, signals, files of the run.

    --run.dir DIR --stub.steps N --stub.do ATTEMPT:RANK:STEP:WHAT,...

WHAT happens on that rank at that step of that attempt (1 is the first), or at its first step if it begins later: a
number is its exit status, `kill` is SIGKILL, `hold` waits for a signal, `hang` is deaf to them. Steps take 20 ms;
every fifth is a checkpoint.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    run_dir, total = Path(arguments["--run.dir"]), int(arguments["--stub.steps"])
    rank, told = int(os.environ["RANK"]), []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, _: told.append(received))
    (run_dir / "heartbeat").mkdir(parents=True, exist_ok=True)
    meet(run_dir, rank)
    attempt_file = run_dir / f"attempts-of-rank-{rank}"
    attempt = len(attempt_file.read_text()) + 1 if attempt_file.exists() else 1
    attempt_file.write_text("x" * attempt)
    todo = {}
    for text in filter(None, arguments.get("--stub.do", "").split(",")):
        when_attempt, which_rank, when_step, what = text.split(":")
        if (int(when_attempt), int(which_rank)) == (attempt, rank):
            todo[int(when_step)] = what
    (run_dir / "recipe.yaml").write_text(f"run: {{global_batch: 4, samples: {4 * total}}}\n")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    (run_dir / f"environment-{rank}.json").write_text(json.dumps({name: os.environ[name] for name in names}))

    first = max((int(p.name[5:]) for p in run_dir.glob("checkpoints/step-*")), default=0)
    event(run_dir, rank, "resume" if attempt > 1 else "start", first, attempt)
    print(f"rank {rank} begins at step {first}", flush=True)
    for step in range(first, total):
        beat(run_dir, rank, step)
        what = next((text for when, text in todo.items() if step >= when), "")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while what == "hang":
            time.sleep(1)
        while what == "hold" and not told:
            time.sleep(0.02)
            beat(run_dir, rank, step)
        if what.isdigit():
            return int(what)
        if rank == 0 and (told or step % 5 == 0):
            (run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        if told:
            event(run_dir, rank, "stop", step, attempt)
            return 75
        time.sleep(0.02)
        if rank == 0:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step + 1, "loss": 1.0 / (step + 1), "samples_per_second": 200.0}) + "\n")
    beat(run_dir, rank, total)
    event(run_dir, rank, "finish", total, attempt)
    return 0


def meet(run_dir: Path, rank: int) -> None:
    """Wait for the other ranks, as everyone does who joins a process group; the port is another in every attempt."""
    port, world = os.environ["MASTER_PORT"], int(os.environ["WORLD_SIZE"])
    (run_dir / f"here-{port}-{rank}").touch()
    while not all((run_dir / f"here-{port}-{other}").exists() for other in range(world)):
        time.sleep(0.01)


def beat(run_dir: Path, rank: int, step: int) -> None:
    path = run_dir / f"heartbeat/rank-{rank}.json"
    path.with_suffix(".tmp").write_text(json.dumps({"time": time.time(), "step": step, "phase": "step"}))
    path.with_suffix(".tmp").replace(path)


def event(run_dir: Path, rank: int, name: str, step: int, attempt: int) -> None:
    if rank == 0:
        with open(run_dir / "events.jsonl", "a") as file:
            file.write(json.dumps({"time": time.time(), "event": name, "step": step, "attempt": attempt}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
