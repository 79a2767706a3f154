"""What checkpoints cost training, and what coming back costs: two ranks, loopback gloo.

    python benchmarks/checkpoint_stall.py

Stall: how long the training thread of filip.demo is held up per checkpoint, one every 50 steps, written behind its back
or at once, as a share of the median step of the same run; runs without any between them, in turns. Resume: from the
start of the ranks to the end of the first step, for runs of a smaller model that had come to different steps; the last
is a checkpoint whose counters say so. Ranks are forked from a process that has imported everything, so that the imports
(about ten seconds, which every start pays) are left out.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/, which are no part of the installation

from data_tools.__main__ import main as mmpt_data
from mmpt.engine.checkpoint_files import candidates, read_manifest, write_manifest
from tests.forks import Forks
from tests.test_train import arguments

RANKS, STEPS, EVERY, ROUNDS = 2, 60, 50, 3
KINDS = {"none": (10**6, True), "behind": (EVERY, True), "at once": (EVERY, False)}
TRAINED_STEPS, FARTHEST_STEP, RESUMES = (10, 500), 10_000_000, 5
GLOBAL_BATCH = 16  # of `arguments`


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        forks, folder = Forks(), Path(name)
        mmpt_data(["scenes", str(folder / "data"), "--train", "1024", "--held-out", "16"])
        mmpt_data(["tokenizer", str(folder / "data/train"), str(folder / "tokenizer"), "--kind", "wordpiece",
                   "--vocab-size", "256"])  # fmt: skip
        stalls(forks, folder)
        resumes(forks, folder)


def stalls(forks: Forks, folder: Path) -> None:
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(ROUNDS):
        for kind, (every, behind) in KINDS.items():
            run_dir = folder / f"{kind}-{turn}".replace(" ", "-")
            flags = {
                "data.shards": folder / "data/train", "data.tokenizer": folder / "tokenizer", "run.dir": run_dir,
                "data.workers": 0, "evals.retrieval": "", "evals.scenes": "", "run.log_every_steps": 1,
                "run.samples": 128 * STEPS, "run.checkpoint_every_steps": every, "run.async_checkpoints": behind,
            }  # fmt: skip
            words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            run = forks.start(["--recipe", "filip.demo", *words], RANKS)
            assert run.wait(1500) == [0] * RANKS, run.output()
            found[kind].append(measured(run_dir))
    print(f"\n{RANKS} ranks, filip.demo, {STEPS} steps, a checkpoint at step {EVERY}; {ROUNDS} runs each, in turns")
    for kind, runs in found.items():
        print(f"{kind:8} step {1e3 * median(runs, 'step_seconds'):6.1f} ms", end="")
        if kind != "none":
            shares = sorted(100 * run["stall_seconds"] / run["step_seconds"] for run in runs)
            print(
                f"   stall {1e3 * median(runs, 'stall_seconds'):6.2f} ms a checkpoint = "
                f"{statistics.median(shares):5.2f} % of a step ({shares[0]:.2f} to {shares[-1]:.2f}); whole save "
                f"{1e3 * median(runs, 'save_seconds'):.0f} ms, {runs[0]['mebibytes']:.1f} MiB",
                end="",
            )
        print(flush=True)


def median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def measured(run_dir: Path) -> dict[str, float]:
    """Of one run: without the first step, and without the checkpoints of the beginning and the end, which are waited
    for in any case and lie before the first record and behind the last."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_seconds": statistics.median(record["step_seconds_p50"] for record in records[1:]),
        "stall_seconds": sum(record["checkpoint_stall_seconds"] for record in records[1:]),
        "save_seconds": records[-1]["checkpoint_save_seconds"],
        "mebibytes": records[-1]["checkpoint_bytes"] / 2**20,
    }


def resumes(forks: Forks, folder: Path) -> None:
    run_dir = folder / "resumed"
    print(f"\nfrom the start of the ranks to the end of the first step, {RESUMES} times")
    for step in (*TRAINED_STEPS, FARTHEST_STEP):
        flags = arguments(
            folder, run_dir, run__samples=GLOBAL_BATCH * (FARTHEST_STEP + 1000), run__checkpoint_every_steps=1000
        )
        if step == FARTHEST_STEP:
            move(run_dir, step)
        else:
            run = forks.start([*flags, "--run.stop_at_step", step], RANKS)
            assert run.wait(1500) == [0] * RANKS, run.output()
        times = []
        for again in range(RESUMES):
            began = time.perf_counter()
            run = forks.start([*flags, "--run.stop_at_step", step + again + 1], RANKS)
            while run.running() and last_step(run_dir) != step + again + 1:
                time.sleep(0.002)
            times.append(time.perf_counter() - began)
            assert run.wait() == [0] * RANKS, run.output()
        print(f"had come to step {step:>10,}: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


def last_step(run_dir: Path) -> int:
    """The step of the newest whole record."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


def move(run_dir: Path, step: int) -> None:
    """Let the newest checkpoint say that it is of this step."""
    newest = candidates(run_dir / "checkpoints")[0]
    manifest = read_manifest(newest)
    state = manifest.state | {"step": step, "applied_steps": step, "data_state": GLOBAL_BATCH * step}
    write_manifest(newest, replace(manifest, step=step, state=state))
    newest.rename(newest.with_name(f"step-{step:08d}"))


if __name__ == "__main__":
    main()
