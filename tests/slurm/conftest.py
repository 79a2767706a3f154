"""One private SLURM for all tests here, where its programs are installed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.instance import Slurm, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)")
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(made.conf)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def config(folder: Path, **changes: object) -> Path:
    """A cluster file for the private SLURM: CPU ranks, nodes shared with other jobs."""
    values = {
        "executor": "slurm", "nodes": 2, "ranks_per_node": 1, "gpu_request": "''", "cpus_per_rank": 1,
        "memory_gb_per_node": "null", "exclusive": "false", "time": "'10'", "grace_seconds": 90,
        "runs": folder / "runs", "max_excluded_share": 1.0,
        "environment": "{DS_ACCELERATOR: cpu, OMP_NUM_THREADS: '1', HF_HUB_OFFLINE: '1'}",
    } | changes  # fmt: skip
    path = folder / f"{'-'.join(['cluster', *map(str, changes.values())]).replace('/', '_')}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    return path
