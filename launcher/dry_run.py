"""What would be started, as text: the file that sbatch gets, the command of each rank, and the environment of each."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from launcher import slurm
from launcher.launch import Plan, sbatch_executor
from launcher.plan import Run
from launcher.ranks import port_of

EXAMPLE_JOB, EXAMPLE_HOST = "1234567", "node"
CODE = "SNAPSHOT"
"""Stands for the digest of the code, which is taken when the run is started."""


def shown(made: Plan, environment: Mapping[str, str]) -> str:
    """`environment`: the shell's, of which only what matters to SLURM is mentioned."""
    code = made.folder / "code" / CODE
    parts = []
    if made.cluster.executor == "slurm":
        parts += [_title("sbatch file"), sbatch_executor(made, code).script(len(made.runs)).rstrip()]
        parts += [_title("from your shell"), *_inherited(environment)]
    for i, run in enumerate(made.runs):
        whose = f" of run {i}" if len(made.runs) > 1 else ""
        parts += [_title(f"command of every rank{whose}, in {Path.cwd()}"), command(made, run, code)]
    parts += _environments(made, code, environment.get("PYTHONPATH"))
    return "\n".join(parts).lstrip() + "\n"


def command(made: Plan, run: Run, code: Path) -> str:
    slurm_job = made.cluster.executor == "slurm"
    arguments = slurm.rank_arguments(made.cluster, run.arguments) if slurm_job else run.arguments
    return shlex.join(["python", "-u", str(code / "mmpt" / "train.py"), *arguments])


def _inherited(environment: Mapping[str, str]) -> list[str]:
    overriding = sorted(name for name in environment if name.startswith("SBATCH_"))
    lines = [
        "everything (sbatch's default), but for what a surrounding job left: SLURM_*, SUBMITIT_*, RANK and its kin"
    ]
    if removed := slurm.inherited(environment):
        lines.append(f"removed here: {' '.join(removed)}")
    if overriding:
        lines.append(f"override the file above: {' '.join(f'{n}={shlex.quote(environment[n])}' for n in overriding)}")
    return lines


def _environments(made: Plan, code: Path, path: str | None) -> list[str]:
    """Rank 0's and the last one's; the others lie between."""
    per_node, nodes = made.cluster.ranks_per_node, made.cluster.least_nodes
    if made.cluster.executor == "debug":
        per_node = nodes = 1
    world, parts = per_node * nodes, []
    for rank in sorted({0, world - 1}):
        packages = {"PYTHONPATH": f"{code}:{path}" if path else str(code)}
        own = made.cluster.environment | packages | _ranks(made, rank, per_node, world)
        text = "\n".join(f"{name}={shlex.quote(value)}" for name, value in sorted(own.items()))
        parts += [_title(f"environment of rank {rank}{_example(made)}"), text]
    return parts


def _ranks(made: Plan, rank: int, per_node: int, world: int) -> dict[str, str]:
    slurm_job = made.cluster.executor == "slurm"
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node), "LOCAL_SIZE": str(per_node),
        "MASTER_ADDR": f"{EXAMPLE_HOST}1" if slurm_job else "127.0.0.1",
        "MASTER_PORT": str(port_of(EXAMPLE_JOB, 0)) if slurm_job else "(a free one)",
    }  # fmt: skip


def _example(made: Plan) -> str:
    if made.cluster.executor != "slurm":
        return ""
    return f", if SLURM called the job {EXAMPLE_JOB} and its nodes {EXAMPLE_HOST}1, {EXAMPLE_HOST}2, ..."


def _title(text: str) -> str:
    return f"\n==== {text}"
